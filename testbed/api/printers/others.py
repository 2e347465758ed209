"""Tables of roles, leases, webhooks and classes; of custom resources; and of kinds that have no table of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from testbed.api.printers.cells import AGE, NAME, Column, Printer, age, columns, name_of, seconds, since, spec_of
from testbed.api.printers.jsonpath import find_path
from testbed.model.objects import Object
from testbed.registry.definitions import PrinterColumn


def _created(obj: Object) -> str:
    return str(obj["metadata"].get("creationTimestamp", ""))


def _binding(obj: Object, now: float) -> list[Any]:
    role = obj.get("roleRef") or {}
    subjects: dict[str, list[str]] = {"User": [], "Group": [], "ServiceAccount": []}
    for subject in obj.get("subjects") or ():
        name = subject.get("name", "")
        shown = f"{subject.get('namespace', '')}/{name}" if subject.get("kind") == "ServiceAccount" else name
        subjects.setdefault(subject.get("kind", ""), []).append(shown)
    return [
        name_of(obj), f"{role.get('kind', '')}/{role.get('name', '')}", age(obj, now),
        *(", ".join(subjects[kind]) for kind in ("User", "Group", "ServiceAccount")),
    ]  # fmt: skip


def _storage_class(obj: Object, now: float) -> list[Any]:
    default = (obj["metadata"].get("annotations") or {}).get("storageclass.kubernetes.io/is-default-class") == "true"
    return [
        f"{name_of(obj)} (default)" if default else name_of(obj),
        obj.get("provisioner", ""),
        obj.get("reclaimPolicy", "Delete"),
        obj.get("volumeBindingMode", "Immediate"),
        bool(obj.get("allowVolumeExpansion")),
        age(obj, now),
    ]


def _webhooks(obj: Object, now: float) -> list[Any]:
    return [name_of(obj), len(obj.get("webhooks") or ()), age(obj, now)]


_BINDING = Printer(columns(NAME, "Role", AGE, "!Users", "!Groups", "!ServiceAccounts"), _binding)
_WEBHOOKS = Printer(columns(NAME, "#Webhooks", AGE), _webhooks)
# RBAC roles, limit ranges and definitions are listed with the time of their creation (rest.DefaultTableConvertor).
_CREATED_AT = Printer(columns(NAME, Column("Created At", type="date")), lambda obj, now: [name_of(obj), _created(obj)])

PRINTERS: dict[str, Printer] = {
    "rolebindings.rbac.authorization.k8s.io": _BINDING,
    "clusterrolebindings.rbac.authorization.k8s.io": _BINDING,
    "validatingwebhookconfigurations.admissionregistration.k8s.io": _WEBHOOKS,
    "mutatingwebhookconfigurations.admissionregistration.k8s.io": _WEBHOOKS,
    "leases.coordination.k8s.io": Printer(
        columns(NAME, "Holder", AGE), lambda obj, now: [name_of(obj), spec_of(obj).get("holderIdentity", ""), age(obj, now)]
    ),
    "storageclasses.storage.k8s.io": Printer(
        columns(NAME, "Provisioner", "ReclaimPolicy", "VolumeBindingMode", "AllowVolumeExpansion", AGE), _storage_class
    ),
    "priorityclasses.scheduling.k8s.io": Printer(
        columns(NAME, "#Value", "Global-Default", AGE, "PreemptionPolicy"),
        lambda obj, now: [
            name_of(obj), obj.get("value", 0), bool(obj.get("globalDefault")), age(obj, now),
            obj.get("preemptionPolicy", "PreemptLowerPriority"),
        ],
    ),
    "runtimeclasses.node.k8s.io": Printer(
        columns(NAME, "Handler", AGE), lambda obj, now: [name_of(obj), obj.get("handler", ""), age(obj, now)]
    ),
}  # fmt: skip


def default_printer() -> Printer:
    """Return the printer of kinds without columns of their own."""
    return _CREATED_AT


def custom_printer(defined: tuple[PrinterColumn, ...]) -> Printer:
    """Return the printer of a custom resource: its own columns, or the age.

    Source: apiextensions-apiserver pkg/registry/customresource/tableconvertor (v1.30).
    """
    if not defined:
        return Printer(columns(NAME, AGE), lambda obj, now: [name_of(obj), age(obj, now)])
    described = tuple(
        Column(
            column.name,
            type=column.type,
            format=column.format,
            description=column.description or f"Custom resource definition column (in JSONPath format): {column.path}",
            priority=column.priority,
        )
        for column in defined
    )
    readers = [(_cell_for(column.type), column.path) for column in defined]

    def cells(obj: Object, now: float) -> list[Any]:
        return [name_of(obj), *(cell(find_path(obj, path), now) for cell, path in readers)]

    return Printer((NAME, *described), cells)


def _cell_for(type_: str) -> Callable[[list[Any], float], Any]:
    """Return what makes a cell from what a path found: nothing is a null, which kubectl prints as a blank."""

    def cell(found: list[Any], now: float) -> Any:
        if not found:
            return None
        value = found[0]
        match type_:
            case "integer":
                return value if type(value) is int else int(value) if type(value) is float else None
            case "number":
                return value if type(value) in (int, float) else None
            case "boolean":
                return value if type(value) is bool else None
            case "date":
                return since(value, now) if isinstance(value, str) and seconds(value) is not None else "<invalid>"
        if len(found) > 1 or isinstance(value, (dict, list)):
            return _text(found if len(found) > 1 else value)
        return _text(value)

    return cell


def _text(value: Any) -> str:
    import json

    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
