"""``testbed vm``: run a command in a nested kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import InputError
from testbed.vm.machine import available_memory_mib, check_machine
from testbed.vm.plan import LEAST_MEMORY_MIB, OWN_INSIDE, VmRequest, choose_memory
from testbed.vm.session import own_terminal, run_command

_UNITS = {"": 1, "k": 1 / 1024, "m": 1, "g": 1024}
_TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_memory(text: str) -> int:
    """Return MiB: ``512M``, ``2G``, ``2GiB``; a plain number is MiB.

    Raises:
        InputError: it is none of these, or too little for a kernel and a program.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise InputError(f"--memory {text!r}: write it like 512M or 2G")
    mib = int(float(found[1]) * _UNITS[found[2]])
    if mib < LEAST_MEMORY_MIB:
        raise InputError(f"--memory {text!r}: the nested kernel needs {LEAST_MEMORY_MIB}M at least")
    return mib


def parse_timeout(text: str) -> float:
    """Return seconds: ``90``, ``90s``, ``10m``, ``1h``.

    Raises:
        InputError: it is none of these, or 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if not found or not float(found[1]):
        raise InputError(f"--timeout {text!r}: write it like 90s, 10m or 1h")
    return float(found[1]) * _TIMES[found[2]]


def run_in_vm(argv: Sequence[str], memory: str | None, timeout: str | None, shares: Sequence[Path]) -> int:
    """Run a command in a nested kernel on our terminal and return its exit status."""
    command = tuple(argv[1:] if argv[:1] == ("--",) else argv)
    if command == tuple(argv) and command[:1] and command[0].startswith("-"):
        raise InputError(f"there is no option {command[0]!r}; a command of that name goes behind `--`")
    if not command:
        raise InputError("nothing to run: testbed vm -- COMMAND...")
    if not command[0]:
        raise InputError(f"cannot run {''!r}: the name of a program is empty")
    for share in shares:
        if not share.is_dir():
            raise InputError(f"--share {str(share)!r}: there is no such folder")
        if any(share.resolve().is_relative_to(own) for own in OWN_INSIDE) or share.resolve() == Path("/"):
            raise InputError(f"--share {str(share)!r}: the nested kernel has its own inside; share another folder")
    check_machine()
    terminal, window = own_terminal()
    request = VmRequest(
        argv=command,
        cwd=os.getcwd(),
        env=dict(os.environ),
        memory_mib=choose_memory(parse_memory(memory) if memory is not None else None, available_memory_mib()),
        timeout_s=parse_timeout(timeout) if timeout is not None else None,
        shares=tuple(str(share.resolve()) for share in shares),
        terminal=terminal,
        window=window,
    )
    return run_command(request).status
