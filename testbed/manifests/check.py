"""Any YAML file of ours or of Kubernetes, checked by what it says it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from testbed.errors import Problem
from testbed.manifests.allocations import allocation_problems
from testbed.manifests.benchmark import read_benchmark
from testbed.manifests.decode import API_VERSION, Decoded
from testbed.manifests.kubeproxy import KubeProxyWire
from testbed.manifests.objects import SourceObject, read_objects, repeated_objects, unmatched_selectors
from testbed.manifests.scenario import find_scenarios, read_scenario
from testbed.manifests.source import BENCHMARK_FILE, SCENARIO_FILE, Document, parse_documents, read_text
from testbed.manifests.text import suggestion
from testbed.manifests.topology import read_topology
from testbed.model.cluster import ClusterConfig


def check_file(path: Path) -> list[Problem]:
    """Return everything wrong with a file, or with the scenario or scenarios in a folder, in file order."""
    return check_files([path])


def check_files(paths: Sequence[Path]) -> list[Problem]:
    """Return everything wrong with some files, in file order.

    Manifests given together are one set: a Service of one may select pods of another. They are for the cluster of the
    topology among the files, or else for one with Kubernetes' default ranges.
    """
    config = ClusterConfig()
    problems: list[Problem] = []
    objects: list[SourceObject] = []
    for given in (one for path in paths for one in find_scenarios(path)):
        path = _file_of(given)
        text, found = read_text(path)
        documents, syntax = parse_documents(text, str(path))
        problems += found + syntax
        if not documents and not found and not syntax:
            problems.append(Problem(str(path), 0, "is empty"))
        for document in documents:
            if is_kind(document, "Topology"):
                topology, found = read_topology(document)
                config = topology.cluster if topology is not None else config
            else:
                made, found = _check_document(document)
                objects += made
            problems += found
    return sorted(
        {*problems, *repeated_objects(objects), *unmatched_selectors(objects), *allocation_problems(objects, config)}
    )


def _file_of(given: Path) -> Path:
    """Return the scenario of a folder, or the benchmark of one that has no scenario."""
    if not given.is_dir():
        return given
    names = (SCENARIO_FILE, BENCHMARK_FILE)
    return next((given / name for name in names if (given / name).is_file()), given / SCENARIO_FILE)


def is_kind(document: Document, kind: str) -> bool:
    """Say whether a document is of one of our kinds, also when its apiVersion was forgotten or is of another version."""
    value = document.value
    if not isinstance(value, dict) or value.get("kind") != kind:
        return False
    api_version = value.get("apiVersion")
    return api_version is None or (isinstance(api_version, str) and api_version.startswith("testbed/"))


def _check_document(document: Document) -> tuple[list[SourceObject], list[Problem]]:
    value = document.value
    kind = value.get("kind") if isinstance(value, dict) else None
    api_version = value.get("apiVersion") if isinstance(value, dict) else None
    is_ours = isinstance(api_version, str) and api_version.startswith("testbed/")
    if is_kind(document, "Scenario"):
        return [], read_scenario(document)[1]
    if is_kind(document, "Benchmark"):
        return [], read_benchmark(document)[1]
    if is_ours:
        hint = suggestion(str(kind), ("Topology", "Scenario", "Benchmark"))
        message = f"{API_VERSION} has the kinds Topology, Scenario and Benchmark, not {kind!r}{hint}"
        return [], [Problem(document.file, document.line_of(("kind",)), message)]
    if kind == "KubeProxyConfiguration":
        decoded = Decoded(document)
        decoded.decode(KubeProxyWire)
        return [], decoded.problems
    return read_objects([document])
