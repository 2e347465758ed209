"""Metadata of any object: name, namespace, labels, annotations, owners, finalizers; and label selectors.

Source: kubernetes apimachinery/pkg/api/validation/objectmeta.go, apis/meta/v1/validation (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.names import (
    dns1035_label_problems,
    dns1123_label_problems,
    dns1123_subdomain_problems,
    label_value_problems,
    path_segment_problems,
    qualified_name_problems,
)
from testbed.model.objects import Object, Resource

MAX_ANNOTATIONS_BYTES = 256 * 1024
#: Finalizers of metadata that need no domain (core/validation, IsStandardFinalizerName).
_STANDARD_FINALIZERS = frozenset({"kubernetes", "orphan", "foregroundDeletion"})


def _unprintable_problems(name: str) -> list[str]:
    # Upstream allows control characters in RBAC names; here a name may end up on a terminal or in a file.
    return path_segment_problems(name) + ([] if name.isprintable() else ["may not contain control characters"])


def _name_rule(key: str) -> Callable[[str], list[str]]:
    if key == "namespaces":
        return dns1123_label_problems
    if key == "services":
        return dns1035_label_problems
    if key.endswith(".rbac.authorization.k8s.io"):
        return _unprintable_problems
    return dns1123_subdomain_problems


def validate_metadata(resource: Resource | None, metadata: Object, causes: Causes) -> None:
    """Check the metadata of an object of a resource (None: of a kind we do not know)."""
    rule = _name_rule(resource.key if resource else "")
    prefix = metadata.get("generateName", "")
    if prefix:
        # A trailing dash is what the generated part follows; upstream masks it, too (maskTrailingDash).
        causes.invalid_each(
            "metadata.generateName",
            prefix,
            rule(prefix[:-2] + "a" if prefix.endswith("-") and len(prefix) > 1 else prefix),
        )
    name = metadata.get("name", "")
    if not name:
        causes.required("metadata.name", "name or generateName is required")
    else:
        causes.invalid_each("metadata.name", name, rule(name))
    if resource is None or resource.namespaced:
        namespace = metadata.get("namespace", "")
        if namespace:
            causes.invalid_each("metadata.namespace", namespace, dns1123_label_problems(namespace))
    if metadata.get("generation", 0) < 0:
        causes.invalid("metadata.generation", metadata["generation"], "must be greater than or equal to 0")
    validate_labels(metadata.get("labels"), "metadata.labels", causes)
    validate_annotations(metadata.get("annotations"), "metadata.annotations", causes)
    _validate_owners(metadata.get("ownerReferences") or [], causes)
    for index, finalizer in enumerate(metadata.get("finalizers") or []):
        path = f"metadata.finalizers[{index}]"
        causes.invalid_each(path, finalizer, qualified_name_problems(finalizer))
        # only core's validation asks for more than a qualified name, and custom resources are not its own
        is_core = resource is not None and resource.group != "apiextensions.k8s.io"
        if is_core and "/" not in finalizer and finalizer not in _STANDARD_FINALIZERS:
            causes.invalid(path, finalizer, "name is neither a standard finalizer name nor is it fully qualified")


def validate_labels(labels: dict[str, str] | None, path: str, causes: Causes) -> None:
    """Check the keys and values of labels, or of an equality selector."""
    for key, value in sorted((labels or {}).items()):
        causes.invalid_each(path, key, qualified_name_problems(key))
        causes.invalid_each(path, value, label_value_problems(value))


def validate_annotations(annotations: dict[str, str] | None, path: str, causes: Causes) -> None:
    """Check the keys of annotations, and their size altogether."""
    size = 0
    for key, value in sorted((annotations or {}).items()):
        causes.invalid_each(path, key, qualified_name_problems(key.lower()))
        size += len(key.encode()) + len(value.encode())
    if size > MAX_ANNOTATIONS_BYTES:
        causes.too_long(path, MAX_ANNOTATIONS_BYTES)


def _validate_owners(owners: list[Object], causes: Causes) -> None:
    controllers = 0
    for owner in owners:
        path = "metadata.ownerReferences"
        if not owner.get("apiVersion"):
            causes.invalid(f"{path}.apiVersion", owner.get("apiVersion", ""), "version must not be empty")
        for field in ("kind", "name", "uid"):
            if not owner.get(field):
                causes.invalid(f"{path}.{field}", owner.get(field, ""), f"{field} must not be empty")
        controllers += bool(owner.get("controller"))
    if controllers > 1:
        causes.invalid(
            "metadata.ownerReferences",
            [str(owner.get("name")) for owner in owners],
            "Only one reference can have Controller set to true",
        )


def validate_selector(selector: Any, path: str, causes: Causes) -> None:
    """Check a LabelSelector: matchLabels and matchExpressions."""
    validate_labels(selector.get("matchLabels"), f"{path}.matchLabels", causes)
    for index, term in enumerate(selector.get("matchExpressions") or []):
        here = f"{path}.matchExpressions[{index}]"
        operator, values = term.get("operator", ""), term.get("values") or []
        if operator in ("In", "NotIn"):
            if not values:
                causes.required(f"{here}.values", "must be specified when `operator` is 'In' or 'NotIn'")
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                causes.forbidden(f"{here}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
        else:
            causes.invalid(f"{here}.operator", operator, "not a valid selector operator")
        causes.invalid_each(f"{here}.key", term.get("key", ""), qualified_name_problems(term.get("key", "")))
        for number, value in enumerate(values):
            causes.invalid_each(f"{here}.values[{number}]", value, label_value_problems(value))


def selector_matches(selector: Object, labels: dict[str, str]) -> bool:
    """Say whether a LabelSelector matches labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or []:
        key, operator, values = term.get("key", ""), term.get("operator"), term.get("values") or []
        holds = {
            "In": key in labels and labels[key] in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }.get(operator, False)
        if not holds:
            return False
    return True
