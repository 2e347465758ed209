"""Which mode is measured on which kernel. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from testbed.bench.results import Skipped


@dataclass(frozen=True, slots=True)
class Placement:
    """Modes for the kernel that we are on, modes for the nested one, and why others are not measured."""

    here: tuple[str, ...]
    nested: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def place_modes(
    modes: Sequence[str],
    *,
    one_kernel: bool,
    why_not_here: Callable[[str], str],
    why_not_nested: Callable[[str], str],
) -> Placement:
    """Return where each mode is measured.

    A mode goes to the nested kernel when this one cannot run it; with ``one_kernel`` all go there when one of them must.

    Args:
        why_not_here: why the kernel that we are on cannot run a mode, '' when it can.
        why_not_nested: the same of the nested one.
    """
    reasons = {mode: why_not_here(mode) for mode in modes}
    must_go = one_kernel and any(reasons[mode] and not why_not_nested(mode) for mode in modes)
    here, nested, skipped = [], [], []
    for mode in modes:
        if not reasons[mode] and not must_go:
            here.append(mode)
        elif not (nested_reason := why_not_nested(mode)):
            nested.append(mode)
        else:
            reason = reasons[mode] if nested_reason in reasons[mode] else f"{reasons[mode]}; {nested_reason}"
            skipped.append(Skipped(mode=mode, what="", reason=reason.removeprefix("; ")))
    return Placement(tuple(here), tuple(nested), tuple(skipped))
