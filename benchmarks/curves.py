#!/usr/bin/env python3
"""Whether what proxy modes cost over the number of Services has the shape that it has on real clusters.

Runs scenarios/proxy-modes through `testbed bench`, and looks at the straight lines through the medians at 0, 1,000, 5,000
and 10,000 Services:

- iptables: the time to the first answer of a new connection to the last Service rises with each Service beyond noise, in a
  straight line (R² at least 0.9); new connections a second fall. Looked at are the median and the tenth percentile of the
  connections of a sample, which says more on a machine that others use; the shape of the latter is checked.
- nftables, ipvs: the slope is not above 0, or at most a tenth of iptables' (in the same kernel) or of 10.5 ns; that of the
  time itself, or of what it takes beyond a connection without a Service in the same round (in the nested kernel, where all
  share a processor, everything takes longer with more Services);
- throughput of one TCP stream, of the direct path's, does not fall from none to 10,000 Services beyond noise, in any mode.

Prints a line for each slope; ``--json`` an object. ``--check`` ends with status 1 when a shape is wrong. ``--report DIR``
keeps results, plots and report.html; ``--results FILE`` looks at results that are there already, ``--benchmark FILE`` runs
another benchmark. Needs root.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PUBLISHED_NS = 10.5  # a Service at the median; Kubernetes blog, "NFTables mode for kube-proxy", 2025-02-28
LEAST_FIT = 0.9
MOST_OF_IPTABLES = 0.1
LINEAR = ("iptables", "userspace")


def measure(file: Path, folder: Path, modes: str | None) -> None:
    argv = [sys.executable, "-m", "testbed", "bench", "run", str(file), "--report", str(folder)]
    argv += ["--modes", modes] if modes else []
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)


def slopes(results: Any) -> list[dict[str, Any]]:
    """Return a row for each kernel, mode, position and percentile of the first answer: its slope in ns for each Service."""
    return [
        {
            "machine": one.machine,
            "mode": one.mode,
            "path": one.path,
            "position": one.position,
            "metric": one.metric,
            "ns_per_service": one.per_service * 1000,
            "low": one.interval.low * 1000,
            "high": one.interval.high * 1000,
            "fit": one.fit,
            "rises": one.rises,
            "beyond_ns": one.beyond.per_service * 1000 if one.beyond else None,
            "rises_beyond": one.beyond.rises if one.beyond else one.rises,
        }
        for one in results.slopes
        if one.case == "first-answer" and one.path in ("direct", "clusterip")
    ]


def is_checked(row: dict[str, Any]) -> bool:
    return bool(row["position"] == "last" and row["metric"] == "p10")


def wrong_shapes(results: Any, rows: list[dict[str, Any]]) -> list[str]:
    wrong = []
    steep = {row["machine"]: row["ns_per_service"] for row in rows if row["mode"] == "iptables" and is_checked(row)}
    for row in rows:
        name = f"{row['mode']} on {row['machine']}, {row['position']} Service"
        if not is_checked(row):
            continue
        if row["mode"] in LINEAR:
            if not row["rises"]:
                wrong.append(f"{name}: the slope is not above 0")
            if row["fit"] < LEAST_FIT:
                wrong.append(f"{name}: not a straight line, R² {row['fit']:.2f}")
            continue
        most = MOST_OF_IPTABLES * steep.get(row["machine"], PUBLISHED_NS)
        beyond = row["ns_per_service"] if row["beyond_ns"] is None else row["beyond_ns"]
        if row["rises"] and row["ns_per_service"] > most and row["rises_beyond"] and beyond > most:
            wrong.append(
                f"{name}: rises by {row['ns_per_service']:.1f} ns a Service, {beyond:.1f} beyond a connection without one"
            )
    return wrong + wrong_rates(results)


def wrong_rates(results: Any) -> list[str]:
    """Return where new connections do not fall in iptables mode, and where throughput falls with Services."""
    wrong = []
    for one in results.slopes:
        if (
            one.case == "new-connections"
            and one.path == "clusterip"
            and one.mode == "iptables"
            and one.interval.high >= 0
        ):
            wrong.append(f"iptables on {one.machine}: new connections do not fall with Services")
    ends: dict[tuple[str, str], dict[int, Any]] = {}
    for one in results.series:
        if one.metric == "rate" and one.path == "clusterip":
            ends.setdefault((one.machine, one.mode), {})[one.services] = one
    for (machine, mode), found in ends.items():
        few, many = found[min(found)], found[max(found)]
        a, b = (one.ratio.interval for one in (few, many))
        if a and b and b.high < a.low:
            wrong.append(
                f"{mode} on {machine}: throughput falls: {a.low:.2f} – {a.high:.2f}, then {b.low:.2f} – {b.high:.2f}"
            )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="status 1 when a shape is wrong")
    parser.add_argument("--modes", help="only these, with commas between")
    parser.add_argument("--benchmark", type=Path, metavar="FILE", default=ROOT / "scenarios" / "proxy-modes")
    parser.add_argument("--report", type=Path, metavar="DIR")
    parser.add_argument("--results", type=Path, metavar="FILE")
    options = parser.parse_args()
    from testbed.bench.results import read_results

    with tempfile.TemporaryDirectory(prefix="testbed-curves-") as temporary:
        folder = options.results or options.report or Path(temporary)
        if options.results is None:
            measure(options.benchmark.resolve(), folder, options.modes)
        results = read_results(folder)
    rows = slopes(results)
    wrong = wrong_shapes(results, rows)
    if options.json:
        print(json.dumps({"slopes": rows, "wrong": wrong, "warnings": results.warnings}, indent=2))
    else:
        for row in rows:
            slope = f"{row['ns_per_service']:8.2f} ns a Service (95 %: {row['low']:.2f} to {row['high']:.2f})"
            what = f"{row['mode']:9} {row['machine']:6} {row['position'] or row['path']:6} {row['metric']}"
            beyond = "" if row["beyond_ns"] is None else f"; beyond direct {row['beyond_ns']:.2f}"
            print(f"{what} {slope}, R² {row['fit']:.2f}{beyond}; published for iptables: {PUBLISHED_NS}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
