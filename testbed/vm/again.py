"""`testbed` once more, in the nested kernel: what this kernel cannot run, with the same words on the same terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.vm.machine import available_memory_mib
from testbed.vm.plan import VmRequest, choose_memory
from testbed.vm.session import Ended, own_terminal, run_command


def run_testbed(arguments: Sequence[str], shared: Path | None = None) -> Ended:
    """Run `testbed` with these arguments inside; what it writes to `wire.ANSWER_FD` comes back.

    Signals reach it, and nothing is typed there.

    Args:
        shared: a folder that it may write to.

    Raises:
        KernelError: there is no nested kernel here, or it did not boot.
    """
    terminal, window = own_terminal()
    request = VmRequest(
        argv=(sys.executable, "-m", "testbed", *arguments),
        cwd=os.getcwd(),
        env=dict(os.environ),
        memory_mib=choose_memory(None, available_memory_mib()),
        terminal=tuple(fd for fd in terminal if fd),  # Ctrl-C reaches us as a signal
        window=window,
        stdin=False,
        answers=True,
        shares=(str(shared.resolve()),) if shared is not None else (),
    )
    return run_command(request)
