"""A cluster that only pretends: samplers with seeded noise, and results made from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from testbed.bench.assemble import judged, results_of
from testbed.bench.results import Machine, Results
from testbed.bench.runner import Recording, record
from testbed.bench.session import Session
from testbed.errors import CommandError
from testbed.manifests import find_topology, load_topology
from testbed.model.benchmark import (
    Benchmark,
    Case,
    NetPath,
    Position,
    Workload,
    connections_cases,
    latency_cases,
    sync_cases,
    throughput_cases,
)

FILE = find_topology("bench")
PATHS = (NetPath.DIRECT, NetPath.CLUSTER_IP, NetPath.NODE_PORT)
NS_PER_SERVICE = {"iptables": 0.0105, "nftables": 0.0, "ipvs": 0.0, "userspace": 0.0105}  # µs
THROUGHPUT = tuple(throughput_cases(PATHS, (1, 8)))
LATENCY = tuple(latency_cases((NetPath.CLUSTER_IP,), (Position.LAST,)))
EVERYTHING = (
    *THROUGHPUT, *throughput_cases((NetPath.DIRECT,), (), (200,)), *connections_cases(PATHS, (Position.LAST,)), *LATENCY,
    *sync_cases(),
)  # fmt: skip


def benchmark(**fields: object) -> Benchmark:
    made = Benchmark(
        name="fake", topology=load_topology(FILE), topology_file=FILE, proxy_modes=("iptables", "nftables"), services=(1000,),
        cases=THROUGHPUT,
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


class FakeSite:
    """A mode with known costs: through a Service 10% less than directly, and what iptables takes for each Service.

    Args:
        noise: standard deviation of each sample, as a share of its value.
        drift: how much faster the machine gets with each sample, the same for all paths.
        slows: µs that each Service costs everybody's first answer, whatever the path.
        breaks: cases that a program refuses.
    """

    def __init__(
        self, mode: str, *, seed: int = 1, noise: float = 0.01, speed: float = 1.0, drift: float = 0.0,
        slows: float = 0.0, breaks: Sequence[Case] = (),
    ) -> None:  # fmt: skip
        self.mode = mode
        self.services = 0
        self.asked: list[Case] = []
        self._chance = random.Random(f"{seed}/{mode}")
        self._noise, self._speed, self._drift, self._breaks = noise, speed, drift, breaks
        self._slows = slows

    def prepare(self, services: int) -> None:
        assert services >= self.services, "Services are only added"
        self.services = services

    def sample(self, case: Case) -> dict[str, float]:
        if case in self._breaks:
            raise CommandError(["iperf3"], 1, "unable to connect", where="bench/client")
        self.asked.append(case)
        factor = self._chance.gauss(1, self._noise) * (1 + self._drift * len(self.asked))
        through = 1.0 if case.path.is_baseline else 0.9
        match case.workload:
            case Workload.THROUGHPUT if case.streams:
                return {"rate": 10 * self._speed * through * factor, "retransmits": 3.0, "machine_cpu_gb": 1.5}
            case Workload.THROUGHPUT:
                return {"received": 200 * through * factor, "loss": 0.0, "jitter": 0.02}
            case Workload.CONNECTIONS:
                return {"requests": 20000 * self._speed * through * factor, "p50": 500.0, "p99": 4000.0, "errors": 0.0}
            case Workload.LATENCY:
                passed = 0 if case.path.is_baseline else self.services * NS_PER_SERVICE[self.mode]
                passed += self.services * self._slows
                p50 = (50 / self._speed + passed) * factor
                return {"p10": p50 * 0.9, "p50": p50, "p99": (90 + passed) * factor}
        return {"to_kernel": 40 * factor, "own": 30 * factor}


def a_machine(name: str = "host", kernel: str = "6.18.0") -> Machine:
    return Machine(
        id=name, kernel=kernel, kernel_version="#1 SMP", architecture="x86_64", cpus=2, cpu_model="a processor", memory_mib=4096,
        conntrack_max=262144,
        offloads={"bench/client eth0": {"tcp-segmentation-offload": True, "generic-receive-offload": False}},
        versions={"iperf3": "3.12"}, load_before=0.1, busy_before=0.02, load_during=[],
    )  # fmt: skip


def run(
    asked: Benchmark | None = None, *, seed: int = 1, noise: float = 0.01, speed: float = 1.0, drift: float = 0.0,
    slows: float = 0.0, machine: Machine | None = None,
) -> Results:  # fmt: skip
    """Return the results of a benchmark of fake sites."""
    asked = asked or benchmark()
    session = Session(machine=machine or a_machine(), recording=Recording())
    sites = {
        mode: FakeSite(mode, seed=seed, noise=noise, speed=speed, drift=drift, slows=slows)
        for mode in asked.proxy_modes
    }
    record(asked, sites, session.recording, machine=session.machine.id)
    started = "2026-11-25T23:00:00+00:00"
    return judged(results_of(session, asked, started=started, duration_s=12.3, reason=""))


def write(folder: Path, results: Results) -> Path:
    from testbed.bench.assemble import write_data

    folder.mkdir(exist_ok=True)
    write_data(folder, results)
    return folder
