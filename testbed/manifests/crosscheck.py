"""What a scenario's steps name, against what its manifests can produce, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.errors import Problem
from testbed.manifests.objects import WORKLOADS, SourceObject
from testbed.manifests.text import suggestion
from testbed.model.objects import Resource, matches_labels
from testbed.model.scenario import Selector
from testbed.model.topology import Topology

_BUILT_IN_NAMESPACES = frozenset({"default", "kube-system", "kube-public", "kube-node-lease"})
# What the lab itself runs there is not in any manifest.
_OPAQUE_NAMESPACE = "kube-system"
_BUILT_IN_SERVICE = Selector("default", "kubernetes")
# Controllers make these, under names of their own.
_MADE_BY_CONTROLLERS = frozenset({"ReplicaSet", "Endpoints", "EndpointSlice", "Event"})
# kubectl words that make no object: after any other, objects may exist that no manifest shows.
_HARMLESS_VERBS = frozenset(
    {
        "get",
        "describe",
        "logs",
        "wait",
        "rollout",
        "scale",
        "delete",
        "exec",
        "label",
        "annotate",
        "version",
        "explain",
        "top",
    }
)


def makes_objects(argv: Sequence[str]) -> bool:
    """Say whether a kubectl command may make objects."""
    return not _HARMLESS_VERBS & set(argv)


def missing_namespaces(objects: Sequence[SourceObject]) -> list[Problem]:
    """Return a problem for each object whose namespace is not among the objects."""
    made = {source.name for source in objects if source.kind == "Namespace"} | _BUILT_IN_NAMESPACES
    return [
        Problem(
            source.file,
            source.line_of("metadata.namespace"),
            f"metadata.namespace: no manifest of the scenario makes the namespace {source.namespace!r}",
        )
        for source in objects
        if source.namespace and source.namespace not in made
    ]


def missing(resource: Resource, selector: Selector, objects: Sequence[SourceObject], topology: Topology | None) -> str:
    """Return why nothing of a kind can ever fit a selector, or ''."""
    if selector.namespace == _OPAQUE_NAMESPACE or (resource.kind == "Service" and selector == _BUILT_IN_SERVICE):
        return ""
    if resource.kind == "Pod":
        return _missing_pods(selector, objects)
    if resource.kind == "Node":
        labels_by_name = {node.name: dict(node.labels) for node in topology.nodes} if topology is not None else {}
        # A label may have been set on a Node by a step.
        is_fine = topology is None or not selector.name or selector.name in labels_by_name
        return (
            "" if is_fine else f"the topology has no node {selector.name!r}{suggestion(selector.name, labels_by_name)}"
        )
    if resource.kind in _MADE_BY_CONTROLLERS:
        return ""
    made = [source for source in objects if source.kind == resource.kind and source.namespace == selector.namespace]
    if selector.labels:
        is_fine = any(matches_labels(dict(selector.labels), source.labels) for source in made)
        return (
            ""
            if is_fine
            else f"no manifest of the scenario makes a {resource.kind} with the labels of {str(selector)!r}"
        )
    names = [source.name for source in made] + (sorted(_BUILT_IN_NAMESPACES) if resource.kind == "Namespace" else [])
    if selector.name in names:
        return ""
    shown = [str(Selector(selector.namespace, name)) for name in names]
    return f"no manifest of the scenario makes the {resource.kind} {str(selector)!r}{suggestion(str(selector), shown)}"


def _missing_pods(selector: Selector, objects: Sequence[SourceObject]) -> str:
    makers = [source for source in objects if source.pod_labels is not None]
    if any(source.namespace == selector.namespace and _makes(source, selector) for source in makers):
        return ""
    shown = [f"{source.namespace}/{source.name}" for source in makers]
    hint = suggestion(str(selector), shown) or (f" (pods come from: {', '.join(shown)})" if shown else "")
    what = f"a pod with the labels of {str(selector)!r}" if selector.labels else f"the pod {str(selector)!r}"
    return f"no manifest of the scenario makes {what}{hint}"


def _makes(source: SourceObject, selector: Selector) -> bool:
    if selector.labels:
        return matches_labels(dict(selector.labels), source.pod_labels or {})
    return selector.name == source.name or (source.kind in WORKLOADS and selector.name.startswith(f"{source.name}-"))
