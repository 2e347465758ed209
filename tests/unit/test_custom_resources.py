"""CustomResourceDefinitions in the registry: what makes them valid, and what their objects go through."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import copy
from typing import Any

import pytest
from controllers_world import World
from registry_support import make_registry, refusal

from testbed.model.objects import DEFINITIONS, Object
from testbed.registry.structural import default_in_place, prune, unknown_fields

KEY = "eips.example.io"


def definition(**spec: Any) -> Object:
    schema = {
        "type": "object",
        "properties": {
            "spec": {
                "type": "object",
                "required": ["address"],
                "properties": {
                    "address": {"type": "string", "minLength": 3, "maxLength": 9},
                    "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
                    "count": {"type": "integer", "minimum": 1, "nullable": True},
                    "ports": {
                        "type": "array",
                        "maxItems": 2,
                        "items": {
                            "type": "object",
                            "properties": {
                                "port": {"x-kubernetes-int-or-string": True},
                                "on": {"type": "boolean", "default": True},
                            },
                        },
                    },
                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            },
            "status": {"type": "object", "properties": {"usage": {"type": "integer"}}},
        },
    }
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": KEY},
        "spec": {"group": "example.io", "scope": "Namespaced", "names": {"plural": "eips", "kind": "Eip"}, "versions": [version], **spec},
    }  # fmt: skip


def eip(**spec: Any) -> Object:
    return {
        "apiVersion": "example.io/v1",
        "kind": "Eip",
        "metadata": {"name": "x", "namespace": "dev"},
        "spec": {"address": "1.2.3.4", **spec},
    }


def test_a_definition_is_established_in_the_write_that_makes_it() -> None:
    """Status, defaults and finalizer are there at once, and so is the resource."""
    registry = make_registry()
    assert refusal(registry.list, KEY).code == 404
    made = registry.create(DEFINITIONS, definition())
    conditions = {one["type"]: one["status"] for one in made["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}
    assert (made["status"]["storedVersions"], made["spec"]["names"]["listKind"]) == (["v1"], "EipList")
    assert registry.list(KEY) == []
    registry.delete(DEFINITIONS, "", KEY)
    error = refusal(registry.create, KEY, eip())
    assert "definition is terminating" in str(error)


def test_objects_are_pruned_defaulted_and_counted() -> None:
    """Unknown fields go, defaults come, nulls that may not be there go; the status is /status's alone."""
    registry = make_registry()
    registry.create(DEFINITIONS, definition())
    given = eip(foo=1, mode=None, count=None, ports=[{"port": "http", "x": 1}], free={"a": {"b": 1}})
    made = registry.create(KEY, {**given, "status": {"usage": 1}})
    assert made["spec"] == {
        "address": "1.2.3.4",
        "mode": "a",
        "count": None,
        "ports": [{"port": "http", "on": True}],
        "free": {"a": {"b": 1}},
    }
    assert "status" not in made and made["metadata"]["generation"] == 1
    stored = registry.update(
        KEY, {**made, "status": {"usage": 2}, "spec": {"address": "9.9.9.9"}}, subresource="status"
    )
    assert (stored["status"], stored["spec"], stored["metadata"]["generation"]) == ({"usage": 2}, made["spec"], 1)
    changed = registry.patch(KEY, "dev", "x", {"spec": {"mode": "b"}, "status": None})
    assert (changed["status"], changed["metadata"]["generation"]) == ({"usage": 2}, 2)
    assert registry.unknown_fields(KEY, given) == ["spec.foo", "spec.ports[0].x"]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"address": None}, "spec.address: Required value"),
        ({"address": 5}, 'spec.address: Invalid value: "integer": spec.address in body must be of type string: "integer"'),
        ({"address": "12"}, 'spec.address: Invalid value: "12": spec.address in body should be at least 3 chars long'),
        ({"address": "1234567890"}, "spec.address: Too long: may not be longer than 9"),
        ({"mode": "c"}, 'spec.mode: Unsupported value: "c": supported values: "a", "b"'),
        ({"count": 0}, "spec.count: Invalid value: 0: spec.count in body should be greater than or equal to 1"),
        ({"ports": [{"port": True}]}, 'spec.ports[0].port: Invalid value: "boolean": spec.ports[0].port in body must be of type integer,string: "boolean"'),
        ({"ports": [{}, {}, {}]}, "spec.ports: Too many: 3: must have at most 2 items"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_schema(spec: dict[str, Any], problem: str) -> None:
    """422 in the words of the real server; nothing is stored."""
    registry = make_registry()
    registry.create(DEFINITIONS, definition())
    error = refusal(registry.create, KEY, eip(**spec))
    assert (error.code, str(error)) == (422, f'Eip.example.io "x" is invalid: {problem}')
    assert registry.list(KEY) == []


def changed(path: str, value: Any) -> Object:
    """Return a definition with one field changed; ``v.`` stands for its version."""
    obj: Any = copy.deepcopy(definition())
    at: Any = obj["spec"]["versions"][0] if path.startswith("v.") else obj
    *parents, last = path.removeprefix("v.").split(".")
    for part in parents:
        at = at[part]
    at[last] = value
    return obj  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("metadata.name", "x.example.io", 'metadata.name: Invalid value: "x.example.io": must be spec.names.plural+"."+spec.group'),
        ("spec.scope", "Everywhere", 'spec.scope: Unsupported value: "Everywhere"'),
        ("spec.group", "example", 'spec.group: Invalid value: "example": should be a domain with at least one dot'),
        ("spec.names.kind", "", "spec.names.kind: Required value"),
        ("v.storage", False, "must have exactly one version marked as storage version"),
        ("v.schema", {}, "spec.versions[0].schema.openAPIV3Schema: Required value: schemas are required"),
        ("v.schema.openAPIV3Schema", {"properties": {}}, "openAPIV3Schema.type: Required value: must not be empty at the root"),
        ("v.schema.openAPIV3Schema", {"type": "array"}, "must be object at the root"),
        ("v.schema.openAPIV3Schema.properties", {"spec": {}}, "properties[spec].type: Required value: must not be empty for specified object fields"),
        ("v.schema.openAPIV3Schema.properties", {"spec": {"type": "thing"}}, 'properties[spec].type: Unsupported value: "thing"'),
        ("v.schema.openAPIV3Schema.properties", {"spec": {"type": "array"}}, "properties[spec].items: Required value"),
        ("v.subresources", {"scale": {"specReplicasPath": ".status.x", "statusReplicasPath": ".status.x"}}, "should be a json path under .spec"),
        ("v.additionalPrinterColumns", [{"name": "a", "type": "text", "jsonPath": ".a"}], 'additionalPrinterColumns[0].type: Unsupported value: "text"'),
        ("v.additionalPrinterColumns", [{"name": "a", "type": "string", "jsonPath": "a"}], "must start with a dot"),
    ],
)  # fmt: skip
def test_definitions_that_are_wrong(path: str, value: Any, problem: str) -> None:
    """Each is refused with the field, and defines nothing."""
    registry = make_registry()
    error = refusal(registry.create, DEFINITIONS, changed(path, value))
    assert error.code == 422 and problem in str(error)
    assert refusal(registry.list, KEY).code == 404


def test_what_a_definition_may_not_change() -> None:
    """Group, scope and kind are for life; a version that was stored stays."""
    registry = make_registry()
    made = registry.create(DEFINITIONS, definition())
    for spec in ({"scope": "Cluster"}, {"names": {**made["spec"]["names"], "kind": "Other"}}):
        error = refusal(registry.patch, DEFINITIONS, "", KEY, {"spec": spec})
        assert "field is immutable" in str(error)
    version = {**made["spec"]["versions"][0], "name": "v2"}
    assert "was previously a storage version" in str(
        refusal(registry.patch, DEFINITIONS, "", KEY, {"spec": {"versions": [version]}})
    )


def test_several_versions() -> None:
    """An object written in one version is read in the other; it is stored in the storage version, each with its schema."""
    registry = make_registry()
    made = definition()
    old = copy.deepcopy(made["spec"]["versions"][0])
    old |= {"name": "v1beta1", "storage": False}
    old["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["mode"]["default"] = "b"
    made["spec"]["versions"].append(old)
    registry.create(DEFINITIONS, made)
    stored = registry.create(KEY, {**eip(), "apiVersion": "example.io/v1beta1"})
    assert (stored["apiVersion"], stored["spec"]["mode"]) == ("example.io/v1", "b")
    assert [one.version for one in registry.resources.versions(KEY)] == ["v1", "v1beta1"]
    assert refusal(registry.create, KEY, {**eip(), "apiVersion": "example.io/v3"}).code == 400


def test_a_definition_that_changes() -> None:
    """New objects go by the new schema at once; what is stored stays as it is."""
    registry = make_registry()
    made = registry.create(DEFINITIONS, definition())
    before = registry.create(KEY, eip())
    version = copy.deepcopy(made["spec"]["versions"][0])
    version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["more"] = {
        "type": "string",
        "default": "x",
    }
    version["additionalPrinterColumns"] = [{"name": "More", "type": "string", "jsonPath": ".spec.more"}]
    changed_ = registry.patch(DEFINITIONS, "", KEY, {"spec": {"versions": [version]}})
    assert changed_["metadata"]["generation"] == 2
    other = {**eip(), "metadata": {"name": "y", "namespace": "dev"}}
    assert registry.create(KEY, other)["spec"]["more"] == "x"
    assert registry.get(KEY, "dev", "x") == before
    resource = registry.resources.get(KEY)
    assert resource is not None
    defined = registry.customs.version(resource)
    assert defined is not None and [column.name for column in defined.columns] == ["More"]


def test_names_that_are_taken() -> None:
    """A definition whose names another one has is stored and not established."""
    registry = make_registry()
    registry.create(DEFINITIONS, definition())
    other = definition(names={"plural": "others", "singular": "other", "kind": "Eip"})
    other["metadata"]["name"] = "others.example.io"
    made = registry.create(DEFINITIONS, other)
    accepted = next(one for one in made["status"]["conditions"] if one["type"] == "NamesAccepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "KindConflict")
    assert refusal(registry.list, "others.example.io").code == 404


def test_a_definition_takes_its_objects_along() -> None:
    """Deleting it deletes them; a finalizer on one of them holds both."""
    world = World()
    world.create(DEFINITIONS, definition())
    for name, finalizers in (("a", []), ("b", ["example.io/hold"])):
        obj = eip()
        world.create(KEY, {**obj, "metadata": {"name": name, "namespace": "default", "finalizers": finalizers}})
    world.registry.delete(DEFINITIONS, "", KEY)
    world.settle()
    assert [obj["metadata"]["name"] for obj in world.store.list(KEY)] == ["b"]
    world.registry.patch(KEY, "default", "b", {"metadata": {"finalizers": None}})
    world.settle()
    assert (world.store.list(KEY), world.store.list(DEFINITIONS)) == ([], [])
    assert world.registry.resources.get(KEY) is None


def test_a_namespace_takes_custom_objects_along() -> None:
    """They belong to it like any other."""
    world = World()
    world.create("namespaces", {"metadata": {"name": "dev"}})
    world.create(DEFINITIONS, definition())
    world.create(KEY, eip())
    world.registry.delete("namespaces", "", "dev")
    world.settle()
    assert (world.store.list(KEY), world.store.get("namespaces", "", "dev")) == ([], None)


def test_schemas_reach_into_maps_lists_and_embedded_objects() -> None:
    """Pruning and defaulting follow additionalProperties, items and embedded resources."""
    schema = {
        "type": "object",
        "properties": {
            "map": {
                "type": "object",
                "additionalProperties": {"type": "object", "properties": {"a": {"type": "integer", "default": 1}}},
            },
            "raw": {
                "type": "object",
                "x-kubernetes-embedded-resource": True,
                "properties": {"spec": {"type": "object"}},
            },
            "any": {"type": "object", "additionalProperties": True},
        },
    }
    value = {
        "map": {"k": {"b": 2}},
        "raw": {"apiVersion": "v1", "kind": "X", "metadata": {"name": "y"}, "other": 1},
        "any": {"z": 1},
        "kind": "K",
    }
    assert list(unknown_fields(value, schema, is_root=True)) == ["map.k.b", "raw.other"]
    pruned = prune(value, schema, is_root=True)
    default_in_place(pruned, schema)
    assert pruned == {
        "map": {"k": {"a": 1}},
        "raw": {"apiVersion": "v1", "kind": "X", "metadata": {"name": "y"}},
        "any": {"z": 1},
        "kind": "K",
    }
