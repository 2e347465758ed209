"""The seam for external programs: one method, so that everything above it can be tested with a stand-in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from testbed.errors import CommandError, MissingFeature
from testbed.kernel.pace import patient

#: Debian and Ubuntu package of each program, for the message when it is missing.
PACKAGES: Mapping[str, str] = {
    "conntrack": "conntrack",
    "ip": "iproute2",
    "ipset": "ipset",
    "ipvsadm": "ipvsadm",
    "nft": "nftables",
    "tc": "iproute2",
    "unshare": "util-linux",
}


def not_installed(program: str) -> MissingFeature:
    """Return the error for a program that is not there, with the package that has it."""
    package = PACKAGES.get(program, "iptables" if program.startswith("iptables") else program)
    return MissingFeature(f"{program} is not installed (apt-get install {package})")


class Runner(Protocol):
    """Runs a program to its end."""

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60) -> str:
        """Return what the program wrote to its standard output.

        Raises:
            CommandError: it ended with a status other than 0, or did not end in time (status 124).
            MissingFeature: there is no such program.
        """
        ...


class SubprocessRunner:
    """Runs programs as children of this process, in its namespaces.

    Args:
        env: Variables beside the inherited ones, for example XTABLES_LOCKFILE.
        prefix: Put before every command, for example ``nsenter --net=…``.
        where: Named in errors.
    """

    def __init__(self, env: Mapping[str, str] | None = None, *, prefix: Sequence[str] = (), where: str = "") -> None:
        self._env = {**os.environ, **(env or {})}
        self._prefix = tuple(prefix)
        self._where = where

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60) -> str:
        whole = [*self._prefix, *argv]
        timeout_s = patient(timeout_s)
        try:
            done = subprocess.run(
                whole, input=stdin, capture_output=True, text=True, env=self._env, timeout=timeout_s, check=False
            )
        except FileNotFoundError:
            raise not_installed(whole[0]) from None
        except subprocess.TimeoutExpired:
            raise CommandError(whole, 124, f"did not end within {timeout_s:g} s", where=self._where) from None
        if done.returncode != 0:
            raise CommandError(whole, done.returncode, done.stderr, where=self._where)
        return done.stdout
