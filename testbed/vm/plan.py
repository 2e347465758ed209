"""What is asked of a nested kernel, and what follows from it: UML's command line and the guest's plan. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import MissingFeature
from testbed.kernel.pace import NESTED

BOOT_WITHIN_S = 60.0
DEFAULT_MEMORY_MIB = 2048
LEAST_MEMORY_MIB = 256

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOT_PASSED_ON = frozenset(
    {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "INVOCATION_ID", "JOURNAL_STREAM"}
)

OWN_INSIDE = ("/dev", "/proc", "/run", "/sys")
"""Folders that are not the host's inside."""

#: rows of numbers and of addresses below a panic
_STACK = re.compile(r"\s*(?:\[<[0-9a-f]+>\]|(?:[0-9a-f]{8,16} ?)+$|Stack:|Call Trace:)")

#: what nothing asks the kernel for by name before it is needed
_MODULES = ("nf_conntrack", "br_netfilter", "ip_vs")
_SYSCTLS = {
    # the default follows from the memory of a small machine; a lab's nodes share one table
    "net/netfilter/nf_conntrack_max": "262144",
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRequest:
    """One command for a nested kernel.

    Attributes:
        shares: absolute folders that the command may change for real.
        timeout_s: after so long everything ends; None never.
        terminal: which of the standard descriptors 0, 1, 2 are a terminal inside, too, of ``window`` rows and columns.
        stdin: pass the caller's standard input on; otherwise there is nothing to read.
        answers: give the command a descriptor 3, and return what it writes there.
    """

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    memory_mib: int = DEFAULT_MEMORY_MIB
    timeout_s: float | None = None
    shares: tuple[str, ...] = ()
    terminal: tuple[int, ...] = ()
    window: tuple[int, int] = (0, 0)
    stdin: bool = True
    answers: bool = False


def choose_memory(wanted_mib: int | None, available_mib: int) -> int:
    """Return how many MiB the nested kernel gets: what is wanted, or 2 GiB, or less on a machine that is short of them.

    Raises:
        MissingFeature: that much is not available.
    """
    if wanted_mib is None:
        wanted_mib = min(DEFAULT_MEMORY_MIB, available_mib * 3 // 4)
        if wanted_mib < LEAST_MEMORY_MIB:
            raise MissingFeature(
                f"a nested kernel needs {LEAST_MEMORY_MIB} MiB of memory, and this machine has {available_mib} MiB available"
            )
    elif wanted_mib > available_mib:
        raise MissingFeature(
            f"the nested kernel is to have {wanted_mib} MiB, and this machine has {available_mib} MiB available: "
            "give it less with --memory"
        )
    return wanted_mib


def explain_end(messages: str, memory_mib: int) -> str:
    """Return what the kernel's messages say about memory it ran out of, '' when nothing."""
    killed = re.findall(r"Out of memory: Killed process \d+ \(([^)]*)\)", messages)
    if not killed:
        return ""
    names = ", ".join(dict.fromkeys(killed))
    return f"the nested kernel ran out of its {memory_mib} MiB and killed {names}; give it more with --memory"


def last_messages(messages: str, count: int = 12) -> list[str]:
    """Return the last lines that a kernel printed, without what it found on its stack."""
    lines = [line.rstrip() for line in messages.splitlines()]
    return [line for line in lines if line.strip() and not _STACK.match(line)][-count:]


def guest_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the command: the caller's, and what a login would have set."""
    passed = {name: value for name, value in env.items() if name not in _NOT_PASSED_ON}
    return {"PATH": _DEFAULT_PATH, "HOME": "/root", **passed, NESTED: "1"}


def guest_plan(request: VmRequest, *, modules: str) -> str:
    """Return the text of the guest's plan, which `guest.py` reads.

    Args:
        modules: the kernel's own module folder, as /usr/lib/uml/modules/RELEASE.
    """
    plan: dict[str, Any] = {
        "argv": list(request.argv),
        "cwd": request.cwd,
        "env": guest_environment(request.env),
        "shares": list(request.shares),
        "stdin": request.stdin,
        "answers": request.answers,
        "terminal": list(request.terminal),
        "window": list(request.window),
        "modules": modules,
        "load": list(_MODULES),
        "sysctls": _SYSCTLS,
        "hostname": "testbed-vm",
    }
    return json.dumps(plan)  # ASCII: bytes of arguments that are not UTF-8 survive as escapes


def uml_command(program: str, *, memory_mib: int, line_fd: int, folder: str, init: Sequence[str]) -> list[str]:
    """Return UML's command line.

    Args:
        line_fd: the inherited descriptor that becomes the guest's first serial line.
        folder: where UML keeps its pid file and management socket.
        init: PID 1 and its arguments; UML splits its command line at blanks, so none of them may hold one.
    """
    return [
        program,
        f"mem={memory_mib}M",
        f"uml_dir={folder}",
        "umid=testbed",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        "con0=null,fd:1",
        "con=null",
        f"ssl0=fd:{line_fd}",
        "ssl=null",
        "noreboot",
        "panic=-1",
        "devtmpfs.mount=0",  # it would cover what we keep below /dev
        "loglevel=5",
        f"init={init[0]}",
        "--",
        *init[1:],
    ]
