"""Puts a rendered iptables state into the network namespace of the runner, and reads back what is there.

Both families of tools are supported: the legacy one (ip_tables) and the one that writes nf_tables. They keep separate
rules, so a node must use one of them throughout.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from testbed.errors import CommandError, InputError, LockHeld, MissingFeature, RulesRejected
from testbed.kernel.runner import Runner

#: How long the holder of the xtables lock is waited for.
LOCK_WAIT_S: Final = 5
_LOCK_FILE: Final = "/run/xtables.lock"

#: Exit status of iptables when the kernel refused (xtables.h); 1 is any other reason, a missing privilege among them.
_RESOURCE_PROBLEM: Final = 4

_CONTEXT_LINES: Final = 2
_KUBELET_CHAINS: Final = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")


class Backend(StrEnum):
    """Which iptables: ``legacy`` talks to ip_tables, ``nft`` to nf_tables."""

    LEGACY = "legacy"
    NFT = "nft"


def detect_backend(runner: Runner, wanted: str = "") -> Backend:
    """Return the wanted backend, or the one that the node uses: where a kubelet has left its chains.

    Without such chains it is the one that plain ``iptables`` is on this machine.

    Source: kubernetes-sigs/iptables-wrappers, which chooses so inside of kube-proxy's image.

    Raises:
        InputError: there is no backend of that name.
        MissingFeature: neither is installed.
    """
    if wanted:
        if wanted not in set(Backend):
            raise InputError(f"there is no iptables backend {wanted!r}; the backends are {', '.join(Backend)}")
        return Backend(wanted)
    for backend in (Backend.NFT, Backend.LEGACY):
        with contextlib.suppress(MissingFeature, CommandError):
            # The legacy tool would make a table that is not there.
            if backend is Backend.LEGACY and "mangle" not in runner.run(["cat", "/proc/net/ip_tables_names"]).split():
                continue
            saved = runner.run([f"iptables-{backend}-save", "-t", "mangle"])
            if any(f":{chain} " in saved for chain in _KUBELET_CHAINS):
                return backend
    return default_backend(runner)


def default_backend(runner: Runner) -> Backend:
    """Return the backend that plain ``iptables`` is on this machine, or the other one where the kernel has no NAT for it.

    Raises:
        MissingFeature: it is not installed.
    """
    if "nf_tables" not in runner.run(["iptables", "--version"]):
        return Backend.LEGACY
    try:  # in a throw-away namespace; listing would succeed on a kernel that has nf_tables without NAT
        runner.run(["unshare", "--net", "iptables-nft", "-t", "nat", "-N", "TESTBED-PROBE"])
    except CommandError as error:
        if error.status == _RESOURCE_PROBLEM:
            return Backend.LEGACY
    except MissingFeature:
        pass  # util-linux: who needs it says so
    return Backend.NFT


def choose_iptables(backend: str) -> None:
    """Have ``iptables``, ``iptables-save`` and so on mean one backend wherever this process's /etc is seen.

    Done as Debian's update-alternatives(1) does it; where there are no alternatives, there is one backend only.
    """
    for family in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            link, program = f"/etc/alternatives/{family}{suffix}", shutil.which(f"{family}-{backend}{suffix}")
            if program is not None and os.path.islink(link) and os.readlink(link) != program:
                os.unlink(link)
                os.symlink(program, link)


class Iptables:
    """One backend of iptables in one network namespace."""

    def __init__(self, runner: Runner, backend: Backend, *, lock_file: str = _LOCK_FILE) -> None:
        self._runner = runner
        self._lock_file = lock_file
        self.backend = backend
        # iptables-nft has no lock and warns about the option in newer releases
        self._wait = ["-w", str(LOCK_WAIT_S)] if backend is Backend.LEGACY else []

    def _tool(self, name: str) -> str:
        return f"iptables-{self.backend.value}-{name}" if name else f"iptables-{self.backend.value}"

    def save(self, table: str = "") -> str:
        """Return the rules of all tables, or of one, as ``iptables-save`` prints them."""
        return self._runner.run([self._tool("save"), *(["-t", table] if table else [])])

    def apply(self, payload: str) -> None:
        """Make one transaction per table of the payload; chains it does not declare stay as they are. '' does nothing.

        Raises:
            RulesRejected: the tool refused a line; names it, with its neighbours.
            LockHeld: another process has held the lock for longer than `LOCK_WAIT_S`.
            CommandError: the tool failed for another reason.
        """
        if not payload:
            return
        argv = [self._tool("restore"), *self._wait, "--noflush", "--counters"]
        try:
            self._runner.run(argv, stdin=payload)
        except CommandError as error:
            if "xtables lock" in error.stderr:
                raise LockHeld(f"{argv[0]} waited {LOCK_WAIT_S} s for the xtables lock, {self._holder()}") from error
            lines = refused_lines(error.stderr)
            if not lines:
                raise
            raise rejected(argv[0], payload, lines, error.stderr) from error

    def _holder(self) -> str:
        """Say who holds the lock, as far as this process can see: proc(5), /proc/locks."""
        path = self._lock_file
        try:
            inode = os.stat(path).st_ino
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                    pid = fields[4]
                    return f"{path}, which process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()}) holds"
        except (OSError, IndexError):
            pass
        return f"{path}, which another process holds"


_REFUSALS = (
    re.compile(r"line (\d+) failed"),
    re.compile(r"Error occurred at line: (\d+)"),
    re.compile(r"^line (\d+): \w+ failed", re.MULTILINE),
)


def refused_lines(stderr: str) -> tuple[int, ...]:
    """Return the numbers of the lines that ``iptables-restore`` refused, counted from 1; none when it named none.

    It complains in three forms; the first names the line with COMMIT when it was the kernel that refused::

        iptables-restore: line 3 failed: No chain/target/match by that name.
        iptables-restore v1.8.9 (legacy): unknown option "--dprt"
        Error occurred at line: 3
        line 3: RULE_APPEND failed (No such file or directory): rule in chain X
    """
    return tuple(sorted({int(match[1]) for pattern in _REFUSALS for match in pattern.finditer(stderr)}))


def rejected(tool: str, payload: str, numbers: Sequence[int], stderr: str) -> RulesRejected:
    """Return the error for refused lines, with the first one and its neighbours."""
    lines, number = payload.splitlines(), numbers[0]
    first = max(0, number - 1 - _CONTEXT_LINES)
    context = [
        f"{'>' if index == number - 1 else ' '} {index + 1}: {line}"
        for index, line in enumerate(lines[first : number + _CONTEXT_LINES], start=first)
    ]
    # iptables-nft begins with a line that holds its name alone
    told = [line.strip() for line in stderr.splitlines() if line.strip() and not line.rstrip().endswith("(nf_tables):")]
    return RulesRejected(tool, number, context, told[0] if told else "no reason given", numbers)
