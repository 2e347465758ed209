"""Kubernetes manifests: YAML files to objects, each checked as far as that goes without a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import ManifestError, Problem
from testbed.manifests.kinds import validate_object
from testbed.manifests.kinds.fields import KINDS
from testbed.manifests.source import Document, Lines, find_line, parse_documents, read_text
from testbed.manifests.text import describe_value, suggestion
from testbed.manifests.typecheck import find_misfits
from testbed.model.objects import BY_KIND, Object, matches_labels

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
            problems += _object_problems(value, lines, document.file)
            if _is_shaped(value):
                objects.append(SourceObject(value, document.file, lines[0], lines))
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


def _object_problems(value: Any, lines: Lines, file: str) -> list[Problem]:
    def problem(field: str, message: str, *, is_warning: bool = False) -> Problem:
        return Problem(file, find_line(lines, field), message, is_warning)

    if not isinstance(value, dict):
        return [problem("", f"wants a Kubernetes object, got {describe_value(value)}")]
    found = []
    for field in ("apiVersion", "kind"):
        if value.get(field) is None:
            found.append(problem("", f'required field "{field}" is missing'))
        elif not isinstance(value[field], str) or not value[field]:
            found.append(problem(field, f"{field}: wants text, got {describe_value(value[field])}"))
    metadata = value.get("metadata")
    if metadata is None:
        found.append(problem("", 'required field "metadata" is missing'))
    elif not isinstance(metadata, dict):
        found.append(problem("metadata", f"metadata: wants a mapping, got {describe_value(metadata)}"))
    else:
        found += [problem(f"metadata.{field}", text) for field, text in _name_problems(metadata)]
    if found:
        return found
    api_version, kind = value["apiVersion"], value["kind"]
    if api_version.startswith("testbed/"):
        return [problem("kind", f"a {kind} of the testbed is not an object of the cluster")]
    if (api_version, kind) not in BY_KIND and kind not in KINDS.values():
        kinds = [known for version, known in BY_KIND if version == api_version]
        if hint := suggestion(kind, kinds, cutoff=0.8):
            found.append(problem("kind", f'no kind "{kind}" in version "{api_version}"{hint}'))
    found += [problem(path, message) for path, message in find_misfits(value)]
    if not found:  # the rules rely on the types
        found += [problem(cause.field, str(cause)) for cause in validate_object(value)]
    return found


def _name_problems(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The rules for names of every kind: they become path segments. Kinds that we know have more rules."""
    found = []
    name, generate_name = metadata.get("name"), metadata.get("generateName")
    if name is None and generate_name is None:
        found.append(("", 'metadata: required field "name" is missing'))
    for field in ("name", "generateName", "namespace"):
        text = metadata.get(field)
        if text is None:
            continue
        if not isinstance(text, str):
            found.append((field, f"metadata.{field}: wants text, got {describe_value(text)}"))
        elif text in ("", ".", "..") or not re.fullmatch(r"[A-Za-z0-9:._-]{1,253}", text):
            found.append((field, f"metadata.{field}: {text!r} is not a valid name"))
    return found


def unmatched_selectors(objects: Sequence[SourceObject]) -> list[Problem]:
    """Return a warning for each Service whose selector fits no pod that these objects make."""
    problems = []
    for service in objects:
        spec = service.object.get("spec")
        selector = spec.get("selector") if service.kind == "Service" and isinstance(spec, dict) else None
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
