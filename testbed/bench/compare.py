"""Two results side by side: what changed beyond noise. Pure. Figures of different kernels are never divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from testbed.bench.results import Machine, Results, Series
from testbed.bench.summary import overlap
from testbed.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure in both files. ``of_direct``: the ratios to the direct path were compared, not the figures themselves.

    ``beyond_noise``: the intervals do not overlap; ``better`` says in which direction then.
    """

    kernel: str
    mode: str
    subject: str
    metric: str
    unit: str
    before: float
    after: float
    times: float
    of_direct: bool
    beyond_noise: bool
    better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``notes`` say what else differs between the runs, ``missing`` what only one of them has."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]


def compare(before: Results, after: Results) -> Comparison:
    """Return the main figures of both, kernel by kernel.

    Where both have the ratio to the direct path, that is compared: it does not follow the speed of the machine.

    Raises:
        InputError: they have no kernel in common, or no figure.
    """
    kernels = {id_of(machine) for machine in before.machines} & {id_of(machine) for machine in after.machines}
    if not kernels:
        raise InputError(
            f"{_kernels(before)} and {_kernels(after)} are different kernels: their figures cannot be compared; measure both on "
            "one, for example with --one-kernel"
        )
    old, new = _by_key(before), _by_key(after)
    common = [key for key in new if key in old and key[0] in kernels]
    if not common:
        raise InputError("the two results have no figure in common: other modes, paths, or numbers of Services")
    missing = [
        f"only in the {which}: {one.mode}, {one.subject}, {one.metric} on kernel {key[0]}"
        for which, mine, theirs in (("first", old, new), ("second", new, old))
        for key, one in mine.items()
        if key not in theirs or key[0] not in kernels
    ]
    return Comparison(
        changes=tuple(_change(key[0], old[key], new[key]) for key in common),
        notes=tuple(_notes(before, after)),
        missing=tuple(missing),
    )


def id_of(machine: Machine) -> str:
    """Return what tells kernels apart: release, and whether it was nested."""
    return machine.kernel + (" (nested)" if machine.id == "nested" else "")


def _kernels(results: Results) -> str:
    return " and ".join(id_of(machine) for machine in results.machines) or "(none)"


def _by_key(results: Results) -> dict[tuple[str, ...], Series]:
    kernels = {machine.id: id_of(machine) for machine in results.machines}
    return {(kernels[one.machine], one.mode, *one.key): one for one in results.series if one.main}


def _change(kernel: str, old: Series, new: Series) -> Change:
    of_direct = old.ratio is not None and new.ratio is not None
    a: Any = old.ratio if of_direct else old
    b: Any = new.ratio if of_direct else new
    return Change(
        kernel=kernel,
        mode=new.mode,
        subject=new.subject,
        metric=new.metric,
        unit=f"of {new.ratio.path}" if of_direct and new.ratio else new.unit,
        before=a.median,
        after=b.median,
        times=b.median / a.median if a.median else 0.0,
        of_direct=of_direct,
        beyond_noise=not overlap(a.interval, b.interval),
        better=(b.median > a.median) == (new.better == "higher"),
    )


def _notes(before: Results, after: Results) -> list[str]:
    notes = [f"the {which} is not complete: {one.reason}" for which, one in _both(before, after) if not one.complete]
    for name in ("topology", "duration_s", "clients", "endpoints", "samples"):
        mine, theirs = getattr(before.settings, name), getattr(after.settings, name)
        if mine != theirs:
            notes.append(f"{name} differs: {mine} and {theirs}")
    for machine in after.machines:
        other = next((one for one in before.machines if id_of(one) == id_of(machine)), None)
        if other is None:
            continue
        for name in ("cpus", "cpu_model", "conntrack_max", "offloads"):
            if getattr(other, name) != getattr(machine, name):
                notes.append(f"{machine.id}: {name} differs: {getattr(other, name)} and {getattr(machine, name)}")
        for program in sorted(other.versions.keys() | machine.versions.keys()):
            mine, theirs = other.versions.get(program, "none"), machine.versions.get(program, "none")
            if mine != theirs:
                notes.append(f"{machine.id}: {program} differs: {mine} and {theirs}")
    return notes


def _both(before: Results, after: Results) -> Sequence[tuple[str, Results]]:
    return (("first", before), ("second", after))


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    changes = [asdict(change) for change in comparison.changes]
    return {"changes": changes, "notes": list(comparison.notes), "missing": list(comparison.missing)}
