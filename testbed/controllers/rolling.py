"""How many replicas each ReplicaSet of a Deployment should have next: rolling updates and scaling as arithmetic. Pure.

Source: kubernetes pkg/controller/deployment/rolling.go, sync.go, util/deployment_util.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCount:
    """A ReplicaSet in numbers."""

    name: str
    wanted: int  # spec.replicas
    present: int = 0  # status.replicas
    available: int = 0  # status.availableReplicas
    max_replicas: int = 0  # what the Deployment allowed when the set was last scaled; 0: not known


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a rolling update may leave ``replicas``."""

    replicas: int
    max_surge: int
    max_unavailable: int

    @property
    def ceiling(self) -> int:
        return self.replicas + self.max_surge

    @property
    def floor(self) -> int:
        """The number of pods that must be available."""
        return self.replicas - self.max_unavailable


def scaled_value(value: int | str, total: int, *, round_up: bool) -> int:
    """Return a number as it is, or ``"25%"`` of a total, rounded up or down.

    Raises:
        ValueError: the text is no percentage.
    """
    if isinstance(value, int):
        return value
    if not value.endswith("%"):
        raise ValueError(f"want a number or a percentage, got {value!r}")
    hundredths = int(value[:-1]) * total
    return -(-hundredths // 100) if round_up else hundredths // 100


def rolling_bounds(replicas: int, max_surge: int | str, max_unavailable: int | str) -> Bounds:
    """Return the bounds: surge is rounded up, unavailability down, and they are not both 0."""
    surge = scaled_value(max_surge, replicas, round_up=True)
    unavailable = min(scaled_value(max_unavailable, replicas, round_up=False), replicas)
    if surge == 0 and unavailable == 0:
        unavailable = 1  # otherwise nothing could ever move: 1 % of 3, rounded down, is 0
    return Bounds(replicas, surge, unavailable)


def plan_rolling_update(new: ReplicaCount, old: Sequence[ReplicaCount], bounds: Bounds) -> dict[str, int]:
    """Return the ReplicaSets that change size now, and to what. Empty when all there is to do is wait.

    Args:
        old: Every other ReplicaSet of the Deployment, oldest first.
    """
    grown = _new_size(new, old, bounds)
    if grown != new.wanted:
        return {new.name: grown}  # one step at a time: growing first keeps what is available available
    return _shrunk_old(new, old, bounds)


def _new_size(new: ReplicaCount, old: Sequence[ReplicaCount], bounds: Bounds) -> int:
    if new.wanted >= bounds.replicas:
        return bounds.replicas
    # Stricter than upstream, which looks at spec.replicas only: pods that are yet to be deleted take room, too.
    room = bounds.ceiling - new.wanted - sum(max(one.wanted, one.present) for one in old)
    return new.wanted + max(min(room, bounds.replicas - new.wanted), 0)


def _shrunk_old(new: ReplicaCount, old: Sequence[ReplicaCount], bounds: Bounds) -> dict[str, int]:
    sizes = {one.name: one.wanted for one in old}
    # A status may be older than the size it stands beside: no more are available than are wanted.
    available = {one.name: min(one.available, one.wanted) for one in (*old, new)}
    spare = new.wanted + sum(sizes.values()) - bounds.floor - (new.wanted - available[new.name])
    if spare <= 0:
        return {}
    # Pods that do not work go first: they serve nobody, and would hold up an update away from a broken version.
    for one in old:
        gone = min(spare, sizes[one.name] - available[one.name])
        sizes[one.name] -= gone
        spare -= gone
    spare = sum(available.values()) - bounds.floor
    for one in old:
        gone = min(max(spare, 0), sizes[one.name])
        sizes[one.name] -= gone
        spare -= gone
    return {one.name: sizes[one.name] for one in old if sizes[one.name] != one.wanted}


def plan_scaling(active: Sequence[ReplicaCount], bounds: Bounds) -> dict[str, int]:
    """Return new sizes when a Deployment is scaled in the middle of a rollout: each set in proportion to its size.

    Args:
        active: The ReplicaSets with replicas, the one with the most first.
    """
    allowed = bounds.ceiling if bounds.replicas > 0 else 0
    to_add = allowed - sum(one.wanted for one in active)
    added = 0
    sizes: dict[str, int] = {}
    for one in active:
        share = _share(one, bounds)
        share = min(share, to_add - added) if to_add > 0 else max(share, to_add - added)
        if to_add == 0 or (share > 0) != (to_add > 0):
            share = 0
        sizes[one.name] = one.wanted + share
        added += share
    if active and to_add:
        sizes[active[0].name] = max(sizes[active[0].name] + to_add - added, 0)
    return {one.name: sizes[one.name] for one in active if sizes[one.name] != one.wanted}


def _share(one: ReplicaCount, bounds: Bounds) -> int:
    if bounds.replicas == 0:
        return -one.wanted
    before = one.max_replicas or bounds.ceiling
    return int(one.wanted * bounds.ceiling / before + 0.5) - one.wanted
