"""Scenarios in the nested kernel: `testbed run` again, inside, and the results it sends back."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import LabError
from testbed.scenario.runner import ScenarioResult
from testbed.vm import wire
from testbed.vm.machine import available_memory_mib
from testbed.vm.plan import VmRequest, choose_memory
from testbed.vm.session import own_terminal, run_command

INTERRUPTED = 128 + signal.SIGINT
Results = list[tuple[ScenarioResult, str]]
"""Each result with the name of its lab."""


def nested_arguments(
    paths: Sequence[Path], mode: str, *, iptables_backend: str, to_stderr: bool, packets: Path | None = None
) -> list[str]:
    """Return the arguments of the `testbed` inside, which narrates as this one does and prints no report."""
    backend = ["--iptables-backend", iptables_backend] if iptables_backend else []
    output = ["-o", "json"] if to_stderr else []
    kept = ["--packets", str(packets.resolve())] if packets is not None else []
    shown = [str(path) if not str(path).startswith("-") else f"./{path}" for path in paths]
    return [
        "run",
        *shown,
        "--proxy-mode",
        mode,
        "--no-vm",
        "--results-fd",
        str(wire.ANSWER_FD),
        *kept,
        *backend,
        *output,
    ]


def run_nested(arguments: Sequence[str], shared: Path | None = None) -> tuple[Results, int]:
    """Run `testbed` with these arguments in the nested kernel; return the results, and the status it ended with.

    Args:
        shared: a folder that it may write to.

    Raises:
        KernelError: there is no nested kernel here, or it did not boot.
        LabError: it ended without results; what is wrong has been said.
        KeyboardInterrupt: it was interrupted.
    """
    terminal, window = own_terminal()
    request = VmRequest(
        argv=(sys.executable, "-m", "testbed", *arguments),
        cwd=os.getcwd(),
        env=dict(os.environ),
        memory_mib=choose_memory(None, available_memory_mib()),
        terminal=tuple(fd for fd in terminal if fd),  # nothing is typed there, and Ctrl-C reaches us as a signal
        window=window,
        stdin=False,
        answers=True,
        shares=(str(shared.resolve()),) if shared is not None else (),
    )
    ended = run_command(request)
    if ended.status == INTERRUPTED:
        raise KeyboardInterrupt
    try:
        results: Results = pickle.loads(ended.answer)  # noqa: S301  # written by our own program
    except (EOFError, pickle.UnpicklingError) as error:  # it ended before it had written them
        raise LabError(f"the testbed in the nested kernel ended with status {ended.status} and no results") from error
    return results, ended.status


def send_results(fd: int, results: Results) -> None:
    """Write results to the descriptor that `run_nested` reads."""
    with os.fdopen(fd, "wb") as file:
        pickle.dump(results, file)
