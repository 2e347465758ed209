#!/usr/bin/env python3
"""How long kube-proxy takes to write its rules, beside what the bare tool takes for the same text on the same table.

For 1,000, 5,000 and 10,000 Services with three endpoints each, per mode and backend: the first full sync of an empty node,
one endpoint changes, one Service is added. ``full_s`` and ``change_s`` run from "the objects are there" to "the kernel has
the rules"; ``floor_…_s`` is a bare restore of what was sent, in the same run, on a table in the same state. Every number
is the least of several rounds, ours and the floor's in turns. ``peak_mib`` is the most memory the syncing process used.

``--json`` prints a list of rows: mode, backend, services, full_s, floor_full_s, change_s, floor_change_s, add_s,
floor_add_s, peak_mib. ``--check`` ends with status 1 when a bar is missed. Needs root. Everything lives in network
namespaces of child processes and goes with them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = (1000, 5000, 10000)
ENDPOINTS = 3
ROUNDS = 4
CHANGES = 5
MOST_FULL_RATIO, MOST_CHANGE_RATIO = 1.5, 1.3
MOST_CHANGE_S_AT_5000 = {"iptables": 0.6, "nftables": 0.05}
NODE = "node1"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mode and backend to measure.

    ``floor`` is the argument list that loads a payload from standard input; ``full_floor`` the fastest one for an empty
    table. ``reverse`` undoes a change, for tools that refuse the same one twice. Adding a mode: one more entry in
    `CANDIDATES`.
    """

    mode: str
    backend: str
    floor: tuple[str, ...]
    full_floor: tuple[str, ...]
    reverse: Callable[[str], str] | None = None


def swapped_elements(text: str) -> str:
    """Return an nft payload with what it adds to sets and what it deletes from them exchanged."""
    other = {"add": "delete", "delete": "add"}
    lines = [line.split(" ", 2) for line in text.splitlines()]
    return "".join(f"{other[verb] if kind == 'element' else verb} {kind} {rest}\n" for verb, kind, rest in lines)


CANDIDATES = (
    Candidate(
        "iptables", "legacy", ("iptables-legacy-restore", "--noflush", "--counters"), ("iptables-legacy-restore", "--counters")
    ),
    # without --noflush, which makes iptables-nft linear (docs/adr/0005-iptables-restore.md); the table is empty anyway
    Candidate("iptables", "nft", ("iptables-nft-restore", "--noflush", "--counters"), ("iptables-nft-restore", "--counters")),
    Candidate("nftables", "nft", ("nft", "-f", "-"), ("nft", "-f", "-"), swapped_elements),
)  # fmt: skip


def cluster(services: int) -> tuple[list[Any], list[Any]]:
    """Return Services and EndpointSlices."""
    made = [(a_service(number), a_slice(number)) for number in range(services)]
    return [service for service, _ in made], [endpoint_slice for _, endpoint_slice in made]


def a_service(number: int) -> Any:
    address = f"172.{30 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
    spec = {"type": "ClusterIP", "clusterIP": address, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}
    return {"metadata": {"name": f"service-{number}", "namespace": "bench"}, "spec": spec}


def a_slice(number: int, generation: int = 0) -> Any:
    """Return the slice of a Service; the last endpoint's address depends on the generation."""
    tails = [*range(1, ENDPOINTS), ENDPOINTS + generation]
    addresses = [f"10.{64 + tail}.{number // 250}.{number % 250 + 1}" for tail in tails]
    return {
        "addressType": "IPv4",
        "metadata": {
            "name": f"service-{number}-x", "namespace": "bench",
            "labels": {"kubernetes.io/service-name": f"service-{number}"},
        },
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "nodeName": f"node{i}"} for i, address in enumerate(addresses, 1)],
    }  # fmt: skip


class Recorder:
    """Runs programs, and keeps what they are given to write."""

    def __init__(self, env: Mapping[str, str]) -> None:
        from testbed.kernel.runner import SubprocessRunner

        self._runner = SubprocessRunner(env)
        self.texts: list[str] = []

    def run(self, argv: Any, *, stdin: str = "", timeout_s: float = 600) -> str:
        if stdin:
            self.texts.append(stdin)
        return self._runner.run(argv, stdin=stdin, timeout_s=timeout_s)

    def take(self) -> str:
        """Return everything that was sent since the last call."""
        texts, self.texts = self.texts, []
        return "".join(texts)


class Bench:
    """One kube-proxy without an API, in the network namespace of this process."""

    def __init__(self, candidate: Candidate, services: int, folder: str) -> None:
        from testbed.dataplane.changes import ChangeTracker
        from testbed.model.proxyconfig import parse_proxy_config
        from testbed.model.service import NodeName, NodeView
        from testbed.programs.kube_proxy import collect_garbage_seldom, make_proxier

        collect_garbage_seldom()
        self.recorder = Recorder({"XTABLES_LOCKFILE": f"{folder}/lock"})
        self.tracker = ChangeTracker(NODE)
        document = {"mode": candidate.mode, "clusterCIDR": "10.0.0.0/8"}
        config = parse_proxy_config(document)[0]
        self.proxier = make_proxier(config, self.recorder, candidate.backend)
        self.settings = self.proxier.make_settings(config, NodeView(name=NodeName(NODE)), ())
        objects = cluster(services)
        self.tracker.replace_services(objects[0])
        self.tracker.replace_slices(objects[1])

    def sync(self) -> tuple[float, str]:
        """Return how long a sync took, decoding included, and what it sent."""
        started = time.perf_counter()
        state, changed = self.tracker.take()
        report = self.proxier.sync(state, changed, self.settings)
        took = time.perf_counter() - started
        return took, self.recorder.take() or report.payload.text  # nftables mode sends small changes without the tool


def bare(recorder: Recorder, argv: tuple[str, ...], text: str) -> float:
    started = time.perf_counter()
    recorder.run(argv, stdin=text)
    took = time.perf_counter() - started
    recorder.take()
    return took


def measure_full(candidate: Candidate, services: int) -> Callable[[str], Any]:
    def work(folder: str) -> Any:
        bench = Bench(candidate, services, folder)
        took, text = bench.sync()
        return took, text, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return work


def measure_bare(candidate: Candidate, text: str) -> Callable[[str], Any]:
    return lambda folder: bare(Recorder({"XTABLES_LOCKFILE": f"{folder}/lock"}), candidate.full_floor, text)


def measure_changes(candidate: Candidate, services: int) -> Callable[[str], Any]:
    """Return the least seconds of a change and of an added Service, ours and bare, on a node that has all the others."""

    def work(folder: str) -> Any:
        bench = Bench(candidate, services, folder)
        bench.sync()
        found: dict[str, list[float]] = {"change_s": [], "floor_change_s": [], "add_s": [], "floor_add_s": []}
        for round_ in range(1, CHANGES + 1):
            number = services // 2 + round_
            bench.tracker.set_slice(a_slice(number, round_))
            took, text = bench.sync()
            found["change_s"].append(took)
            again = [text] if candidate.reverse is None else [candidate.reverse(text), text]
            found["floor_change_s"] += [bare(bench.recorder, candidate.floor, each) for each in again]
        for round_ in range(CHANGES):
            bench.tracker.set_service(a_service(services + round_))
            bench.tracker.set_slice(a_slice(services + round_))
            took, text = bench.sync()
            found["add_s"].append(took)
            found["floor_add_s"].append(bare(bench.recorder, candidate.floor, text))
        return {name: min(values) for name, values in found.items()}

    return work


def in_namespace(work: Callable[[str], Any]) -> Any:
    """Return ``work(folder)`` from a child in a network namespace of its own."""
    from testbed.kernel import linux

    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="testbed-bench-") as folder:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                linux.unshare(linux.CLONE_NEWNET)
                with os.fdopen(writing, "wb") as file:
                    file.write(pickle.dumps(work(folder)))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            packed = file.read()
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the measurement failed")
        return pickle.loads(packed)


def measure(candidate: Candidate, services: int) -> dict[str, Any]:
    full, floor, peak = [], [], 0.0
    for _ in range(ROUNDS):
        took, text, peak = in_namespace(measure_full(candidate, services))
        full.append(took)
        floor.append(in_namespace(measure_bare(candidate, one_transaction(text))))
    row = {"mode": candidate.mode, "backend": candidate.backend, "services": services}
    row |= {"full_s": min(full), "floor_full_s": min(floor)}
    row |= in_namespace(measure_changes(candidate, services))
    return {**row, "peak_mib": peak}


def one_transaction(text: str) -> str:
    """Return an iptables payload with one block per table: what one would restore who has nothing to restore beside it."""
    blocks: dict[str, tuple[list[str], list[str]]] = {}
    declared, rules = [], []
    for line in text.splitlines():
        if line.startswith("*"):
            declared, rules = blocks.setdefault(line, ([], []))
        elif line.startswith(":"):
            declared.append(line)
        elif line != "COMMIT":
            rules.append(line)
    if not blocks:
        return text
    whole = ""
    for table, (declared, rules) in blocks.items():
        whole += "\n".join([table, *dict.fromkeys(declared), *rules, "COMMIT"]) + "\n"
    return whole


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Return what is slower than it may be."""
    missed = []
    for row in rows:
        name = f"{row['mode']}/{row['backend']} with {row['services']} Services"
        if row["full_s"] > MOST_FULL_RATIO * row["floor_full_s"]:
            missed.append(f"{name}: a full sync takes {row['full_s'] / row['floor_full_s']:.2f} times a bare restore")
        if row["change_s"] > MOST_CHANGE_RATIO * row["floor_change_s"]:
            missed.append(f"{name}: a change takes {row['change_s'] / row['floor_change_s']:.2f} times a bare restore")
        if row["services"] == 5000 and row["change_s"] > MOST_CHANGE_S_AT_5000[row["mode"]]:
            missed.append(f"{name}: a change takes {row['change_s']:.2f} s")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="status 1 when a bar is missed")
    parser.add_argument("--mode", help="only this mode")
    parser.add_argument("--backend", help="only this backend")
    parser.add_argument("--services", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("needs root, for network namespaces")
    rows = []
    if not options.json:
        print("mode      backend  services    full  (bare)   change  (bare)      add  (bare)    peak")
    for candidate in CANDIDATES:
        if options.mode not in (None, candidate.mode) or options.backend not in (None, candidate.backend):
            continue
        for services in options.services:
            row = measure(candidate, services)
            rows.append(row)
            if not options.json:
                print(
                    f"{row['mode']:9} {row['backend']:7} {services:9} {row['full_s']:7.2f} ({row['floor_full_s']:5.2f}) "
                    f"{row['change_s']:8.3f} ({row['floor_change_s']:5.3f}) {row['add_s']:8.3f} ({row['floor_add_s']:5.3f}) "
                    f"{row['peak_mib']:4.0f} MiB",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=2))
    missed = missed_bars(rows)
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
