"""Scenarios in the nested kernel: `testbed run` again, inside, and the results it sends back."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import LabError
from testbed.scenario.runner import ScenarioResult
from testbed.vm import wire
from testbed.vm.again import run_testbed

INTERRUPTED = 128 + signal.SIGINT
Results = list[tuple[ScenarioResult, str]]
"""Each result with the name of its lab."""


def nested_arguments(
    paths: Sequence[Path],
    mode: str,
    *,
    iptables_backend: str,
    to_stderr: bool,
    packets: Path | None = None,
    one_lab: bool = False,
) -> list[str]:
    """Return the arguments of a `testbed` that runs them as this one does, without where its results go."""
    backend = ["--iptables-backend", iptables_backend] if iptables_backend else []
    output = ["-o", "json"] if to_stderr else []
    together = ["--one-lab"] if one_lab else []
    kept = ["--packets", str(packets.resolve())] if packets is not None else []
    shown = [str(path) if not str(path).startswith("-") else f"./{path}" for path in paths]
    return ["run", *shown, "--proxy-mode", mode, *kept, *backend, *output, *together]


def run_nested(arguments: Sequence[str], shared: Path | None = None) -> tuple[Results, int]:
    """Run `testbed` with these arguments in the nested kernel; return the results, and the status it ended with.

    It narrates as this one does, and prints no report.

    Args:
        shared: a folder that it may write to.

    Raises:
        KernelError: there is no nested kernel here, or it did not boot.
        LabError: it ended without results; what is wrong has been said.
        KeyboardInterrupt: it was interrupted.
    """
    ended = run_testbed([*arguments, "--no-vm", "--results-fd", str(wire.ANSWER_FD)], shared)
    return read_results(ended.answer, ended.status), ended.status


def read_results(answer: bytes, status: int) -> Results:
    """Return what `send_results` has written, of a process that ended with this status.

    Raises:
        LabError: it ended before it had written them.
        KeyboardInterrupt: it was interrupted.
    """
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    try:
        results: Results = pickle.loads(answer)  # noqa: S301  # written by our own program
    except (EOFError, pickle.UnpicklingError) as error:
        raise LabError(f"the testbed in the nested kernel ended with status {status} and no results") from error
    return results


def send_results(fd: int, results: Results) -> None:
    """Write results to the descriptor that `run_nested` reads."""
    with os.fdopen(fd, "wb") as file:
        pickle.dump(results, file)
