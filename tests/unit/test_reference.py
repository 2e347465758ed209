"""The reference in docs/: it is what the schemas and the command line say, and what the schemas say is so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from tools_support import load_tool

from testbed.errors import ManifestError
from testbed.manifests import (
    benchmark_schema,
    load_benchmark,
    load_scenario,
    load_topology,
    scenario_schema,
    topology_schema,
)
from testbed.model.proxyconfig import parse_proxy_config

ROOT = Path(__file__).parents[2]
WEB = ROOT / "tests" / "unit" / "files" / "docs-web.yaml"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_tool("reference")


@pytest.mark.parametrize("kind", ["fields of a topology", "fields of a scenario", "fields of a benchmark", "commands"])
def test_the_tables_are_up_to_date(generator: ModuleType, kind: str) -> None:
    """Fields are those of the schema, commands those of the command line; `python tools/reference.py` writes them anew."""
    page = generator.PAGES[kind][0]
    assert page.read_text() == generator.render(kind), f"run tools/reference.py: {page} is out of date"


def test_a_field_without_words_is_refused(generator: ModuleType) -> None:
    """A new field cannot be forgotten: what has no description is not written."""
    schema = topology_schema()
    del schema["$defs"]["NodeWire"]["properties"]["maxPods"]["description"]
    with pytest.raises(SystemExit, match="maxPods has no description"):
        generator.Reference(schema).text()


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("The file", "the-file"), ("spec.nodes[].taints[]", "specnodestaints"), ("`up`, then down", "up-then-down")],
)
def test_anchors_are_githubs(generator: ModuleType, heading: str, anchor: str) -> None:
    """Letters, digits, signs of words and blanks stay; blanks become hyphens."""
    assert generator.anchor(heading) == anchor


# ── defaults ────────────────────────────────────────────────────────────────────────────────────────────────────────


def defaults_of(
    schema: dict[str, Any], value: Any, at: dict[str, Any] | None = None
) -> Iterator[tuple[list[Any], Any]]:
    """Yield each default that the schema tells and the document leaves to it: where it belongs, and what it is."""
    at = schema if at is None else at
    if "$ref" in at:
        at = schema["$defs"][at["$ref"].rpartition("/")[2]]
    if isinstance(value, list) and "items" in at:
        for index, inner in enumerate(value):
            for path, default in defaults_of(schema, inner, at["items"]):
                yield [index, *path], default
    if isinstance(value, dict):
        for field, about in at.get("properties", {}).items():
            if field not in value and "default" in about:
                yield [field], about["default"]
            elif field in value:
                branches = [
                    branch for branch in about.get("anyOf", [about]) if "properties" in resolved(schema, branch)
                ]
                for path, default in defaults_of(schema, value[field], (branches or [about])[0]):
                    yield [field, *path], default


def resolved(schema: dict[str, Any], at: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][at["$ref"].rpartition("/")[2]] if "$ref" in at else at


def with_value(document: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    filled = deepcopy(document)
    inner: Any = filled
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return filled


def test_defaults_of_a_topology(tmp_path: Path) -> None:
    """A file that writes down every default that is told is the same topology as one that writes none."""
    lan = {"name": "lan", "cidr": "192.168.93.0/24"}
    node = {"name": "node1", "network": "lan", "address": "192.168.93.11"}
    host = {"name": "client", "network": "lan", "address": "192.168.93.100"}
    spec = {
        "networks": [lan],
        "nodes": [node],
        "hosts": [host],
        "cluster": {},
        "links": [{"between": ["node1", "lan"]}],
    }
    document = {"apiVersion": "testbed/v1", "kind": "Topology", "metadata": {"name": "t"}, "spec": spec}
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(document))
    plain = load_topology(path)
    found = list(defaults_of(topology_schema(), document))
    assert {step for steps, _ in found for step in steps} >= {
        "interface",
        "maxPods",
        "nodePortRange",
        "domain",
        "podCIDR",
    }
    for steps, default in found:
        document = with_value(document, steps, default)
    path.write_text(json.dumps(document))
    assert load_topology(path) == plain


def test_defaults_of_kube_proxy() -> None:
    """A KubeProxyConfiguration with every default that is told is read as an empty one."""
    schema = topology_schema()
    at = schema["$defs"]["KubeProxyWire"]
    document: dict[str, Any] = {field: {} for field, about in at["properties"].items() if "$ref" in about}
    for steps, default in list(defaults_of(schema, document, at)):
        document = with_value(document, steps, default)
    assert document["mode"] == "iptables" and document["ipvs"]["scheduler"] == "rr"
    assert parse_proxy_config(document) == parse_proxy_config({})


def test_defaults_of_a_benchmark(tmp_path: Path) -> None:
    """A file that writes down every default that is told is the same benchmark as one that writes none."""
    measure: list[dict[str, Any]] = [{"throughput": {}}, {"connections": {}}, {"latency": {}}, {"sync": {}}]
    document = {
        "apiVersion": "testbed/v1", "kind": "Benchmark", "metadata": {"name": "b"}, "spec": {"measure": measure},
    }  # fmt: skip
    path = tmp_path / "b.yaml"
    path.write_text(json.dumps(document))
    plain = load_benchmark(path)
    found = list(defaults_of(benchmark_schema(), document))
    assert {step for steps, _ in found for step in steps} >= {"topology", "samples", "duration", "paths", "positions"}
    for steps, default in found:
        document = with_value(document, steps, default)
    path.write_text(json.dumps(document))
    assert load_benchmark(path) == plain


# ── examples ────────────────────────────────────────────────────────────────────────────────────────────────────────


def examples_of(schema: dict[str, Any], struct: str) -> list[dict[str, Any]]:
    fields = schema["$defs"][struct]["properties"].items()
    return [{field: example} for field, about in fields for example in about.get("examples", ())]


def scenario_with(*steps: dict[str, Any]) -> dict[str, Any]:
    spec = {"topology": "three-nodes", "steps": [{"apply": "web.yaml"}, *steps]}
    return {"apiVersion": "testbed/v1", "kind": "Scenario", "metadata": {"name": "s"}, "spec": spec}


def write_scenario(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "web.yaml").write_text(WEB.read_text())
    (folder / "scenario.yaml").write_text(json.dumps(document))
    return folder


STEPS = examples_of(scenario_schema(), "StepWire")


def test_every_kind_of_step_has_an_example() -> None:
    """So has every kind of measurement."""
    for schema, struct, steps in (
        (scenario_schema(), "StepWire", STEPS),
        (benchmark_schema(), "MeasureWire", examples_of(benchmark_schema(), "MeasureWire")),
    ):
        kinds = {branch["required"][0] for branch in schema["$defs"][struct]["oneOf"]}
        assert {next(iter(step)) for step in steps} == kinds


def test_examples_of_steps_hold(tmp_path: Path) -> None:
    """All are steps of a scenario that applies a Deployment and a Service dev/web and a pod dev/client."""
    document = scenario_with(*STEPS)
    assert len(load_scenario(write_scenario(tmp_path, document)).steps) == 1 + len(STEPS)
    jsonschema.validate(document, scenario_schema())


def test_examples_of_measurements_hold(tmp_path: Path) -> None:
    """All of them are one benchmark."""
    spec = {"measure": examples_of(benchmark_schema(), "MeasureWire")}
    document = {"apiVersion": "testbed/v1", "kind": "Benchmark", "metadata": {"name": "b"}, "spec": spec}
    (tmp_path / "benchmark.yaml").write_text(json.dumps(document))
    load_benchmark(tmp_path)
    jsonschema.validate(document, benchmark_schema())


def test_defaults_of_steps(tmp_path: Path) -> None:
    """A step that writes down a default that is told is the same as one that leaves it out, wherever it may be written."""
    schema = scenario_schema()
    plain = load_scenario(write_scenario(tmp_path, scenario_with(*STEPS))).steps[1:]
    filled = [
        ((path[0], path[-1]), same, with_value(step, path, default))
        for step, same in zip(STEPS, plain, strict=True)
        for path, default in defaults_of(schema, step, {"$ref": "#/$defs/StepWire"})
    ]
    with pytest.raises(ManifestError) as refused:  # a field that says nothing about this kind of request
        load_scenario(write_scenario(tmp_path, scenario_with(*(step for _, _, step in filled))))
    refusals = {int(found[1]) - 1 for found in re.finditer(r"spec\.steps\[(\d+)\]", str(refused.value))}
    taken = [one for index, one in enumerate(filled) if index not in refusals]
    again = load_scenario(write_scenario(tmp_path, scenario_with(*(step for _, _, step in taken)))).steps[1:]
    for (field, same, _), now in zip(taken, again, strict=True):
        assert now == same, field
    written = {field for field, _, _ in taken}
    assert written == {field for field, _, _ in filled}
    assert written >= {
        ("wait", "within"),
        ("expect", "within"),
        ("expect", "patience"),
        ("exec", "status"),
        ("expect", "rcode"),
    }
