"""Text in topologies, scenarios and benchmarks that a shell or a configuration file would take for more than text."""

# ruff: noqa: E501  # tables

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import hostile_texts

from testbed.manifests import check_files, load_scenario

TOPOLOGY: dict[str, Any] = {
    "apiVersion": "testbed/v1",
    "kind": "Topology",
    "metadata": {"name": "t", "labels": {"a": "b"}},
    "spec": {
        "networks": [{"name": "lan", "cidr": "192.168.93.0/24", "gateway": "192.168.93.1"}],
        "nodes": [
            {
                "name": "node1", "network": "lan", "address": "192.168.93.11", "interface": "eth0",
                "podCIDR": "10.244.1.0/24", "labels": {"zone": "a"}, "taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}],
            }
        ],
        "hosts": [{"name": "client", "network": "lan", "address": "192.168.93.100", "names": ["www.example.com"]}],
        "outsideDNS": "client",
        "links": [{"between": ["node1", "lan"], "rate": "1gbit", "delay": "1ms", "loss": "1%"}],
        "cluster": {
            "podCIDR": "10.244.0.0/16", "serviceCIDR": "10.96.0.0/22", "nodePortRange": "30000-32767",
            "domain": "cluster.local", "dns": "10.96.0.10",
        },
        "kubeProxy": {"mode": "iptables", "nodePortAddresses": ["192.168.93.0/24"]},
    },
}  # fmt: skip
HEAD = {"apiVersion": "testbed/v1", "kind": "Scenario", "metadata": {"name": "s"}}
KEPT = {"exec": {"in": "node1", "run": "true", "keep": "kept"}}
STEPS: list[dict[str, Any]] = [
    {"apply": "web.yaml", "name": "a title", "modes": ["iptables"], "row": "row", "capture": ["node1:eth0"]},
    {"exec": {"in": "node1", "run": ["echo", "x"], "prints": "x", "within": "1s", "keep": "kept"}},
    {"exec": {"in": "node1", "run": "echo x", "matches": "x", "differs": "kept"}},
    {"kubectl": {"run": "get pods", "editor": "true", "each": "dev/app=web", "table": {"columns": ["A"], "rows": [["x"]]}}},
    {"wait": {"pods": "dev/app=web", "for": "ready", "within": "1s"}},
    {"scale": {"deployment": "dev/web", "replicas": 1, "within": "1s"}},
    {"expect": {"from": "client", "get": "http://192.168.93.11/x", "headers": {"X-A": "b"}, "body": "x", "answeredBy": "dev/app=web"}},
    {"expect": {"from": "client", "udp": "192.168.93.11:53", "send": "x"}},
    {"expect": {"from": "client", "resolve": "web.dev", "answers": ["1.2.3.4"], "type": "A", "server": "10.96.0.10"}},
    {"expect": {"from": "client", "arp": "192.168.93.11", "answeredBy": ["node1"]}},
    {"fault": {"kill": "kube-system/kube-proxy@node1"}},
    {"doctor": {"names": ["pool-exhausted"], "at": ["node node1"]}},
]  # fmt: skip
SCENARIOS: list[dict[str, Any]] = [
    {**HEAD, "spec": {"topology": "three-nodes", "proxyModes": ["iptables"], "steps": [KEPT, step]}} for step in STEPS
]
BENCHMARK: dict[str, Any] = {
    "apiVersion": "testbed/v1",
    "kind": "Benchmark",
    "metadata": {"name": "b"},
    "spec": {
        "topology": "bench",
        "proxyModes": ["iptables"],
        "duration": "2s",
        "measure": [
            {"throughput": {"paths": ["clusterip"], "udp": ["200mbit"]}},
            {"latency": {"paths": ["clusterip"], "positions": ["first"]}},
        ],
    },
}
#: Where any text will do, and what becomes of it.
FREE = {
    "Scenario": {
        "spec.steps.name": "shown",
        "spec.steps.row": "shown",
        "spec.steps.exec.run": "words of a program, in the lab",
        "spec.steps.exec.prints": "compared",
        "spec.steps.exec.matches": "compared",
        "spec.steps.kubectl.run": "words of kubectl",
        "spec.steps.kubectl.editor": "words of a program",
        "spec.steps.kubectl.table.columns": "compared",
        "spec.steps.kubectl.table.rows": "compared",
        "spec.steps.expect.headers": "sent",
        "spec.steps.expect.body": "compared",
        "spec.steps.expect.answers": "compared",
        "spec.steps.expect.send": "sent",
        "spec.steps.doctor.at": "compared",
    },
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    elif isinstance(value, str):
        yield path


def replaced(document: dict[str, Any], path: tuple[Any, ...], text: str) -> dict[str, Any]:
    made = copy.deepcopy(document)
    inner: Any = made
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = text
    return made


@pytest.mark.parametrize("documents", [[TOPOLOGY], SCENARIOS, [BENCHMARK]], ids=["topology", "scenario", "benchmark"])
def test_which_fields_take_any_text(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    """Hostile text is refused everywhere but where it is compared, shown, sent, or a word of a command that is run anyway."""
    file = tmp_path / "file.yaml"
    canary = tmp_path / "canary"
    (tmp_path / "web.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: dev}\n")

    def errors(made: dict[str, Any]) -> set[str]:
        file.write_text(yaml.safe_dump(made))
        return {problem.message for problem in check_files([file]) if not problem.warning}

    taken = set()
    for document in documents:
        before = errors(document)
        paths = [*leaves(document["spec"], ("spec",)), *leaves(document["metadata"], ("metadata",))]
        for path in (path for path in paths if path[:3] != ("spec", "steps", 0)):
            for text in hostile_texts(str(canary)):
                if not errors(replaced(document, path, text)) - before:
                    taken.add(".".join(part for part in path if isinstance(part, str) and part != "X-A"))
    assert taken == set(FREE.get(documents[0]["kind"], {}))
    assert not canary.exists()


def test_an_editor_is_words_and_no_shell_text(tmp_path: Path) -> None:
    """kubectl gives an editor with quotes in it to a shell: what a scenario says reaches it quoted, word by word."""
    (tmp_path / "scenario.yaml").write_text(
        "apiVersion: testbed/v1\nkind: Scenario\nmetadata: {name: s}\nspec:\n  topology: three-nodes\n  steps:\n"
        "    - kubectl: {run: edit cm x, editor: \"sed -i 's/a: b/$(touch x)/' `touch y`\"}\n"
    )
    step: Any = load_scenario(tmp_path).steps[0]
    assert step.editor == "sed -i 's/a: b/$(touch x)/' '`touch' 'y`'"
