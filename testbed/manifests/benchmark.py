"""Benchmark files: their format, and the rules that hold between fields. docs/benchmarks.md explains them to people."""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from testbed.errors import ManifestError, Problem
from testbed.manifests.decode import API_VERSION, Decoded, Wire, json_schema
from testbed.manifests.scalars import Duration, Rate
from testbed.manifests.source import Document, load_one
from testbed.manifests.text import unsafe_path
from testbed.manifests.topology import MetadataWire, find_topology, load_topology
from testbed.model.benchmark import (
    DEFAULT_CLIENTS,
    DEFAULT_DURATION_S,
    DEFAULT_PATHS,
    DEFAULT_SAMPLES,
    DEFAULT_SEED,
    DEFAULT_SERVICES,
    DEFAULT_STREAMS,
    DEFAULT_TOPOLOGY,
    HTTP_ONLY,
    Benchmark,
    Case,
    NetPath,
    Position,
    Workload,
    connections_cases,
    latency_cases,
    misfits,
    sync_cases,
    throughput_cases,
)
from testbed.model.topology import PROXY_MODES, Topology

BENCHMARK_FILE = "benchmark.yaml"
_LONGEST_S = 3600.0

PathName = Literal[
    "direct", "direct-same-node", "clusterip", "clusterip-same-node", "nodeport", "loadbalancer", "ingress"
]
PositionName = Literal["first", "middle", "last"]
Paths = (
    Annotated[
        list[PathName],
        Meta(min_length=1, description="default: direct, clusterip, nodeport; what a path is compared with comes too"),
    ]
    | None
)
Positions = (
    Annotated[
        list[PositionName],
        Meta(min_length=1, description="where in the rules the Service is that path clusterip asks"),
    ]
    | None
)


class ThroughputWire(Wire):
    """iperf3: TCP streams, and UDP at given rates."""

    paths: Paths = None
    streams: (
        Annotated[list[Annotated[int, Meta(ge=1, le=128)]], Meta(min_length=1, description="default: 1 and 8")] | None
    ) = None
    udp: Annotated[list[Rate], Meta(description="rates such as 200mbit")] = field(default_factory=list)


class ConnectionsWire(Wire):
    """wrk: HTTP requests a second, on connections that last and on new ones."""

    paths: Paths = None
    positions: Positions = None
    keep_alive: Annotated[bool | None, Meta(description="only those that last, or only new ones; default: both")] = None


class LatencyWire(Wire):
    """The time from opening a connection to the first byte of an answer."""

    paths: Paths = None
    positions: Positions = None


class SyncWire(Wire):
    """The time from a change at the API to the rules in every node's kernel, and that of writing all rules."""


class MeasureWire(Wire):
    """One workload: exactly one of these."""

    throughput: ThroughputWire | None = None
    connections: ConnectionsWire | None = None
    latency: LatencyWire | None = None
    sync: SyncWire | None = None


class SpecWire(Wire):
    """What is measured, and how often."""

    measure: Annotated[list[MeasureWire], Meta(min_length=1)] | None
    topology: Annotated[
        str | None, Meta(description="a file of this folder, or the name of one of ours; default: bench")
    ] = None
    proxy_modes: (
        Annotated[
            list[Literal["userspace", "iptables", "ipvs", "nftables"]],
            Meta(min_length=1, description="default: all, those that cannot run are left out"),
        ]
        | None
    ) = None
    services: (
        Annotated[
            list[Annotated[int, Meta(ge=0, le=50000)]],
            Meta(min_length=1, description="numbers of Services at which everything is measured"),
        ]
        | None
    ) = None
    samples: Annotated[int, Meta(ge=1, le=1000, description="rounds at each number of Services")] = DEFAULT_SAMPLES
    duration: Annotated[Duration | None, Meta(description="of one sample; default 1s")] = None
    clients: Annotated[int, Meta(ge=1, le=10000, description="connections that wrk holds open")] = DEFAULT_CLIENTS
    endpoints: Annotated[int, Meta(ge=1, le=100, description="of each Service that is only there to be many")] = 1
    seed: Annotated[int, Meta(ge=0, le=1 << 31, description="of the intervals")] = DEFAULT_SEED
    one_kernel: Annotated[bool, Meta(description="all modes in the nested kernel")] = False


class BenchmarkWire(Wire):
    """A benchmark file."""

    api_version: Literal["testbed/v1"] | None
    kind: Literal["Benchmark"] | None
    metadata: MetadataWire | None
    spec: SpecWire | None


_WORKLOADS = ("throughput", "connections", "latency", "sync")


def benchmark_schema() -> dict[str, Any]:
    """Return the format as JSON Schema."""
    schema = json_schema(BenchmarkWire, "Benchmark")
    schema["$defs"]["MeasureWire"]["oneOf"] = [{"required": [workload]} for workload in _WORKLOADS]
    return schema


def load_benchmark(path: Path) -> Benchmark:
    """Return the benchmark of a file, or of the ``benchmark.yaml`` in a folder.

    Raises:
        ManifestError: every problem of the file and of its topology.
    """
    return load_one(path / BENCHMARK_FILE if path.is_dir() else path, "benchmark", read_benchmark)


def read_benchmark(document: Document) -> tuple[Benchmark | None, list[Problem]]:
    """Return the benchmark of a document, or None, and everything wrong with it and its topology."""
    decoded = Decoded(document)
    wire = decoded.decode(BenchmarkWire)
    if wire is None or wire.spec is None:
        return None, decoded.problems
    reader = _Reader(decoded, wire.spec, Path(document.file))
    benchmark = reader.read(wire.metadata)
    problems = [*decoded.problems, *reader.problems_elsewhere]
    return (None if problems else benchmark), problems


class _Reader:
    """Turns a decoded spec into a Benchmark. Fields that are None were reported by the decoder, or have a default."""

    def __init__(self, decoded: Decoded, spec: SpecWire, file: Path) -> None:
        self.refuse: Callable[..., None] = decoded.refuse
        self.spec = spec
        self.file = file
        self.problems_elsewhere: list[Problem] = []
        self._decoded = decoded

    def read(self, metadata: MetadataWire | None) -> Benchmark | None:
        spec = self.spec
        loaded = self._load_topology()
        cases = [case for wire in spec.measure or () for case in self._cases(wire)]
        cases = list(dict.fromkeys(cases))
        services = self._services(cases)
        duration_s = DEFAULT_DURATION_S if spec.duration is None else float(spec.duration)
        if not 0 < duration_s <= _LONGEST_S:
            self.refuse(spec, "duration", reason=f"{duration_s:g}s is not more than 0s and at most {_LONGEST_S:g}s")
        if loaded is None or metadata is None or metadata.name is None or not cases:
            return None
        topology, topology_file = loaded
        if duration_s > 0:
            for name, reason in misfits(topology, services, cases, duration_s):
                self.refuse(spec, *((name,) if getattr(spec, name) is not None else ()), reason=reason)
        return Benchmark(
            name=str(metadata.name),
            topology=topology,
            topology_file=topology_file,
            proxy_modes=tuple(dict.fromkeys(spec.proxy_modes or PROXY_MODES)),
            modes_are_given=bool(spec.proxy_modes),
            services=services,
            cases=tuple(cases),
            samples=spec.samples,
            duration_s=duration_s,
            clients=spec.clients,
            endpoints=spec.endpoints,
            seed=spec.seed,
            one_kernel=spec.one_kernel,
        )

    def _load_topology(self) -> tuple[Topology, Path] | None:
        text = DEFAULT_TOPOLOGY if self.spec.topology is None else self.spec.topology
        if reason := unsafe_path(text, "benchmark"):
            self.refuse(self.spec, "topology", reason=reason)
            return None
        try:
            path = find_topology(text, self.file.parent)
        except ManifestError as error:
            self.refuse(self.spec, "topology", reason=error.problems[0].message)
            return None
        try:
            return load_topology(path), path
        except ManifestError as error:
            self.problems_elsewhere += error.problems
            return None

    def _services(self, cases: Sequence[Case]) -> tuple[int, ...]:
        if self.spec.services:
            return tuple(sorted(set(self.spec.services)))
        return DEFAULT_SERVICES[cases[0].workload] if cases else ()

    def _cases(self, wire: MeasureWire) -> list[Case]:
        given = [name for name in _WORKLOADS if getattr(wire, name) is not None or self._decoded.is_unread(wire, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            self.refuse(wire, reason=f"measures exactly one of {', '.join(_WORKLOADS)}; got {found}")
            return []
        if wire.throughput is not None:
            return self._throughput(wire.throughput)
        if (asked := wire.connections) is not None:
            kept = (True, False) if asked.keep_alive is None else (asked.keep_alive,)
            return connections_cases(_paths(asked.paths), _positions(asked.positions, (Position.LAST,)), kept)
        if wire.latency is not None:
            return latency_cases(_paths(wire.latency.paths), _positions(wire.latency.positions, tuple(Position)))
        return sync_cases() if wire.sync is not None else []

    def _throughput(self, wire: ThroughputWire) -> list[Case]:
        paths = _paths(wire.paths)
        for index, path in enumerate(paths):
            if path in HTTP_ONLY:
                reason = f"{path.value!r} passes HTTP only: measure connections or latency over it"
                self.refuse(wire, "paths", index, reason=reason)
        rates = [float(rate) for rate in wire.udp]
        streams = wire.streams if wire.streams is not None else (() if rates else DEFAULT_STREAMS)
        return throughput_cases(paths, list(dict.fromkeys(streams)), list(dict.fromkeys(rates)))


def _paths(names: Sequence[str] | None) -> list[NetPath]:
    return [NetPath(name) for name in names] if names else list(DEFAULT_PATHS)


def _positions(names: Sequence[str] | None, otherwise: Sequence[Position]) -> list[Position]:
    return [Position(name) for name in dict.fromkeys(names)] if names else list(otherwise)


def benchmark_document(
    name: str, topology: str, workload: Workload, parameters: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Return a document as somebody would write it who measures one workload; what is None is left out."""
    chosen = {key: value for key, value in settings.items() if value is not None}
    measured = {key: value for key, value in parameters.items() if value is not None}
    spec = {"topology": topology, **chosen, "measure": [{workload.value: measured}]}
    return {"apiVersion": API_VERSION, "kind": "Benchmark", "metadata": {"name": name}, "spec": spec}
