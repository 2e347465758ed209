"""A benchmark as asked for: what is measured over which paths. What came out of one is in `testbed.bench.results`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from testbed.model.topology import Topology

DEFAULT_SAMPLES = 5
DEFAULT_DURATION_S = 1.0
DEFAULT_CLIENTS = 16
DEFAULT_STREAMS = (1, 8)
DEFAULT_SEED = 1
DEFAULT_TOPOLOGY = "bench"
MOST_SERVICES = 50_000
RESERVED_ADDRESSES = 64  # of the serviceCIDR: for kubernetes, DNS, ingress, and the benchmark's own Services


class Workload(Enum):
    """What is measured."""

    THROUGHPUT = "throughput"  # iperf3: TCP streams, UDP at a rate
    CONNECTIONS = "connections"  # wrk: HTTP requests, each on a new connection or not
    LATENCY = "latency"  # the time to the first answer of a new connection
    SYNC = "sync"  # the time from a change to the kernels' rules


class NetPath(Enum):
    """The way that requests take. The server is in a pod; ``far``: on another node than the client, ``near``: on the same."""

    DIRECT = "direct"  # pod -> far pod
    DIRECT_SAME_NODE = "direct-same-node"  # pod -> near pod
    CLUSTER_IP = "clusterip"  # pod -> ClusterIP -> far pod
    CLUSTER_IP_SAME_NODE = "clusterip-same-node"  # pod -> ClusterIP -> near pod
    NODE_PORT = "nodeport"  # outside host -> a node's port -> pod of another node
    LOAD_BALANCER = "loadbalancer"  # outside host -> the balancer's address, at a node -> pod of another node
    INGRESS = "ingress"  # outside host -> ingress controller -> far pod
    NONE = "none"  # nothing is sent

    @property
    def baseline(self) -> NetPath:
        """The path without a Service that its figures are divided by."""
        return NetPath.DIRECT_SAME_NODE if self in _SAME_NODE else NetPath.DIRECT

    @property
    def is_baseline(self) -> bool:
        return self in (NetPath.DIRECT, NetPath.DIRECT_SAME_NODE)

    @property
    def is_from_outside(self) -> bool:
        return self in (NetPath.NODE_PORT, NetPath.LOAD_BALANCER, NetPath.INGRESS)


_SAME_NODE = (NetPath.DIRECT_SAME_NODE, NetPath.CLUSTER_IP_SAME_NODE)
PATHS = tuple(path.value for path in NetPath if path is not NetPath.NONE)
HTTP_ONLY = (NetPath.INGRESS,)
DEFAULT_PATHS = (NetPath.DIRECT, NetPath.CLUSTER_IP, NetPath.NODE_PORT)


class Position(Enum):
    """Where in the rules the target Service is."""

    FIRST = "first"
    MIDDLE = "middle"
    LAST = "last"


DEFAULT_SERVICES = {
    Workload.THROUGHPUT: (1000,),
    Workload.CONNECTIONS: (1000,),
    Workload.LATENCY: (1, 1000, 5000),
    Workload.SYNC: (1, 1000, 5000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that is sampled. Which of the numbers count depends on the workload."""

    workload: Workload
    path: NetPath
    streams: int = 0  # throughput: TCP streams; 0 for UDP
    rate_mbit: float = 0  # throughput: UDP
    keep_alive: bool = False  # connections: requests share connections
    position: Position | None = None  # connections, latency, through a ClusterIP
    is_full: bool = False  # sync: all rules, instead of one change

    @property
    def name(self) -> str:
        """What it is called in tables and results, without path and position."""
        match self.workload:
            case Workload.THROUGHPUT:
                return f"tcp-{self.streams}" if self.streams else f"udp-{self.rate_mbit:g}mbit"
            case Workload.CONNECTIONS:
                return "keep-alive" if self.keep_alive else "new-connections"
            case Workload.LATENCY:
                return "first-answer"
            case Workload.SYNC:
                return "full" if self.is_full else "change"

    @property
    def baseline(self) -> Case:
        """The same over the path that this one's figures are divided by."""
        return replace(self, path=self.path.baseline, position=None)

    def __str__(self) -> str:
        place = "" if self.path is NetPath.NONE else f" {self.path.value}"
        return f"{self.name}{place}" + (f" ({self.position.value})" if self.position else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A checked benchmark.

    ``services`` are the numbers of Services, besides the few that are asked, at which everything is sampled; ``samples``
    the rounds at each; ``endpoints`` what is behind each of those Services. ``modes_are_given``: somebody named them, so
    that one that cannot be run is an error.
    """

    name: str
    topology: Topology
    topology_file: Path
    proxy_modes: tuple[str, ...]
    services: tuple[int, ...]
    cases: tuple[Case, ...]
    samples: int = DEFAULT_SAMPLES
    duration_s: float = DEFAULT_DURATION_S
    clients: int = DEFAULT_CLIENTS
    endpoints: int = 1
    seed: int = DEFAULT_SEED
    one_kernel: bool = False
    modes_are_given: bool = False

    def has(self, *workloads: Workload) -> bool:
        return any(case.workload in workloads for case in self.cases)


def throughput_cases(paths: Sequence[NetPath], streams: Sequence[int], rates_mbit: Sequence[float] = ()) -> list[Case]:
    """Return TCP with each number of streams, then UDP at each rate, over each path and what it is compared with."""
    return [
        Case(workload=Workload.THROUGHPUT, path=path, streams=number, rate_mbit=rate)
        for number, rate in [*((number, 0.0) for number in streams), *((0, rate) for rate in rates_mbit)]
        for path in with_baselines(paths)
    ]


def connections_cases(
    paths: Sequence[NetPath], positions: Sequence[Position], keep_alive: Sequence[bool] = (True, False)
) -> list[Case]:  # fmt: skip
    """Return HTTP requests on lasting and on new connections."""
    return [
        Case(workload=Workload.CONNECTIONS, path=path, keep_alive=kept, position=position)
        for kept in keep_alive
        for path, position in _placed(paths, positions)
    ]


def latency_cases(paths: Sequence[NetPath], positions: Sequence[Position]) -> list[Case]:
    """Return the time to the first answer, with the target Service in each position."""
    return [
        Case(workload=Workload.LATENCY, path=path, position=position) for path, position in _placed(paths, positions)
    ]


def sync_cases() -> list[Case]:
    """Return one change, and all rules at once."""
    return [Case(workload=Workload.SYNC, path=NetPath.NONE, is_full=is_full) for is_full in (False, True)]


def with_baselines(paths: Sequence[NetPath]) -> list[NetPath]:
    """Return the paths in order, each after the one that it is compared with."""
    return list(dict.fromkeys(found for path in paths for found in (path.baseline, path)))


def _placed(paths: Sequence[NetPath], positions: Sequence[Position]) -> Iterator[tuple[NetPath, Position | None]]:
    for path in with_baselines(paths):
        # Only the far ClusterIP is asked by position: the others belong to Services of the benchmark's own.
        yield from ((path, position) for position in (positions if path is NetPath.CLUSTER_IP else (None,)))


def misfits(
    topology: Topology, services: Sequence[int], cases: Sequence[Case], duration_s: float
) -> list[tuple[str, str]]:  # fmt: skip
    """Return what cannot be measured, as (field, reason)."""
    found = []
    room = topology.cluster.service_cidr.num_addresses - RESERVED_ADDRESSES
    if services and max(services) > room:
        found.append(
            (
                "services",
                f"{max(services)} Services do not fit into the serviceCIDR {topology.cluster.service_cidr} of topology "
                f"{topology.name!r}: it has room for {max(room, 0)}",
            )
        )
    if 0 in services and any(case.workload is Workload.SYNC for case in cases):
        found.append(("services", "0: without a Service there is no change to sync; give 1 or more"))
    if len(topology.nodes) < 2:
        found.append(("topology", f"{topology.name!r} has one node; the server must be on another one than the client"))
    outside = next((case.path.value for case in cases if case.path.is_from_outside), "")
    if outside and not topology.hosts:
        found.append(("topology", f"{topology.name!r} has no outside host, which path {outside!r} begins at"))
    whole = [case for case in cases if case.workload in (Workload.THROUGHPUT, Workload.CONNECTIONS)]
    if whole and (duration_s != int(duration_s) or duration_s < 1):
        found.append(
            (
                "duration",
                f"{duration_s:g}s: iperf3 and wrk count in whole seconds; latency alone may be sampled for less",
            )
        )
    return found
