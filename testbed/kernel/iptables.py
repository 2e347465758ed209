"""Puts a rendered iptables state into the network namespace of the runner, and reads back what is there.

Both families of tools are supported: the legacy one (ip_tables) and the one that writes nf_tables. They keep separate
rules, so a node must use one of them throughout.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from testbed.errors import CommandError, RulesRejected
from testbed.kernel.runner import Runner

#: How long the holder of the xtables lock is waited for.
LOCK_WAIT_S: Final = 5

_CONTEXT_LINES: Final = 2


class Backend(StrEnum):
    """Which iptables: ``legacy`` talks to ip_tables, ``nft`` to nf_tables."""

    LEGACY = "legacy"
    NFT = "nft"


def detect_backend(runner: Runner, wanted: str = "") -> Backend:
    """Return the wanted backend, or the one that plain ``iptables`` is on this machine.

    Raises:
        MissingFeature: neither is installed.
    """
    if wanted:
        return Backend(wanted)
    version = runner.run(["iptables", "--version"])
    return Backend.NFT if "nf_tables" in version else Backend.LEGACY


class Iptables:
    """One backend of iptables in one network namespace."""

    def __init__(self, runner: Runner, backend: Backend) -> None:
        self._runner = runner
        self.backend = backend
        # iptables-nft has no lock and warns about the option in newer releases
        self._wait = ["-w", str(LOCK_WAIT_S)] if backend is Backend.LEGACY else []

    def _tool(self, name: str) -> str:
        return f"iptables-{self.backend.value}-{name}" if name else f"iptables-{self.backend.value}"

    def save(self, table: str = "") -> str:
        """Return the rules of all tables, or of one, as ``iptables-save`` prints them."""
        return self._runner.run([self._tool("save"), *(["-t", table] if table else [])])

    def apply(self, payload: str) -> None:
        """Make one transaction per table of the payload; chains it does not declare stay as they are.

        Raises:
            RulesRejected: the tool refused a line; names it, with its neighbours.
            CommandError: the tool failed for another reason, such as the lock.
        """
        argv = [self._tool("restore"), *self._wait, "--noflush", "--counters"]
        try:
            self._runner.run(argv, stdin=payload)
        except CommandError as error:
            line = refused_line(error.stderr)
            if line is None:
                raise
            raise rejected(argv[0], payload, line, error.stderr) from error


_REFUSALS = (re.compile(r"line (\d+) failed"), re.compile(r"Error occurred at line: (\d+)"))


def refused_line(stderr: str) -> int | None:
    """Return the number of the line that ``iptables-restore`` refused, counted from 1, or None.

    It complains in two forms::

        iptables-restore: line 3 failed: No chain/target/match by that name.
        iptables-restore v1.8.9 (legacy): unknown option "--dprt"
        Error occurred at line: 3
    """
    for pattern in _REFUSALS:
        match = pattern.search(stderr)
        if match:
            return int(match[1])
    return None


def rejected(tool: str, payload: str, number: int, stderr: str) -> RulesRejected:
    """Return the error for a refused line, with the line and its neighbours."""
    lines = payload.splitlines()
    first = max(0, number - 1 - _CONTEXT_LINES)
    context = [
        f"{'>' if index == number - 1 else ' '} {index + 1}: {line}"
        for index, line in enumerate(lines[first : number + _CONTEXT_LINES], start=first)
    ]
    reason = next((line.strip() for line in stderr.splitlines() if line.strip()), "no reason given")
    return RulesRejected(tool, number, context, reason)
