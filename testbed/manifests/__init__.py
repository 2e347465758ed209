"""YAML text to checked values: topologies, scenarios and Kubernetes objects, every problem with file and line.

Names are loaded when they are first used: the store and the agents want `manifests.kinds` without the YAML readers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.manifests.allocations import allocation_problems
    from testbed.manifests.benchmark import benchmark_schema, load_benchmark
    from testbed.manifests.check import check_file, check_files
    from testbed.manifests.objects import SourceObject, load_objects
    from testbed.manifests.scenario import find_scenarios, load_scenario, scenario_schema
    from testbed.manifests.topology import find_topology, load_topology, topology_schema

__all__ = [
    "SourceObject",
    "allocation_problems",
    "benchmark_schema",
    "check_file",
    "check_files",
    "find_scenarios",
    "find_topology",
    "load_benchmark",
    "load_objects",
    "load_scenario",
    "load_topology",
    "scenario_schema",
    "topology_schema",
]

_MODULES = {
    "SourceObject": "objects",
    "allocation_problems": "allocations",
    "benchmark_schema": "benchmark",
    "check_file": "check",
    "check_files": "check",
    "find_scenarios": "scenario",
    "find_topology": "topology",
    "load_benchmark": "benchmark",
    "load_objects": "objects",
    "load_scenario": "scenario",
    "load_topology": "topology",
    "scenario_schema": "scenario",
    "topology_schema": "topology",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
