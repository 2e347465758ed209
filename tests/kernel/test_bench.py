"""`testbed bench` with real labs and packets: small runs, an interrupt in the middle of one, and a SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from testbed.bench.results import Results, read_results, results_schema
from testbed.kernel.modules import why_no_ipvs
from testbed.lab.folder import list_records

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

TESTBED = [sys.executable, "-m", "testbed", "bench"]
LATENCY = ["latency", "--duration", "0.2s", "--services", "10"]


def labs(modes: tuple[str, ...] = ("iptables", "nftables")) -> list[str]:
    return [
        record.name for record in list_records() if record.name.startswith(tuple(f"bench-{mode}" for mode in modes))
    ]


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    argv = [*TESTBED, *LATENCY, "--samples", "200", "--report", str(folder), *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def two_rounds(folder: Path) -> Results | None:
    """Return the draft of a run that has finished two rounds."""
    if not (folder / "results.json").exists():
        return None
    found = read_results(folder)
    return found if found.series and len(found.series[0].samples) >= 2 else None


HEAD = "apiVersion: testbed/v1\nkind: Benchmark\nmetadata: {name: small}\n"


def small(folder: Path, spec: str) -> dict[str, Any]:
    """Run a benchmark of one round with ten Services; return its results as printed."""
    file = folder / "benchmark.yaml"
    file.write_text(f"{HEAD}spec:\n  services: [10]\n  samples: 1\n{spec}")
    argv = [*TESTBED, "run", str(file), "--report", str(folder / "out"), "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(found, results_schema())
    assert found["complete"] and found["skipped"] == []
    assert labs() == []
    return found


def main_figures(found: dict[str, Any]) -> set[tuple[str, ...]]:
    """Return what has a figure in the table; each has one sample above 0."""
    main = [one for one in found["series"] if one["main"]]
    assert all(len(one["samples"]) == 1 and one["median"] > 0 for one in main)
    return {(one["mode"], one["case"], one["path"], one["position"]) for one in main}


def test_iperf3_and_wrk(tmp_path: Path) -> None:
    """Streams through a ClusterIP, new HTTP connections on one node: rates, ratios, CPU time of both sides; all files."""
    found = small(
        tmp_path,
        """\
  proxyModes: [iptables]
  measure:
    - throughput: {paths: [clusterip], streams: [2]}
    - connections: {paths: [clusterip-same-node], keepAlive: false}
""",
    )
    assert main_figures(found) == {
        ("iptables", "tcp-2", "direct", ""), ("iptables", "tcp-2", "clusterip", ""),
        ("iptables", "new-connections", "direct-same-node", ""), ("iptables", "new-connections", "clusterip-same-node", ""),
    }  # fmt: skip
    ratios = {one["path"]: one["ratio"]["path"] for one in found["series"] if one["ratio"]}
    assert ratios == {"clusterip": "direct", "clusterip-same-node": "direct-same-node"}
    cpu = {one["metric"] for one in found["series"] if "cpu" in one["metric"] and one["median"] > 0}
    assert {"client_cpu", "server_cpu", "machine_cpu", "client_cpu_gb", "server_cpu_gb", "machine_cpu_gb"} <= cpu
    (machine,) = found["machines"]
    assert machine["kernel"] == os.uname().release and machine["offloads"]["node1 eth0"]
    assert {"iperf3", "wrk", "iptables"} <= machine["versions"].keys()
    assert {"report.html", "results.csv", "plots"} <= {entry.name for entry in (tmp_path / "out").iterdir()}


def test_first_answers_and_syncs(tmp_path: Path) -> None:
    """Two modes in turns, 0.2 s each: every path that connections take, both ends of the rules, a change, and all rules."""
    found = small(
        tmp_path,
        """\
  proxyModes: [iptables, nftables]
  duration: 200ms
  measure:
    - latency: {paths: [clusterip, clusterip-same-node, nodeport, loadbalancer], positions: [first, last]}
    - sync: {}
""",
    )
    paths = ("direct", "direct-same-node", "clusterip-same-node", "nodeport", "loadbalancer")
    for mode in ("iptables", "nftables"):
        wanted = {(mode, "first-answer", path, "") for path in paths}
        wanted |= {(mode, "first-answer", "clusterip", position) for position in ("first", "last")}
        wanted |= {(mode, "change", "none", ""), (mode, "full", "none", "")}
        assert {one for one in main_figures(found) if one[0] == mode} == wanted


@pytest.mark.slow
def test_ingress(tmp_path: Path) -> None:
    """Through a NodePort of ingress-nginx, whose pod is on the node that is asked."""
    found = small(
        tmp_path, "  proxyModes: [iptables]\n  measure:\n    - connections: {paths: [ingress], keepAlive: true}\n"
    )
    assert main_figures(found) == {("iptables", "keep-alive", "direct", ""), ("iptables", "keep-alive", "ingress", "")}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_in_the_middle(tmp_path: Path, eventually: Callable[..., object], number: int) -> None:
    """Ctrl-C, or a polite end: what was measured is kept and marked; no lab is left."""
    running = begin(tmp_path, "--modes", "iptables", "--paths", "direct")
    eventually(lambda: two_rounds(tmp_path), within_s=60)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    found = read_results(tmp_path)
    assert not found.complete and found.reason.startswith("interrupted after ")
    assert len(found.series[0].samples) >= 2 and f"INCOMPLETE: {found.reason}" in out
    assert "Incomplete" in (tmp_path / "report.html").read_text()
    assert labs(("iptables",)) == []


def test_killed_in_the_middle(tmp_path: Path, eventually: Callable[..., object]) -> None:
    """SIGKILL: the last whole round is in results.json, marked as incomplete; the lab goes with the command."""
    running = begin(tmp_path, "--modes", "nftables", "--paths", "direct")
    eventually(lambda: two_rounds(tmp_path), within_s=60)
    running.kill()
    running.communicate(timeout=60)
    found = read_results(tmp_path)
    assert not found.complete and found.reason.startswith("the run ended after ")
    assert len(found.series[0].samples) >= 2
    eventually(lambda: not labs(("nftables",)), within_s=20)


@pytest.mark.slow
@pytest.mark.timeout(1700)
@pytest.mark.skipif(shutil.which("linux.uml") is None, reason="no user-mode-linux")
def test_two_kernels(tmp_path: Path) -> None:
    """iptables here and ipvs in the nested kernel, of one command; with --one-kernel both in there."""
    few = [*LATENCY, "--modes", "iptables,ipvs", "--samples", "1", "--paths", "clusterip", "--positions", "last"]
    for words, wanted in (
        ([], {("host", "iptables"), ("nested", "ipvs")}),
        (["--one-kernel"], {("nested", "iptables"), ("nested", "ipvs")}),
    ):
        folder = tmp_path / f"out{len(words)}"
        argv = [*TESTBED, *few, *words, "--report", str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stderr
        found = read_results(folder)
        if why_no_ipvs():
            assert {(one.machine, one.mode) for one in found.series} == wanted
        assert all(one.median > 0 for one in found.series)
