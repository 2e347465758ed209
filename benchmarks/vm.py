#!/usr/bin/env python3
"""What the nested kernel costs: to boot, to start programs in, to run a lab in.

Prints seconds outside and inside, and their ratio, each the median of ROUNDS in one run: an empty command in a new nested kernel
(its boot and end), /bin/true, `python -c pass`, `testbed --help`, and once `testbed run scenarios/quickstart` in iptables mode.
``--json`` prints an object. Needs root and the package user-mode-linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
BOOT_BUDGET_S = 5.0
TESTBED = [sys.executable, "-m", "testbed"]
COMMANDS = {
    "true": ["/bin/true"],
    "python -c pass": [sys.executable, "-c", "pass"],
    "testbed --help": [*TESTBED, "--help"],
}
SCENARIO = [*TESTBED, "run", "scenarios/quickstart", "--proxy-mode", "iptables"]


def took(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure_here() -> dict[str, float]:
    """Return seconds of each command on the kernel that we run on."""
    found = {name: statistics.median(took(argv) for _ in range(ROUNDS)) for name, argv in COMMANDS.items()}
    found["quickstart"] = took(SCENARIO)
    return found


def measure() -> dict[str, dict[str, float]]:
    boot = statistics.median(took([*TESTBED, "vm", "--", "/bin/true"]) for _ in range(ROUNDS))
    inside = subprocess.run(
        [*TESTBED, "vm", "--", sys.executable, __file__, "--here"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    return {"boot": {"inside": boot}, "outside": measure_here(), "inside": json.loads(inside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here()))
        return
    if os.geteuid() != 0:
        sys.exit("benchmarks/vm.py needs root: it boots a nested kernel")
    measured = measure()
    if options.json:
        print(json.dumps(measured))
        return
    print(f"boot and end   {measured['boot']['inside']:6.2f} s    budget {BOOT_BUDGET_S:g}")
    print(f"{'':<16} {'outside':>9} {'inside':>9} {'ratio':>7}")
    for name, outside_s in measured["outside"].items():
        inside_s = measured["inside"][name]
        print(f"{name:<16} {outside_s:7.3f} s {inside_s:7.3f} s {inside_s / outside_s:7.1f}")


if __name__ == "__main__":
    main()
