"""What a scenario's steps say against what its manifests can produce, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from testbed.errors import Problem
from testbed.manifests.objects import WORKLOADS, SourceObject, unmatched_selectors
from testbed.manifests.text import suggestion
from testbed.model.objects import BY_KEY, matches_labels
from testbed.model.scenario import (
    DeleteStep,
    ExecStep,
    ExpectStep,
    FaultStep,
    KubectlStep,
    ScaleStep,
    Selector,
    Step,
    WaitStep,
)
from testbed.model.topology import Topology

# The lab brings what is in these itself, and `default/kubernetes`.
_BUILT_IN_NAMESPACES = frozenset({"default", "kube-system", "kube-public", "kube-node-lease"})
_OPAQUE_NAMESPACE = "kube-system"
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


def cross_check(steps: Sequence[Step], objects: Sequence[SourceObject], topology: Topology | None) -> list[Problem]:
    """Return what the steps name and nothing makes, and Services that select nothing (warnings)."""
    problems = unmatched_selectors(objects)
    if any(isinstance(step, KubectlStep) and not _HARMLESS_VERBS & set(step.argv) for step in steps):
        return problems
    problems += _missing_namespaces(objects)
    for step in steps:
        problems += [Problem(step.file, step.line, reason) for reason in _missing(step, objects, topology)]
    return problems


def _missing_namespaces(objects: Sequence[SourceObject]) -> list[Problem]:
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


def _missing(step: Step, objects: Sequence[SourceObject], topology: Topology | None) -> Iterable[str]:
    match step:
        case ExecStep(where=Selector() as selector):
            yield from _missing_pods(selector, objects)
        case ExpectStep():
            pods = step.answered_by.pods if step.answered_by else None
            for named in (step.where, pods, step.sees_client):
                if isinstance(named, Selector):
                    yield from _missing_pods(named, objects)
        case FaultStep(pods=Selector() as selector):
            yield from _missing_pods(selector, objects)
        case WaitStep(resource="pods", selector=selector):
            yield from _missing_pods(selector, objects)
        case WaitStep(resource=resource, selector=selector):
            yield from _missing_objects(resource, selector, objects, topology)
        case ScaleStep(object=ref):
            yield from _missing_objects(ref.resource, Selector(ref.namespace, ref.name), objects, topology)
        case DeleteStep():
            for ref in step.objects:
                selector = Selector(ref.namespace, ref.name)
                if ref.resource == "pods":
                    yield from _missing_pods(selector, objects)
                else:
                    yield from _missing_objects(ref.resource, selector, objects, topology)


def _missing_pods(selector: Selector, objects: Sequence[SourceObject]) -> Iterable[str]:
    if selector.namespace == _OPAQUE_NAMESPACE:
        return
    makers = [source for source in objects if source.pod_labels is not None]
    if any(source.namespace == selector.namespace and _makes(source, selector) for source in makers):
        return
    what = "pod is called" if selector.name else "pod has the labels"
    shown = [f"{source.namespace}/{source.name}" for source in makers]
    hint = suggestion(str(selector), shown) or (f" (pods come from: {', '.join(shown)})" if shown else "")
    yield f"no {what} {str(selector)!r}: no manifest of the scenario makes one{hint}"


def _makes(source: SourceObject, selector: Selector) -> bool:
    if selector.labels:
        return matches_labels(dict(selector.labels), source.pod_labels or {})
    return selector.name == source.name or (source.kind in WORKLOADS and selector.name.startswith(f"{source.name}-"))


def _missing_objects(
    resource: str, selector: Selector, objects: Sequence[SourceObject], topology: Topology | None
) -> Iterable[str]:
    kind = BY_KEY[resource].kind
    if selector.namespace == _OPAQUE_NAMESPACE or (resource, str(selector)) == ("services", "default/kubernetes"):
        return
    if resource == "nodes":
        known = [node.name for node in topology.nodes] if topology is not None else [selector.name]
        labels = [dict(node.labels) for node in topology.nodes] if topology is not None else []
    else:
        made = [source for source in objects if source.kind == kind and source.namespace == selector.namespace]
        known = [source.name for source in made]
        labels = [source.object["metadata"].get("labels") or {} for source in made]
        if resource == "namespaces":
            known += _BUILT_IN_NAMESPACES
        if resource in ("replicasets.apps", "endpoints", "endpointslices.discovery.k8s.io"):  # controllers make these
            return
    if selector.name and selector.name not in known:
        hint = suggestion(selector.name, known)
        yield f"no {kind} is called {str(selector)!r}: no manifest of the scenario makes one{hint}"
    elif (
        selector.labels
        and resource != "nodes"
        and not any(matches_labels(dict(selector.labels), found) for found in labels)
    ):
        yield f"no {kind} has the labels {str(selector)!r}: no manifest of the scenario makes one"
