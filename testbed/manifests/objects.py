"""Kubernetes manifests: YAML files to objects, each checked as far as that goes without a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import Cause, ManifestError, Problem
from testbed.manifests.kinds import validate_object
from testbed.manifests.kinds.causes import go_quote
from testbed.manifests.kinds.fields import KINDS
from testbed.manifests.kinds.service import TYPES
from testbed.manifests.source import (
    Document,
    FieldPath,
    Lines,
    find_line,
    line_at,
    lines_at,
    parse_documents,
    read_text,
)
from testbed.manifests.text import describe_value, format_path, suggestion
from testbed.manifests.typecheck import fit_object
from testbed.model.objects import BY_KIND, Object, Resource, matches_labels

# Whose ``spec.template`` makes pods, called NAME-something.
WORKLOADS = frozenset({"Deployment", "ReplicaSet", "DaemonSet", "StatefulSet", "Job", "ReplicationController"})


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object, and where it was written."""

    object: Object
    file: str
    line: int
    lines: Lines

    @property
    def kind(self) -> str:
        return str(self.object["kind"])

    @property
    def namespace(self) -> str:
        """The namespace it goes to: ``default`` when it names none; '' for kinds known to have none."""
        resource = BY_KIND.get((self.object["apiVersion"], self.kind))
        if resource is not None and not resource.namespaced:
            return ""
        return str(self.object["metadata"].get("namespace") or "default")

    @property
    def name(self) -> str:
        """Its name, or the beginning of a generated one."""
        return str(self.object["metadata"].get("name") or self.object["metadata"].get("generateName") or "")

    @property
    def labels(self) -> dict[str, str]:
        return _labels(self.object)

    @property
    def pod_labels(self) -> dict[str, str] | None:
        """The labels of the pods that come from it; None when it makes no pods."""
        if self.kind == "Pod":
            return _labels(self.object)
        if self.kind not in WORKLOADS:
            return None
        spec = self.object.get("spec")
        template = spec.get("template") if isinstance(spec, dict) else None
        return _labels(template) if isinstance(template, dict) else {}

    def line_of(self, field: str) -> int:
        """Return the line of a field such as ``spec.ports[0].nodePort``, or of the nearest thing around it."""
        return find_line(self.lines, field)


def _labels(obj: Object) -> dict[str, str]:
    metadata = obj.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return labels if isinstance(labels, dict) else {}


def load_objects(path: Path) -> list[SourceObject]:
    """Return the objects of a file in order; Lists are taken apart.

    Raises:
        ManifestError: every problem of the file.
    """
    objects, problems = read_objects_file(path)
    if any(not problem.warning for problem in problems):
        raise ManifestError(problems)
    return objects


def read_objects_file(path: Path) -> tuple[list[SourceObject], list[Problem]]:
    """Return the objects of a file that can be used, and everything wrong with it."""
    text, problems = read_text(path)
    documents, syntax = parse_documents(text, str(path))
    objects, found = read_objects(documents)
    return objects, [*problems, *syntax, *found]


def read_objects(documents: Sequence[Document]) -> tuple[list[SourceObject], list[Problem]]:
    """Return the objects of some documents that can be used, and everything wrong with them."""
    objects: list[SourceObject] = []
    problems: list[Problem] = []
    for document in documents:
        for value, lines in _flatten(document.value, document.lines):
            usable, found = _check_object(value, lines, document.file)
            problems += found
            if _is_shaped(value):
                objects.append(SourceObject(usable, document.file, lines[0], lines))
    return objects, problems


def _flatten(value: Any, lines: Lines) -> list[tuple[Any, Lines]]:
    """Take a List (``kind: List``, ``ServiceList`` …) apart, also when Lists are in it."""
    inner = lines[1]
    if not (isinstance(value, dict) and isinstance(inner, dict) and str(value.get("kind", "")).endswith("List")):
        return [(value, lines)]
    items, item_lines = value.get("items"), inner["items"][1] if "items" in inner else None
    if not isinstance(items, list) or not isinstance(item_lines, list):
        return [(value, lines)]
    return [found for item, lines_of_it in zip(items, item_lines, strict=True) for found in _flatten(item, lines_of_it)]


def _is_shaped(value: Any) -> bool:
    """Say whether a value has what every object has, so that its other parts can be looked at."""
    if not isinstance(value, dict):
        return False
    metadata = value.get("metadata")
    texts = (
        value.get("apiVersion"),
        value.get("kind"),
        isinstance(metadata, dict) and (metadata.get("name") or metadata.get("generateName")),
    )
    return all(isinstance(text, str) and text for text in texts)


def _check_object(value: Any, lines: Lines, file: str) -> tuple[Object, list[Problem]]:
    """Return what of an object can be read, and every problem of it. What cannot be read hides nothing else."""
    if not isinstance(value, dict):
        return {}, [Problem(file, lines[0], f"wants a Kubernetes object, got {describe_value(value)}")]
    found = _head_problems(value)
    kind = value.get("kind")
    if str(value.get("apiVersion")).startswith("testbed/") and not found:
        message = f"a {kind} of the testbed is not an object of the cluster"
        return value, [Problem(file, line_at(lines, ("kind",)), message)]
    found += _name_problems(value.get("metadata"))
    resource = _resource_of(value)
    fitting, misfits = fit_object(value, KINDS.get(resource.key) if resource is not None else None)
    unread = [path for path, _ in found] + [misfit.unread for misfit in misfits]
    found += [(misfit.path, misfit.message) for misfit in misfits if (misfit.path, misfit.message) not in found]
    problems = [Problem(file, line_at(lines, path), message) for path, message in found]
    if resource is None and not isinstance(kind, str):
        unread.append(("metadata", "name"))  # which names are valid depends on the kind
    for cause in _readable_causes(fitting, resource, unread):
        path, message = _place(cause, fitting)
        problems.append(Problem(file, _line_of_cause(lines, path, cause), message))
    return fitting, problems


def _head_problems(value: dict[str, Any]) -> list[tuple[FieldPath, str]]:
    """What every object needs before its kind is known."""
    found: list[tuple[FieldPath, str]] = []
    for field in ("apiVersion", "kind"):
        text = value.get(field)
        if text is None:
            found.append(((), f'required field "{field}" is missing'))
        elif not isinstance(text, str) or not text:
            found.append(((field,), f"{field}: wants text, got {describe_value(text)}"))
    if found:
        return found
    api_version, kind = value["apiVersion"], value["kind"]
    if (api_version, kind) not in BY_KIND and kind not in KINDS.values():
        kinds = [known for version, known in BY_KIND if version == api_version]
        if hint := suggestion(kind, kinds, cutoff=0.8):
            found.append((("kind",), f'no kind "{kind}" in version "{api_version}"{hint}'))
    return found


def _resource_of(value: dict[str, Any]) -> Resource | None:
    """Return an object's resource, also when its apiVersion is unreadable and only one group has the kind."""
    api_version, kind = value.get("apiVersion"), value.get("kind")
    if isinstance(api_version, str) and api_version:
        return BY_KIND.get((api_version, str(kind)))
    candidates = [resource for (_, name), resource in BY_KIND.items() if name == kind]
    return candidates[0] if len(candidates) == 1 else None


def _readable_causes(fitting: dict[str, Any], resource: Resource | None, unread: Sequence[FieldPath]) -> list[Cause]:
    """Return the problems of what could be read, without those that only come from what could not."""
    head = {"apiVersion": resource.api_version, "kind": resource.kind} if resource is not None else {}
    base = {**fitting, **head, "metadata": fitting.get("metadata") or {}}
    causes = validate_object(base)
    unread_texts = {text.lower() for path in unread if path for text in _spellings(path)}
    if base.get("kind") == "Service" and ("spec", "type") in unread:
        # A problem is one only if it is one whatever type was meant.
        others = [set(validate_object({**base, "spec": {**base["spec"], "type": type_}})) for type_ in TYPES]
        causes = [cause for cause in causes if all(cause in other for other in others)]
    if base["metadata"].get("generateName"):
        unread_texts.add("metadata.name")  # the API makes it
    return [
        cause
        for cause in causes
        if not _rests_on(cause.field.lower(), unread_texts) or any(_is_about_key(cause, path) for path in unread)
    ]


def _is_about_key(cause: Cause, path: FieldPath) -> bool:
    """Say whether a cause is about the last key of a path, and not about the value there."""
    if not path or isinstance(path[-1], int) or not cause.message.startswith(f"Invalid value: {go_quote(path[-1])}: "):
        return False
    return cause.field in (f"{format_path(path[:-1])}[{path[-1]}]", format_path(path[:-1]))


def _spellings(path: FieldPath) -> set[str]:
    """How a field may be written in a cause."""
    plain = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]
    return {plain, format_path(path), f"{format_path(path[:-1])}[{path[-1]}]"}


#: (cause, what it is concluded from): with that unread, nothing can be concluded
_CONCLUSIONS = (
    (r"spec\.template\.metadata\.labels", ("spec.selector", "spec.template.metadata.labels")),
    (r"(.*)\.(?:initcontainers|containers)\[\d+\]\.volumemounts\[\d+\]\.name", (r"\1.volumes",)),
    (r"spec\.clusterips.*", ("spec.clusterip",)),
    (r"spec\.clusterip", ("spec.clusterips",)),
)


def _rests_on(field: str, unread: set[str]) -> bool:
    if any(field == text or field.startswith((f"{text}.", f"{text}[")) for text in unread):
        return True
    for pattern, sources in _CONCLUSIONS:
        match = re.fullmatch(pattern, field)
        if match and any(text.startswith(match.expand(source)) for source in sources for text in unread):
            return True
    return False


def _place(cause: Cause, value: Any) -> tuple[str, str]:
    """Return where a cause points to in the file, and its text. A size that is told of no field is its largest value's."""
    if cause.reason == "FieldValueTooLong" and not cause.field:
        field = format_path(_longest(value, ())[1])
        return field, f"{field}: {cause.message}"
    field = cause.field
    for upstream, written in (
        ("spec.LoadBalancerS", "spec.loadBalancerS"),
        ("template.labels", "template.metadata.labels"),
    ):
        field = field.replace(upstream, written)
    return field, str(cause) if cause.field else cause.message


def _longest(value: Any, path: FieldPath) -> tuple[int, FieldPath]:
    if isinstance(value, str):
        return len(value), path
    steps: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return max((_longest(inner, (*path, step)) for step, inner in steps), default=(0, path), key=lambda one: one[0])


def _line_of_cause(lines: Lines, field: str, cause: Cause) -> int:
    """Return a cause's line; where it names a whole mapping for one key in it, as for labels, the line of the key."""
    found = lines_at(lines, field)
    if isinstance(found[1], dict):
        for key, inner in found[1].items():
            if cause.message.startswith(f"Invalid value: {go_quote(key)}: "):
                return int(inner[0])
    return found[0]


def _name_problems(metadata: Any) -> list[tuple[FieldPath, str]]:
    """The rules for names of every kind: they become path segments. Kinds that we know have more rules."""
    if metadata is None:
        return [(("metadata",), 'required field "metadata" is missing')]
    if not isinstance(metadata, dict):
        return []  # its type is told with all the others
    found: list[tuple[FieldPath, str]] = []
    if metadata.get("name") is None and metadata.get("generateName") is None:
        found.append((("metadata", "name"), 'metadata: required field "name" is missing'))
    for field in ("name", "generateName", "namespace"):
        text = metadata.get(field)
        if not isinstance(text, str):
            continue
        if text in ("", ".", "..") or not re.fullmatch(r"[A-Za-z0-9:._-]{1,253}", text):
            found.append((("metadata", field), f"metadata.{field}: {text!r} is not a valid name"))
    return found


def repeated_objects(objects: Sequence[SourceObject]) -> list[Problem]:
    """Return a warning for each object that its own file has had before: applied, the later one wins."""
    problems = []
    first: dict[tuple[str, str, str, str, str], SourceObject] = {}
    for source in objects:
        group = str(source.object["apiVersion"]).rpartition("/")[0]
        if not source.object["metadata"].get("name"):
            continue  # each gets a name of its own
        known = first.setdefault((source.file, group, source.kind, source.namespace, source.name), source)
        if known is not source:
            name = f"{source.namespace}/{source.name}" if source.namespace else source.name
            message = (
                f"{source.kind} {name} is defined twice in this file, first in line {known.line}: the later one wins"
            )
            problems.append(Problem(source.file, source.line, message, True))
    return problems


def unmatched_selectors(objects: Sequence[SourceObject]) -> list[Problem]:
    """Return a warning for each Service whose selector fits no pod that these objects make."""
    problems = []
    for service in objects:
        spec = service.object.get("spec")
        is_service = service.kind == "Service" and service.object["apiVersion"] == "v1"
        selector = spec.get("selector") if is_service and isinstance(spec, dict) else None
        if not isinstance(selector, dict) or not selector:
            continue
        candidates = [
            other for other in objects if other.pod_labels is not None and other.namespace == service.namespace
        ]
        if any(matches_labels(selector, other.pod_labels or {}) for other in candidates):
            continue
        shown = ",".join(f"{key}={value}" for key, value in selector.items())
        reason = f"Service {service.namespace}/{service.name}: selector {shown!r} matches no pod of these manifests"
        problems.append(Problem(service.file, service.line_of("spec.selector"), f"spec.selector: {reason}", True))
    return problems
