"""Benchmark files: their format, and the rules that hold between fields. docs/benchmarks.md explains them to people."""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from testbed.errors import ManifestError, Problem
from testbed.manifests.decode import API_VERSION, Decoded, Wire, described, json_schema
from testbed.manifests.scalars import Duration, Rate
from testbed.manifests.source import BENCHMARK_FILE, Document, load_one
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
    MOST_SERVICES,
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

_LONGEST_S = 3600.0

PathName = Literal[
    "direct", "direct-same-node", "clusterip", "clusterip-same-node", "nodeport", "loadbalancer", "ingress"
]
PositionName = Literal["first", "middle", "last"]
Paths = (
    Annotated[
        list[PathName],
        described(
            "the ways that requests take; what a path is compared with comes too",
            default=[path.value for path in DEFAULT_PATHS],
            min_length=1,
        ),
    ]
    | None
)
_POSITIONS = "where in the rules the Service is that path clusterip asks"


class ThroughputWire(Wire):
    """iperf3: TCP streams, and UDP at given rates. Not over path ingress, which passes HTTP only."""

    paths: Paths = None
    streams: (
        Annotated[
            list[Annotated[int, Meta(ge=1, le=128)]],
            described("how many TCP streams at once; default: [1, 8], or none when udp is given", min_length=1),
        ]
        | None
    ) = None
    udp: Annotated[list[Rate], described("rates to send UDP at")] = field(default_factory=list)


class ConnectionsWire(Wire):
    """wrk: HTTP requests a second, on connections that last and on new ones."""

    paths: Paths = None
    positions: (
        Annotated[list[PositionName], described(_POSITIONS, default=[Position.LAST.value], min_length=1)] | None
    ) = None
    keep_alive: (
        Annotated[bool, described("true: only connections that last; false: a new one for each request; default: both")]
        | None
    ) = None


class LatencyWire(Wire):
    """The time from opening a connection to the first byte of an answer."""

    paths: Paths = None
    positions: (
        Annotated[
            list[PositionName],
            described(_POSITIONS, default=[position.value for position in Position], min_length=1),
        ]
        | None
    ) = None


class SyncWire(Wire):
    """The time from a change at the API to the rules in every node's kernel, and that of writing all rules. No fields."""


class MeasureWire(Wire):
    """One workload: exactly one of these."""

    throughput: Annotated[
        ThroughputWire | None,
        described(
            "bytes a second", examples=[{"paths": ["clusterip", "nodeport"], "streams": [1, 8], "udp": ["200mbit"]}]
        ),
    ] = None
    connections: Annotated[
        ConnectionsWire | None,
        described(
            "HTTP requests a second", examples=[{"paths": ["clusterip"], "positions": ["last"], "keepAlive": False}]
        ),
    ] = None
    latency: Annotated[
        LatencyWire | None,
        described(
            "time to the first answer", examples=[{"paths": ["clusterip"], "positions": ["first", "middle", "last"]}]
        ),
    ] = None
    sync: Annotated[SyncWire | None, described("time from a change to the rules", examples=[{}])] = None


class SpecWire(Wire):
    """What is measured, and how often."""

    measure: (
        Annotated[list[MeasureWire], described("the workloads; all are part of the same rounds", min_length=1)] | None
    )
    topology: (
        Annotated[str, described("a file of this folder, or the name of one of ours", default=DEFAULT_TOPOLOGY)] | None
    ) = None
    proxy_modes: (
        Annotated[
            list[Literal["userspace", "iptables", "ipvs", "nftables"]],
            described(
                "the modes; one that is named and can run nowhere ends the command; default: all that can run",
                min_length=1,
            ),
        ]
        | None
    ) = None
    services: (
        Annotated[
            list[Annotated[int, Meta(ge=0, le=MOST_SERVICES)]],
            described(
                "numbers of Services at which everything is measured; the topology's serviceCIDR must have room for them; "
                "default: [1000], or [1, 1000, 5000] when latency or sync is first in measure",
                min_length=1,
            ),
        ]
        | None
    ) = None
    samples: Annotated[int, described("rounds at each number of Services, after one for warming up", ge=1, le=1000)] = (
        DEFAULT_SAMPLES
    )
    duration: (
        Annotated[
            Duration,
            described(
                f"of one sample, at most {_LONGEST_S / 3600:g}h; whole seconds, but for latency alone",
                default=f"{DEFAULT_DURATION_S:g}s",
            ),
        ]
        | None
    ) = None
    clients: Annotated[int, described("connections that wrk holds open at once", ge=1, le=10000)] = DEFAULT_CLIENTS
    endpoints: Annotated[int, described("of each Service that is only there to be many", ge=1, le=100)] = 1
    seed: Annotated[int, described("of the bootstrap that the intervals come from", ge=0, le=1 << 31)] = DEFAULT_SEED
    one_kernel: Annotated[
        bool, described("all modes in the same kernel: this one if it runs them all, else the nested one")
    ] = False


class BenchmarkWire(Wire):
    """A benchmark file."""

    api_version: Annotated[Literal["testbed/v1"], described("the version of the format")] | None
    kind: Annotated[Literal["Benchmark"], described("what the file is")] | None
    metadata: Annotated[MetadataWire | None, described("its name")]
    spec: Annotated[SpecWire | None, described("what is measured")]


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
