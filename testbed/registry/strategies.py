"""What a kind adds to creating, updating and deleting. Upstream calls this a strategy, too (pkg/registry)."""

from __future__ import annotations

from collections.abc import Callable

from testbed.errors import Cause
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, Resource
from testbed.store import Store


def keep() -> None:
    """Undo nothing: nothing was allocated."""


class Strategy:
    """The rules that all kinds share; a kind with more has a class below."""

    def __init__(self, resource: Resource, store: Store, config: ClusterConfig, pick: Callable[[int], int]) -> None:
        self.resource = resource
        self.store = store
        self.config = config
        self.pick = pick

    def prepare_for_create(self, new: Object) -> None:
        """Clear and set the fields that are not the client's to write."""

    def prepare_for_update(self, old: Object, new: Object) -> None:
        """Keep the fields that are not the client's to write."""
        if "status" in self.resource.subresources:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]

    def validate_create(self, new: Object) -> list[Cause]:
        """Return problems that only show against the rest of the cluster."""
        return []

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        """Return problems of the step from old to new."""
        return []

    def allocate(self, old: Object | None, new: Object) -> Callable[[], None]:
        """Take addresses and ports for ``new``, all or none; return what undoes it."""
        return keep

    def release(self, last: Object) -> None:
        """Give back what a removed object held."""


STRATEGIES: dict[str, type[Strategy]] = {}
