"""What a detector says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.model.doctor import CAUSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault. ``about`` names the Services (NAMESPACE/NAME) that suffer, () for what concerns any of them."""

    cause: str  # one of CAUSES
    where: str  # node NAME, svc NAMESPACE/NAME, pod …, ingress …, dns
    what: str  # what was seen
    do: str  # what mends it
    about: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.cause in CAUSES, self.cause


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return names for a sentence, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
