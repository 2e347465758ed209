"""Custom resources: their strategy, and the table that follows the stored definitions."""

from __future__ import annotations

from collections.abc import Callable

from testbed.errors import ApiError, Cause
from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.schema import decode_object
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, Resource, ResourceTable
from testbed.registry.definitions import DefinedVersion, versions_of
from testbed.registry.errors import undecodable
from testbed.registry.strategies import Strategy
from testbed.registry.structural import SchemaValidator, default_in_place, prune, unknown_fields
from testbed.store import Event, EventType


class CustomStrategy(Strategy):
    """The rules of one custom resource: those of the version that a request speaks."""

    has_generation = True

    def __init__(
        self, resource: Resource, config: ClusterConfig, pick: Callable[[int], int], versions: tuple[DefinedVersion, ...]
    ) -> None:  # fmt: skip
        super().__init__(resource, config, pick)
        self.versions = {one.resource.version: one for one in versions}
        self._validators: dict[str, SchemaValidator] = {}

    def accepts(self, api_version: str) -> bool:
        group, _, version = api_version.partition("/")
        return group == self.resource.group and version in self.versions

    def decode(self, obj: Object) -> tuple[Object, list[str]]:
        version = self._version_of(obj)
        new, problems = decode_object(obj)
        metadata = new["metadata"]
        pruned: Object = prune({**new, "metadata": {}}, version.schema, is_root=True)
        return {**pruned, "metadata": metadata}, problems

    def default(self, new: Object) -> None:
        default_in_place(new, self._version_of(new).schema)

    def unknown_fields(self, obj: Object) -> list[str]:
        return list(unknown_fields(obj, self._version_of(obj).schema, is_root=True))

    def validate(self, new: Object) -> list[Cause]:
        causes = Causes(super().validate(new))
        version = self._version_of(new)
        name = version.resource.version
        if name not in self._validators:
            self._validators[name] = SchemaValidator(version.schema)
        causes.extend(self._validators[name].causes(new))
        return causes

    def validate_status(self, new: Object) -> list[Cause]:
        return self.validate(new)

    def prepare_for_create(self, new: Object) -> None:
        if "status" in self._version_of(new).resource.subresources:
            new.pop("status", None)
        new["metadata"]["generation"] = 1

    def prepare_for_update(self, old: Object, new: Object) -> None:
        if "status" in self._version_of(new).resource.subresources:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]

    def settle_generation(self, old: Object, new: Object) -> None:
        ignored = {"metadata", "apiVersion"}
        if "status" in self._version_of(new).resource.subresources:
            ignored.add("status")
        before, after = ({k: v for k, v in obj.items() if k not in ignored} for obj in (old, new))
        if before != after:
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def _version_of(self, obj: Object) -> DefinedVersion:
        version = str(obj["apiVersion"]).rpartition("/")[2]
        if version not in self.versions:
            raise undecodable(self.resource, f'no version "{version}" is defined')
        return self.versions[version]


class CustomResources:
    """Keeps a registry's table and strategies in step with the stored definitions; subscribed to them."""

    def __init__(
        self, table: ResourceTable, strategies: dict[str, Strategy], config: ClusterConfig, pick: Callable[[int], int]
    ) -> None:
        self._table = table
        self._strategies = strategies
        self._config = config
        self._pick = pick

    def definition_changed(self, event: Event) -> None:
        """Add, replace or remove what a definition defines."""
        key = event.key.name
        if event.type is EventType.DELETED:
            self._table.remove(key)
            self._strategies.pop(key, None)
            return
        if not _is_established(event.object):
            return
        if event.previous is not None and event.previous["spec"] == event.object["spec"] and self._table.get(key):
            return
        versions = versions_of(event.object)
        stored = next(one for one in versions if one.storage)
        self._table.add(stored.resource, [one.resource for one in versions if one.served])
        self._strategies[key] = CustomStrategy(stored.resource, self._config, self._pick, versions)

    def version(self, resource: Resource) -> DefinedVersion | None:
        """Return what is defined for a custom resource in a version."""
        strategy = self._strategies.get(resource.key)
        return strategy.versions.get(resource.version) if isinstance(strategy, CustomStrategy) else None


def _is_established(definition: Object) -> bool:
    conditions = (definition.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)


def being_deleted(resource: Resource) -> ApiError:
    """Return the refusal of new objects while their definition is being deleted."""
    text = f"create not allowed while custom resource definition is terminating: {resource.key}"
    return ApiError(405, "MethodNotAllowed", text)
