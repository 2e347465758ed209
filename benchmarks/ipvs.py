#!/usr/bin/env python3
"""How long kube-proxy takes in ipvs mode, beside what the bare tools take for the same content in the same kernel.

For 1,000 and 5,000 Services with three endpoints each: the first full sync of an empty node, a full sync that finds all as
it should be, one endpoint changes, one Service is added. Floors, in the same run: ``ipvsadm -R``, ``ipset restore``,
``ip -batch`` and ``iptables-restore`` of what the full sync left; for changes the same tools with the few lines that make
them; and one /bin/true, to know the machine. Every number is the least of several rounds.

On a kernel without ip_vs it runs itself in the nested one. ``--json`` prints a list of rows; ``--check`` ends with status 1
when a bar is missed: a change within 50 ms, a full sync within 1.5 times the bare restore. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from sync import ENDPOINTS, Bench, Candidate, Recorder, a_service, a_slice, in_namespace  # noqa: E402

SIZES = (1000, 5000)
FULL_ROUNDS, CHANGES = 2, 10
MOST_CHANGE_S, MOST_FULL_RATIO = 0.05, 1.5
CANDIDATE = Candidate("ipvs", "legacy", (), ())
Tools = dict[str, tuple[list[str], str]]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def content(recorder: Recorder) -> Tools:
    """Return what the tools would restore to have what is there, as argument list and standard input of each."""
    addresses = [line.split()[3] for line in recorder.run(["ip", "-o", "addr", "show", "kube-ipvs0"]).splitlines()]
    return {
        "ip": (["ip", "-batch", "-"], "link add kube-ipvs0 type dummy\n"
               + "".join(f"addr add {address} dev kube-ipvs0\n" for address in addresses)),
        "ipvsadm": (["ipvsadm", "-R"], recorder.run(["ipvsadm", "-Sn"])),
        "ipset": (["ipset", "-exist", "restore"], recorder.run(["ipset", "save"])),
        "iptables": (["iptables-legacy-restore", "--counters"], recorder.run(["iptables-legacy-save"])),
    }  # fmt: skip


def restore(recorder: Recorder, tools: Tools) -> None:
    for argv, text in tools.values():
        recorder.run(argv, stdin=text)


def timed_restore(recorder: Recorder, tools: Tools) -> float:
    return seconds(lambda: restore(recorder, tools))


def changed(number: int, before: int, after: int) -> Tools:
    """Return what takes a Service's endpoint of one generation to another one, in the tools' words."""
    address = a_service(number)["spec"]["clusterIP"]
    old, new = (a_slice(number, generation)["endpoints"][-1]["addresses"][0] for generation in (before, after))
    lines = f"-a -t {address}:80 -r {new}:8080 -m -w 1\n-d -t {address}:80 -r {old}:8080\n"
    return {"ipvsadm": (["ipvsadm", "-R"], lines)}


def added(number: int) -> Tools:
    """Return what adds a Service."""
    address = a_service(number)["spec"]["clusterIP"]
    ends = [endpoint["addresses"][0] for endpoint in a_slice(number)["endpoints"]]
    servers = [f"-A -t {address}:80 -s rr", *(f"-a -t {address}:80 -r {end}:8080 -m -w 1" for end in ends)]
    members = [
        f"add KUBE-CLUSTER-IP {address},tcp:80",
        f"add KUBE-IPVS-IPS {address}",
        f"add KUBE-LOOP-BACK {ends[0]},tcp:8080,{ends[0]}",
    ]
    return {
        "ip": (["ip", "-batch", "-"], f"addr add {address}/32 dev kube-ipvs0\n"),
        "ipvsadm": (["ipvsadm", "-R"], "".join(f"{line}\n" for line in servers)),
        "ipset": (["ipset", "restore"], "".join(f"{line}\n" for line in members)),
    }  # fmt: skip


def removed(tools: Tools) -> Tools:
    """Return what takes an added Service away again."""
    other = {"-A": "-D", "-a": "-d", "add": "del", "addr add": "addr del"}
    found: Tools = {}
    for name, (argv, text) in tools.items():
        lines = text.splitlines()
        if name == "ipvsadm":
            lines = ["-D " + lines[0].split(" ", 1)[1].partition(" -s")[0]]
        else:
            word = "addr add" if name == "ip" else "add"
            lines = [line.replace(word, other[word], 1) for line in lines]
        found[name] = (argv, "".join(f"{line}\n" for line in lines))
    return found


def measure_full(services: int) -> Callable[[str], Any]:
    def work(folder: str) -> Any:
        bench = Bench(CANDIDATE, services, folder)
        full_s = bench.sync()[0]
        tools = content(bench.recorder)
        bench.proxier.require_full()
        return full_s, bench.sync()[0], tools

    return work


def measure_bare(tools: Tools) -> Callable[[str], float]:
    return lambda folder: timed_restore(Recorder({"XTABLES_LOCKFILE": f"{folder}/lock"}), tools)


def measure_changes(services: int) -> Callable[[str], Any]:
    def work(folder: str) -> Any:
        bench = Bench(CANDIDATE, services, folder)
        bench.sync()
        run = bench.recorder
        found: dict[str, list[float]] = {name: [] for name in ("change", "floor_change", "add", "floor_add", "true")}
        for round_ in range(1, CHANGES + 1):
            number = services // 2 + round_
            bench.tracker.set_slice(a_slice(number, 1))
            found["change"].append(bench.sync()[0])
            for before, after in ((1, 0), (0, 1)):  # undone and done again by the tool
                found["floor_change"].append(timed_restore(run, changed(number, before, after)))
            number = services + round_
            bench.tracker.set_service(a_service(number))
            bench.tracker.set_slice(a_slice(number))
            found["add"].append(bench.sync()[0])
            tools = added(number)
            restore(run, removed(tools))
            found["floor_add"].append(timed_restore(run, tools))
            found["true"].append(seconds(lambda: run.run(["true"])))
        assert bench.proxier.find_damage() == "", bench.proxier.find_damage()
        return {f"{name}_s": min(values) for name, values in found.items()}

    return work


def measure(services: int) -> dict[str, Any]:
    rounds = [in_namespace(measure_full(services)) for _ in range(FULL_ROUNDS)]
    floors = [in_namespace(measure_bare(tools)) for _, _, tools in rounds]
    return {
        "mode": "ipvs", "services": services, "endpoints": ENDPOINTS,
        "full_s": min(full for full, _, _ in rounds), "floor_full_s": min(floors),
        "unchanged_s": min(again for _, again, _ in rounds), **in_namespace(measure_changes(services)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="status 1 when a bar is missed")
    parser.add_argument("--services", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("needs root, for network namespaces")
    from testbed.kernel.modules import why_no_ipvs

    if why_no_ipvs():
        inside = [sys.executable, "-m", "testbed", "vm", "--memory", "3G", "--", sys.executable, *sys.argv]
        os.chdir(_ROOT)
        os.execv(sys.executable, inside)
    rows = []
    if not options.json:
        print("services    full  (bare)  unchanged   change  (bare)      add  (bare)   /bin/true")
    for services in options.services:
        row = measure(services)
        rows.append(row)
        if not options.json:
            print(
                f"{services:8} {row['full_s']:7.2f} ({row['floor_full_s']:5.2f}) {row['unchanged_s']:10.2f} "
                f"{row['change_s']:8.4f} ({row['floor_change_s']:5.3f}) {row['add_s']:8.4f} ({row['floor_add_s']:5.3f}) "
                f"{row['true_s']:11.4f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=2))
    missed = [
        f"{r['services']} Services: a change takes {r['change_s']:.3f} s" for r in rows if r["change_s"] > MOST_CHANGE_S
    ]
    missed += [
        f"{r['services']} Services: a full sync takes {r['full_s'] / r['floor_full_s']:.2f} times a bare restore"
        for r in rows
        if r["full_s"] > MOST_FULL_RATIO * r["floor_full_s"]
    ]
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
