"""Benchmark files: what they mean, and everything that can be wrong with them."""

# ruff: noqa: E501  # whole messages

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from testbed.errors import ManifestError
from testbed.manifests import benchmark_schema, check_files, load_benchmark
from testbed.model.benchmark import DEFAULT_SERVICES, NetPath, Workload
from testbed.model.topology import PROXY_MODES

HEAD = "apiVersion: testbed/v1\nkind: Benchmark\nmetadata: {name: b}\nspec:\n"
OURS = sorted((Path(__file__).parents[2] / "scenarios").glob("*/benchmark.yaml"))
WHOLE = (
    HEAD
    + """\
  topology: bench
  proxyModes: [nftables, iptables, nftables]
  services: [1000, 0, 1000]
  samples: 10
  duration: 2s
  clients: 32
  endpoints: 3
  seed: 7
  oneKernel: true
  measure:
    - throughput: {paths: [clusterip-same-node], streams: [1, 8, 1], udp: [200mbit]}
    - connections: {paths: [nodeport], keepAlive: false}
    - latency: {paths: [clusterip], positions: [first, last]}
"""
)


def load(folder: Path, text: str) -> object:
    (folder / "benchmark.yaml").write_text(text)
    return load_benchmark(folder)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load(folder, text)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_whole_file(tmp_path: Path) -> None:
    """Every field means what it says; what is given twice counts once; baselines come along."""
    (tmp_path / "benchmark.yaml").write_text(WHOLE)
    found = load_benchmark(tmp_path)
    assert (found.name, found.topology.name, found.proxy_modes) == ("b", "bench", ("nftables", "iptables"))
    assert (found.services, found.samples, found.duration_s, found.clients) == ((0, 1000), 10, 2.0, 32)
    assert (found.endpoints, found.seed, found.one_kernel, found.modes_are_given) == (3, 7, True, True)
    assert [str(case) for case in found.cases] == [
        "tcp-1 direct-same-node", "tcp-1 clusterip-same-node", "tcp-8 direct-same-node", "tcp-8 clusterip-same-node",
        "udp-200mbit direct-same-node", "udp-200mbit clusterip-same-node", "new-connections direct",
        "new-connections nodeport", "first-answer direct", "first-answer clusterip (first)",
        "first-answer clusterip (last)",
    ]  # fmt: skip


@pytest.mark.parametrize("workload", Workload)
def test_defaults(tmp_path: Path, workload: Workload) -> None:
    """An empty workload has defaults: all modes, 5 rounds of 1 s; direct, ClusterIP and NodePort."""
    (tmp_path / "benchmark.yaml").write_text(HEAD + f"  measure: [{{{workload.value}: {{}}}}]\n")
    found = load_benchmark(tmp_path)
    assert (found.proxy_modes, found.samples, found.duration_s) == (PROXY_MODES, 5, 1.0)
    assert found.services == DEFAULT_SERVICES[workload] and not found.modes_are_given
    paths = {case.path for case in found.cases}
    asked = {NetPath.DIRECT, NetPath.CLUSTER_IP, NetPath.NODE_PORT}
    assert paths == ({NetPath.NONE} if workload is Workload.SYNC else asked)
    if workload is Workload.THROUGHPUT:
        assert [(case.streams, case.path.value) for case in found.cases] == [
            (streams, path) for streams in (1, 8) for path in ("direct", "clusterip", "nodeport")
        ]


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    """Unknown keys, numbers out of range, unknown paths and workloads: all at once, each with its line."""
    text = (
        HEAD
        + """\
  topology: bensh
  service: [1]
  services: [-1, 60000, many]
  samples: 0
  endpoints: 0
  clients: 0
  duration: fast
  proxyModes: [iptabels]
  measure:
    - throughput: {paths: [ingress, nowhere], streams: [0], udp: [fast]}
    - latency: {position: [first], positions: [end]}
    - {latency: {}, sync: {}}
    - {}
    - connections: {keepAlive: maybe}
"""
    )
    assert problems(tmp_path, text) == [
        "benchmark.yaml:5: spec.topology: there is no topology 'bensh' (did you mean \"bench\"?)",
        'benchmark.yaml:6: spec: unknown field "service" (did you mean "services"?)',
        "benchmark.yaml:7: spec.services[0]: wants a whole number from 0 to 50000, got -1",
        "benchmark.yaml:7: spec.services[1]: wants a whole number from 0 to 50000, got 60000",
        "benchmark.yaml:7: spec.services[2]: wants a whole number, got the text 'many'",
        "benchmark.yaml:8: spec.samples: wants a whole number from 1 to 1000, got 0",
        "benchmark.yaml:9: spec.endpoints: wants a whole number from 1 to 100, got 0",
        "benchmark.yaml:10: spec.clients: wants a whole number from 1 to 10000, got 0",
        "benchmark.yaml:11: spec.duration: 'fast' is not a duration such as 500ms, 5s or 1m",
        "benchmark.yaml:12: spec.proxyModes[0]: 'iptabels' is not one of iptables, ipvs, nftables, userspace "
        '(did you mean "iptables"?)',
        "benchmark.yaml:14: spec.measure[0].throughput.paths[0]: 'ingress' passes HTTP only: measure connections or latency "
        "over it",
        "benchmark.yaml:14: spec.measure[0].throughput.paths[1]: 'nowhere' is not one of clusterip, clusterip-same-node, "
        "direct, direct-same-node, ingress, loadbalancer, nodeport",
        "benchmark.yaml:14: spec.measure[0].throughput.streams[0]: wants a whole number from 1 to 128, got 0",
        "benchmark.yaml:14: spec.measure[0].throughput.udp[0]: 'fast' is not a rate such as 100mbit or 1gbit",
        "benchmark.yaml:15: spec.measure[1].latency.positions[0]: 'end' is not one of first, last, middle",
        'benchmark.yaml:15: spec.measure[1].latency: unknown field "position" (did you mean "positions"?)',
        "benchmark.yaml:16: spec.measure[2]: measures exactly one of throughput, connections, latency, sync; got latency and sync",
        "benchmark.yaml:17: spec.measure[3]: measures exactly one of throughput, connections, latency, sync; got none",
        "benchmark.yaml:18: spec.measure[4].connections.keepAlive: wants true or false, got the text 'maybe'",
    ]


TOPOLOGY = """\
apiVersion: testbed/v1
kind: Topology
metadata: {name: small}
spec:
  networks: [{name: lan, cidr: 192.168.93.0/24}]
  nodes: [{name: node1, network: lan, address: 192.168.93.11}]
  cluster: {serviceCIDR: 10.96.0.0/24}
"""


def test_what_does_not_fit_the_topology(tmp_path: Path) -> None:
    """Too many Services for its range, one node only, nobody outside: said at the field that asks for it."""
    (tmp_path / "small.yaml").write_text(TOPOLOGY)
    text = HEAD + "  topology: small\n  services: [1, 1000]\n  measure:\n    - latency: {}\n"
    assert problems(tmp_path, text) == [
        "benchmark.yaml:5: spec.topology: 'small' has no outside host, which path 'nodeport' begins at",
        "benchmark.yaml:5: spec.topology: 'small' has one node; the server must be on another one than the client",
        "benchmark.yaml:6: spec.services: 1000 Services do not fit into the serviceCIDR 10.96.0.0/24 of topology 'small': "
        "it has room for 192",
    ]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("duration: 500ms\n  measure: [{throughput: {}}]",
         "benchmark.yaml:5: spec.duration: 0.5s: iperf3 and wrk count in whole seconds; latency alone may be sampled for less"),
        ("duration: 0s\n  measure: [{latency: {}}]", "benchmark.yaml:5: spec.duration: 0s is not more than 0s and at most 3600s"),
        ("services: [0]\n  measure: [{sync: {}}]",
         "benchmark.yaml:5: spec.services: 0: without a Service there is no change to sync; give 1 or more"),
        ("topology: ../bench.yaml\n  measure: [{sync: {}}]",
         "benchmark.yaml:5: spec.topology: '../bench.yaml' leaves the benchmark's folder"),
        ("measure: []", "benchmark.yaml:5: spec.measure: wants at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(tmp_path: Path, fields: str, problem: str) -> None:
    """Fields that are right on their own, and wrong together."""
    assert problems(tmp_path, f"{HEAD}  {fields}\n") == [problem]


def test_broken_topologies_are_told(tmp_path: Path) -> None:
    """A problem of the topology is told at its own file and line."""
    (tmp_path / "small.yaml").write_text(TOPOLOGY.replace("192.168.93.11", "10.0.0.1"))
    found = problems(tmp_path, HEAD + "  topology: small.yaml\n  measure: [{sync: {}}]\n")
    assert found == ["small.yaml:6: spec.nodes[0].address: 10.0.0.1 is outside network lan (192.168.93.0/24)"]


def test_schema_takes_what_we_take(tmp_path: Path) -> None:
    """The printed schema takes a good file, and neither an unknown field nor two workloads in one."""
    schema = json.loads(json.dumps(benchmark_schema()))
    jsonschema.validators.validator_for(schema).check_schema(schema)
    document = yaml.safe_load(WHOLE)
    jsonschema.validate(document, schema)
    for spec in ({"measure": [{"latency": {}, "sync": {}}]}, {"measure": [{"sync": {}}], "service": [1]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, "spec": spec}, schema)


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.parent.name)
def test_our_files(file: Path) -> None:
    """Benchmarks that come along are valid, also by the name of their folder."""
    assert check_files([file.parent]) == []
    assert load_benchmark(file.parent).cases


def test_there_are_files_of_ours() -> None:
    """The test before this one has something to look at."""
    assert OURS
