"""OpenAPI documents, made from the field tables: enough for kubectl's validation, ``edit`` and ``explain``.

kubectl looks for the patch operation of an object's kind and for its ``fieldValidation`` parameter; when it is there, the
server checks fields, not kubectl. The schemas carry the merge keys, because kubectl makes strategic patches from them.
Descriptions are not here: they would be four megabytes of text that is the same in every cluster.
"""

from __future__ import annotations

import hashlib
from typing import Any

from testbed.api.merge_keys import MERGE_KEYS, REPLACED, RETAINED
from testbed.api.patches import accepted_types
from testbed.manifests.kinds.fields import KINDS, STRUCTS
from testbed.model.objects import Object, Resource, ResourceTable
from testbed.registry import Registry

_META = "io.k8s.apimachinery.pkg.apis.meta.v1."
#: A gnostic Document (OpenAPI v2 in protobuf) with swagger, info, and empty paths and definitions: kubectl 1.20 wants one.
V2_PROTOBUF = (
    bytes([10, 3]) + b"2.0" + bytes([18, 16, 10, 10]) + b"Kubernetes" + bytes([18, 2]) + b"v1" + bytes([66, 0, 74, 0])
)
V2_PROTOBUF_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_PLAIN: dict[str, Object] = {
    "string": {"type": "string"},
    "bool": {"type": "boolean"},
    "int32": {"type": "integer", "format": "int32"},
    "int64": {"type": "integer", "format": "int64"},
    "float64": {"type": "number", "format": "double"},
    "IntOrString": {"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]},
    "Quantity": {"oneOf": [{"type": "string"}, {"type": "number"}]},
    "Time": {"type": "string", "format": "date-time"},
    "[]uint8": {"type": "string", "format": "byte"},
    "any": {"x-kubernetes-preserve-unknown-fields": True},
}


def group_version_path(group: str, version: str) -> str:
    return f"apis/{group}/{version}" if group else f"api/{version}"


def index(registry: Registry) -> Object:
    """Return the answer to /openapi/v3."""
    paths: Object = {}
    for resource in registry.resources.all():
        path = group_version_path(resource.group, resource.version)
        if path not in paths:
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={_hash(registry.resources, path)}"}
    return {"paths": paths}


def _hash(table: ResourceTable, path: str) -> str:
    return hashlib.sha256(f"{path} {table.changes}".encode()).hexdigest()[:32].upper()


def document(registry: Registry, group: str, version: str) -> Object | None:
    """Return the document of a group and version, or None."""
    resources = [one for one in registry.resources.all() if (one.group, one.version) == (group, version)]
    if not resources:
        return None
    schemas: Object = {}
    paths: Object = {}
    for resource in resources:
        name = _add_schema(resource, registry, schemas)
        paths |= _paths(resource, name)
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.30.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _add_schema(resource: Resource, registry: Registry, schemas: Object) -> str:
    kind = [_gvk(resource)]
    if resource.is_custom:
        name = f"{'.'.join(reversed(resource.group.split('.')))}.{resource.version}.{resource.kind}"
        defined = registry.customs.version(resource)
        schema: Object = dict(defined.schema) if defined else {"type": "object"}
        _add_struct("ObjectMeta", schemas)
        properties = {
            **(schema.get("properties") or {}),
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"allOf": [_reference("ObjectMeta")]},
        }
        schemas[name] = {**schema, "properties": properties, "x-kubernetes-group-version-kind": kind}
        return name
    struct = KINDS[resource.key]
    _add_struct(struct, schemas)
    name = _schema_name(struct)
    schemas[name] = {**schemas[name], "x-kubernetes-group-version-kind": kind}
    return name


def _schema_name(struct: str) -> str:
    return _META + struct if struct == "ObjectMeta" else f"io.k8s.api.{struct}"


def _reference(struct: str) -> Object:
    return {"$ref": f"#/components/schemas/{_schema_name(struct)}"}


def _add_struct(struct: str, schemas: Object) -> None:
    todo = [struct]
    while todo:
        one = todo.pop()
        name = _schema_name(one)
        if name in schemas:
            continue
        properties = {}
        for field, type_ in STRUCTS[one].items():
            schema, inner = _type_schema(type_)
            properties[field] = schema | _strategy(one, field)
            if inner:
                todo.append(inner)
        schemas[name] = {"type": "object", "properties": properties}


def _strategy(struct: str, field: str) -> Object:
    key = MERGE_KEYS.get(struct, {}).get(field)
    strategies = [] if key is None else ["merge"]
    if (struct, field) in RETAINED:
        strategies.append("retainKeys")
    if (struct, field) in REPLACED:
        strategies.append("replace")
    extension: Object = {"x-kubernetes-patch-strategy": ",".join(strategies)} if strategies else {}
    return extension | ({"x-kubernetes-patch-merge-key": key} if key else {})


def _type_schema(type_: str) -> tuple[dict[str, Any], str]:
    """Return the schema of a field's type, and the struct that it mentions."""
    if type_ in _PLAIN:
        return dict(_PLAIN[type_]), ""
    if type_.startswith("[]"):
        inner, struct = _type_schema(type_[2:])
        return {"type": "array", "items": inner}, struct
    if type_.startswith("map[string]"):
        inner, struct = _type_schema(type_[11:])
        return {"type": "object", "additionalProperties": inner}, struct
    struct = type_.removeprefix("v1.")
    return {"allOf": [_reference(struct)]}, struct


def _paths(resource: Resource, schema: str) -> Object:
    base = f"/{group_version_path(resource.group, resource.version)}"
    scope = "/namespaces/{namespace}" if resource.namespaced else ""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    ok = {"200": {"description": "OK", "content": content}}

    def operation(action: str, **more: Any) -> Object:
        return {
            "responses": ok,
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": _gvk(resource),
            "parameters": [_parameter("dryRun"), _parameter("fieldManager"), _parameter("fieldValidation")],
            **more,
        }

    patch_body = {
        "requestBody": {"content": {type_: {"schema": {"type": "object"}} for type_ in accepted_types(resource)}}
    }
    body = {"requestBody": {"content": content}}
    return {
        f"{base}{scope}/{resource.plural}": {"get": operation("list"), "post": operation("post", **body)},
        f"{base}{scope}/{resource.plural}/{{name}}": {
            "get": operation("get"),
            "put": operation("put", **body),
            "patch": operation("patch", **patch_body),
            "delete": operation("delete"),
        },
    }


def _parameter(name: str) -> Object:
    return {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
