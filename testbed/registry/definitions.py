"""CustomResourceDefinitions: what makes them valid, their status, and the resources that follow from them.

Source: apiextensions-apiserver pkg/apis/apiextensions/{v1/defaults.go,validation}, pkg/controller/status (v1.30).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from testbed.errors import Cause
from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.names import dns1035_label_problems, dns1123_subdomain_problems
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import BY_KEY, DEFINITIONS, Object, Resource, ResourceTable
from testbed.registry.strategies import Strategy
from testbed.registry.structural import Schema

CLEANUP_FINALIZER = "customresourcecleanup.apiextensions.k8s.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrinterColumn:
    """A column of kubectl's output; ``path`` is a JSONPath such as ``.spec.replicas``."""

    name: str
    type: str
    path: str
    description: str = ""
    format: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinedVersion:
    """One version of a custom resource."""

    resource: Resource
    schema: Schema
    columns: tuple[PrinterColumn, ...]
    served: bool
    storage: bool
    deprecation: str = ""  # the warning that each answer carries


def versions_of(definition: Object) -> tuple[DefinedVersion, ...]:
    """Return the versions of a valid definition, in order of preference."""
    spec = definition["spec"]
    names = spec["names"]
    found = []
    for version in spec["versions"]:
        subresources = version.get("subresources") or {}
        scale = subresources.get("scale")
        resource = Resource(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            kind=names["kind"],
            namespaced=spec["scope"] == "Namespaced",
            short_names=tuple(names.get("shortNames") or ()),
            categories=tuple(names.get("categories") or ()),
            subresources=tuple(name for name in ("status", "scale") if name in subresources),
            singular=names.get("singular", ""),
            list_kind=names.get("listKind", ""),
            is_custom=True,
            scale_paths=_scale_paths(scale) if scale else ("", "", ""),
        )
        deprecation = ""
        if version.get("deprecated"):
            plain = f"{resource.api_version} {resource.kind} is deprecated"
            deprecation = version.get("deprecationWarning") or plain
        found.append(
            DefinedVersion(
                resource=resource,
                schema=(version.get("schema") or {}).get("openAPIV3Schema") or {},
                columns=tuple(_columns(version)),
                served=bool(version.get("served")),
                storage=bool(version.get("storage")),
                deprecation=deprecation,
            )
        )
    return tuple(sorted(found, key=lambda one: _preference(one.resource.version)))


def _scale_paths(scale: Object) -> tuple[str, str, str]:
    return scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath", "")


def _columns(version: Object) -> Iterator[PrinterColumn]:
    for column in version.get("additionalPrinterColumns") or ():
        yield PrinterColumn(
            name=column["name"],
            type=column["type"],
            path=column["jsonPath"],
            description=column.get("description", ""),
            format=column.get("format", ""),
            priority=column.get("priority", 0),
        )


def _preference(version: str) -> tuple[int, int, int, str]:
    """Return a key that sorts as Kubernetes does: v2, v1, v2beta1, v1beta2, v1alpha1, others by name.

    Source: apimachinery pkg/version/helpers.go.
    """
    parsed = re.fullmatch(r"v([1-9][0-9]*)(?:(alpha|beta)([1-9][0-9]*))?", version)
    if parsed is None:
        return 3, 0, 0, version
    stage = {None: 0, "beta": 1, "alpha": 2}[parsed[2]]
    return stage, -int(parsed[1]), -int(parsed[3] or 0), version


class DefinitionStrategy(Strategy):
    """Definitions are accepted and established in the write that makes them, so that their resources are there at once."""

    has_generation = True

    def __init__(
        self,
        resource: Resource,
        config: ClusterConfig,
        pick: Callable[[int], int],
        table: ResourceTable,
        now: Callable[[], str],
    ) -> None:
        super().__init__(resource, config, pick)
        self._table = table
        self._now = now

    def prepare_for_create(self, new: Object) -> None:
        super().prepare_for_create(new)
        finalizers = new["metadata"].get("finalizers") or []
        new["metadata"]["finalizers"] = [*finalizers, *({CLEANUP_FINALIZER} - set(finalizers))]
        self._settle_status(new, None)

    def prepare_for_update(self, old: Object, new: Object) -> None:
        super().prepare_for_update(old, new)
        self._settle_status(new, old)

    def default(self, new: Object) -> None:
        """Fill in singular, listKind and the conversion strategy."""
        spec = new.get("spec")
        if not isinstance(spec, dict):
            return
        names = spec.get("names")
        if isinstance(names, dict) and isinstance(names.get("kind"), str):
            names["singular"] = names.get("singular") or names["kind"].lower()
            names["listKind"] = names.get("listKind") or f"{names['kind']}List"
        spec["conversion"] = spec.get("conversion") or {"strategy": "None"}

    def _settle_status(self, new: Object, old: Object | None) -> None:
        spec = new.get("spec") or {}
        names, versions = spec.get("names") or {}, spec.get("versions") or []
        was = {one["type"]: one for one in ((old or {}).get("status") or {}).get("conditions") or ()}
        conflict = self._name_conflict(spec)
        accepted = not conflict
        stored = list(((old or {}).get("status") or {}).get("storedVersions") or [])
        stored += [one["name"] for one in versions if one.get("storage") and one.get("name") not in [*stored, None]]
        established = accepted or was.get("Established", {}).get("status") == "True"
        conditions = [
            _condition("NamesAccepted", accepted, *(("NoConflicts", "no conflicts found") if accepted else conflict)),
            _condition("Established", established, *(
                ("InitialNamesAccepted", "the initial names have been accepted") if established
                else ("NotAccepted", "not all names are accepted")
            )),
        ]  # fmt: skip
        for condition in conditions:
            before = was.get(condition["type"], {})
            same = before.get("status") == condition["status"]
            condition["lastTransitionTime"] = before["lastTransitionTime"] if same else self._now()
        others = [one for type_, one in was.items() if type_ not in ("NamesAccepted", "Established")]
        new["status"] = {
            "acceptedNames": names if accepted else ((old or {}).get("status") or {}).get("acceptedNames", {}),
            "conditions": [*conditions, *others],
            "storedVersions": stored,
        }

    def _name_conflict(self, spec: Object) -> tuple[str, str] | tuple[()]:
        """Return reason and message when another resource of the group has one of the names."""
        group, names = spec.get("group"), spec.get("names") or {}
        others = [
            one for one in self._table.all() if one.group == group and one.plural != names.get("plural")
        ]  # fmt: skip
        taken = {name for one in others for name in (one.plural, one.singular_name, *one.short_names)}
        for field, reason in (("plural", "PluralConflict"), ("singular", "SingularConflict")):
            if names.get(field) in taken:
                return reason, f'"{names[field]}" is already in use'
        for name in names.get("shortNames") or ():
            if name in taken:
                return "ShortNamesConflict", f'"{name}" is already in use'
        kinds = {name for one in others for name in (one.kind, one.list_name)}
        for field, reason in (("kind", "KindConflict"), ("listKind", "ListKindConflict")):
            if names.get(field) in kinds:
                return reason, f'"{names[field]}" is already in use'
        return ()

    def validate(self, new: Object) -> list[Cause]:
        causes = Causes(super().validate(new))
        spec = new.get("spec") or {}
        names = spec.get("names") or {}
        group = spec.get("group") or ""
        if not group:
            causes.required("spec.group")
        else:
            causes.invalid_each("spec.group", group, dns1123_subdomain_problems(group))
            if "." not in group:
                causes.invalid("spec.group", group, "should be a domain with at least one dot")
        causes.one_of("spec.scope", spec.get("scope"), ("Cluster", "Namespaced"))
        for field in ("plural", "singular", "kind", "listKind"):
            value = names.get(field) or ""
            if not value:
                causes.required(f"spec.names.{field}")
                continue
            checked = value.lower() if field in ("kind", "listKind") else value
            causes.invalid_each(f"spec.names.{field}", value, dns1035_label_problems(checked))
        for field in ("shortNames", "categories"):
            for index, value in enumerate(names.get(field) or ()):
                causes.invalid_each(f"spec.names.{field}[{index}]", value, dns1035_label_problems(value))
        wanted = f"{names.get('plural', '')}.{group}"
        if new["metadata"].get("name", "") != wanted:
            causes.invalid("metadata.name", new["metadata"].get("name", ""), 'must be spec.names.plural+"."+spec.group')
        if wanted in BY_KEY:
            causes.invalid("metadata.name", wanted, "the resource is part of this cluster already")
        _validate_versions(spec, causes)
        return causes

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes(super().validate_update(old, new))
        was, now = old["spec"], new.get("spec") or {}
        for field, changed in (
            ("group", was.get("group") != now.get("group")),
            ("scope", was.get("scope") != now.get("scope")),
            ("names.kind", was["names"].get("kind") != (now.get("names") or {}).get("kind")),
            ("names.plural", was["names"].get("plural") != (now.get("names") or {}).get("plural")),
        ):
            if changed:
                causes.invalid(f"spec.{field}", _at(now, field), "field is immutable")
        present = [one.get("name") for one in now.get("versions") or ()]
        for index, name in enumerate((old.get("status") or {}).get("storedVersions") or ()):
            if name not in present:
                causes.invalid(
                    f"status.storedVersions[{index}]", name, "missing from spec.versions; "
                    f"{name} was previously a storage version, and must remain in spec.versions until a storage migration "
                    f"ensures no data remains persisted in {name} and removes {name} from status.storedVersions",
                )  # fmt: skip
        return causes


def _at(value: Any, path: str) -> str:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value or "")


def _condition(type_: str, holds: bool, reason: str, message: str) -> Object:
    return {"type": type_, "status": "True" if holds else "False", "reason": reason, "message": message}


def _validate_versions(spec: Object, causes: Causes) -> None:
    versions = spec.get("versions") or []
    if sum(bool(one.get("storage")) for one in versions) != 1:
        shown = [str(one.get("name", "")) for one in versions]
        causes.invalid("spec.versions", shown, "must have exactly one version marked as storage version")
    seen: set[str] = set()
    for index, version in enumerate(versions):
        where = f"spec.versions[{index}]"
        name = version.get("name") or ""
        if not name:
            causes.required(f"{where}.name")
        else:
            causes.invalid_each(f"{where}.name", name, dns1035_label_problems(name))
        if name in seen:
            causes.duplicate(f"{where}.name", name)
        seen.add(name)
        schema = (version.get("schema") or {}).get("openAPIV3Schema")
        if not schema:
            causes.required(f"{where}.schema.openAPIV3Schema", "schemas are required")
        else:
            _validate_schema(schema, f"{where}.schema.openAPIV3Schema", causes, is_root=True)
        scale = (version.get("subresources") or {}).get("scale")
        if scale is not None:
            for field, root in (("specReplicasPath", ".spec"), ("statusReplicasPath", ".status")):
                path = scale.get(field) or ""
                if not path:
                    causes.required(f"{where}.subresources.scale.{field}")
                elif not path.startswith(f"{root}."):
                    causes.invalid(f"{where}.subresources.scale.{field}", path, f"should be a json path under {root}")
        for number, column in enumerate(version.get("additionalPrinterColumns") or ()):
            here = f"{where}.additionalPrinterColumns[{number}]"
            if not column.get("name"):
                causes.required(f"{here}.name")
            types = ("boolean", "date", "integer", "number", "string")
            causes.one_of(f"{here}.type", column.get("type"), types)
            path = column.get("jsonPath") or ""
            if not path:
                causes.required(f"{here}.jsonPath")
            elif not path.startswith((".", "{")):
                causes.invalid(f"{here}.jsonPath", path, "is an invalid path: must start with a dot")


_TYPES = ("array", "boolean", "integer", "number", "object", "string")


def _validate_schema(schema: Any, where: str, causes: Causes, *, is_root: bool = False, logical: bool = False) -> None:
    """Check that a schema is structural: every field has a type, and nothing is there that nobody could follow."""
    if not isinstance(schema, dict):
        causes.invalid(where, str(schema), "must be an object")
        return
    type_ = schema.get("type")
    if not isinstance(type_, str | None):
        causes.invalid(f"{where}.type", str(type_), "must be a string")
        return
    free = schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields")
    if not type_ and not free and not logical:
        why = "must not be empty at the root" if is_root else "must not be empty for specified object fields"
        causes.required(f"{where}.type", why)
    elif is_root and type_ and type_ != "object":
        causes.invalid(f"{where}.type", type_, "must be object at the root")
    elif type_ and type_ not in _TYPES:
        causes.unsupported(f"{where}.type", type_, _TYPES)
    if "$ref" in schema:
        causes.forbidden(f"{where}.$ref", "$ref is not supported")
    properties, required = schema.get("properties") or {}, schema.get("required")
    for field, wanted in (("properties", dict), ("required", list), ("enum", list)):
        if field in schema and not isinstance(schema[field], wanted):
            causes.invalid(
                f"{where}.{field}", str(schema[field]), f"must be {'an object' if wanted is dict else 'a list'}"
            )
            return
    if required is not None and not all(isinstance(name, str) for name in required):
        causes.invalid(f"{where}.required", str(required), "must be a list of names")
    for field in (
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "multipleOf",
        "minProperties",
        "maxProperties",
    ):
        if field in schema and (isinstance(schema[field], bool) or not isinstance(schema[field], (int, float))):
            causes.invalid(f"{where}.{field}", str(schema[field]), "must be a number")
    if "multipleOf" in schema and schema["multipleOf"] == 0:
        causes.invalid(f"{where}.multipleOf", 0, "must be greater than 0")
    if "pattern" in schema and not isinstance(schema["pattern"], str):
        causes.invalid(f"{where}.pattern", str(schema["pattern"]), "must be a string")
    if is_root:
        properties = {
            name: inner for name, inner in properties.items() if name not in ("apiVersion", "kind", "metadata")
        }
    for name, inner in properties.items():
        _validate_schema(inner, f"{where}.properties[{name}]", causes, logical=logical)
    if type_ == "array" and not logical and "items" not in schema:
        causes.required(f"{where}.items", "must be specified")
    if "items" in schema:
        _validate_schema(schema["items"], f"{where}.items", causes, logical=logical)
    additional = schema.get("additionalProperties")
    if additional is not None and not isinstance(additional, bool):
        _validate_schema(additional, f"{where}.additionalProperties", causes, logical=logical)
    for keyword in ("allOf", "anyOf", "oneOf"):
        group = schema.get(keyword) or []
        if not isinstance(group, list):
            causes.invalid(f"{where}.{keyword}", str(group), "must be a list")
            continue
        for index, inner in enumerate(group):
            _validate_schema(inner, f"{where}.{keyword}[{index}]", causes, logical=True)
    if "not" in schema:
        _validate_schema(schema["not"], f"{where}.not", causes, logical=True)


__all__ = ["CLEANUP_FINALIZER", "DEFINITIONS", "DefinedVersion", "DefinitionStrategy", "PrinterColumn", "versions_of"]
