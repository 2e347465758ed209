"""Questions to DNS by dig(1), which takes servers, search list and ndots from the place's own resolv.conf."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

from testbed.kernel.pace import patient
from testbed.kernel.processes import Completed

PATIENCE_S = 2
_ANSWER = re.compile(r"(\S+)\s+([0-9]+)\s+IN\s+(\S+)\s+(.+)")
_STATUS = re.compile(r"status: ([A-Z0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What came of a question. ``records`` of the answer: name, TTL, type and value, without final dots.

    ``rcode`` is '' when there was no answer; ``detail`` then says why.
    """

    rcode: str
    records: tuple[tuple[str, int, str, str], ...] = ()
    detail: str = ""


def dig_argv(name: str, record_type: str, server: IPv4Address | None) -> list[str]:
    """Return dig's command line for a question; an address is turned into the name of its PTR record."""
    with contextlib.suppress(AddressValueError):
        name = IPv4Address(name).reverse_pointer + "."
    where = [f"@{server}"] if server is not None else []
    options = ["+search", "+tries=2", f"+time={patient(PATIENCE_S):.0f}", "+noall", "+comments", "+answer"]
    return ["dig", *where, *options, "-t", record_type, "-q", name]


def read_dig(done: Completed) -> Resolution:
    """Return what dig has printed."""
    text = done.stdout.decode(errors="replace")
    status = _STATUS.search(text)
    if status is None:
        words = [*text.splitlines(), *done.stderr.decode(errors="replace").splitlines()]
        said = [line.lstrip("; ") for line in words if line.strip("; ")]
        return Resolution(rcode="", detail=said[-1] if said else f"dig ended with status {done.status}")
    matches = (_ANSWER.fullmatch(line) for line in text.splitlines() if not line.startswith(";"))
    records = tuple(
        (match[1].rstrip("."), int(match[2]), match[3], match[4].rstrip(".")) for match in matches if match is not None
    )
    return Resolution(rcode=status[1], records=records)
