"""What a client wants to see of objects: as they are, as rows of a Table, or their metadata alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

from testbed.api.printers import PRINTERS, Column, Printer, custom_printer, default_printer
from testbed.errors import ApiError
from testbed.model.objects import Object, Resource
from testbed.registry import Registry

Form = Literal["object", "table", "metadata"]
_META = "meta.k8s.io"


@dataclass(frozen=True, slots=True)
class Shown:
    """The form of an answer; ``rows`` says what a Table's rows carry: Metadata, Object or None."""

    form: Form = "object"
    version: str = "v1"
    rows: str = "Metadata"


AS_IT_IS = Shown()


def wanted_form(request: web.Request) -> Shown:
    """Return the first form in the Accept header that we have.

    Raises:
        ApiError: 406 when there is none.
    """
    accept = request.headers.get("Accept", "")
    if accept in ("", "*/*", "application/json"):
        return AS_IT_IS
    for entry in accept.split(","):
        media_type, *parameters = [part.strip() for part in entry.split(";")]
        if media_type in ("*/*", "application/*"):
            return AS_IT_IS
        if media_type != "application/json":
            continue
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        form = given.get("as", "")
        if not form:
            return AS_IT_IS
        if given.get("g") != _META or given.get("v") not in ("v1", "v1beta1"):
            continue
        if form == "Table":
            return Shown("table", given["v"], _included(request))
        if form in ("PartialObjectMetadata", "PartialObjectMetadataList"):
            return Shown("metadata", given["v"])
    raise ApiError(406, "NotAcceptable", "only the following media types are accepted: application/json")


def _included(request: web.Request) -> str:
    policy = request.query.get("includeObject") or "Metadata"
    if policy not in ("None", "Metadata", "Object"):
        raise ApiError(400, "BadRequest", f'unrecognized includeObject value: "{policy}"')
    return policy


def partial_metadata(obj: Object, version: str = "v1") -> Object:
    """Return an object with its metadata alone."""
    return {"kind": "PartialObjectMetadata", "apiVersion": f"{_META}/{version}", "metadata": obj["metadata"]}


class Tables:
    """Makes Tables; ``now_s`` is the time in seconds since 1970, for ages."""

    def __init__(self, registry: Registry, now_s: Callable[[], float]) -> None:
        self._registry = registry
        self._now_s = now_s

    def table(
        self, resource: Resource, objects: Sequence[Object], shown: Shown, metadata: Object, *, headers: bool = True
    ) -> Object:
        """Return a Table with a row for each object."""
        printer = self._printer(resource)
        now = self._now_s()
        rows = [{"cells": printer.cells(obj, now), **_row_object(obj, shown)} for obj in objects]
        return {
            "kind": "Table",
            "apiVersion": f"{_META}/{shown.version}",
            "metadata": metadata,
            "columnDefinitions": [_definition(column) for column in printer.columns] if headers else None,
            "rows": rows,
        }

    def watch_table(self, resource: Resource, shown: Shown) -> Callable[[Object], Object]:
        """Return what makes one Table of each event of a watch; only the first has the columns."""
        first = True

        def render(obj: Object) -> Object:
            nonlocal first
            metadata = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            if "uid" not in obj["metadata"]:  # a bookmark
                metadata = obj["metadata"]
                table = self.table(resource, [], shown, metadata, headers=first)
                table["rows"] = [{"cells": [], "object": obj}]
            else:
                table = self.table(resource, [obj], shown, metadata, headers=first)
            first = False
            return table

        return render

    def _printer(self, resource: Resource) -> Printer:
        if resource.is_custom:
            defined = self._registry.customs.version(resource)
            return custom_printer(defined.columns if defined else ())
        return PRINTERS.get(resource.key) or default_printer()


def _row_object(obj: Object, shown: Shown) -> Object:
    if shown.rows == "None":
        return {}
    return {"object": obj if shown.rows == "Object" else partial_metadata(obj, shown.version)}


def _definition(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "type": column.type,
        "format": column.format,
        "description": column.description,
        "priority": column.priority,
    }
