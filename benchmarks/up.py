#!/usr/bin/env python3
"""How long a lab takes to start and to go, and how quick the command line answers.

Prints seconds, medians of ROUNDS: `testbed up` of three nodes until kube-proxy has synced on each, `testbed down`, the
time from SIGKILL of the lab's first process until its last process has ended, `testbed --help`, and `testbed validate` of
a scenario. ``--json`` prints an object. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS = 5
NAME = f"bench-up-{os.getpid()}"
BUDGETS_S = {"up_s": 2.0, "down_s": 1.0, "killed_s": 1.0, "help_s": 0.2, "validate_s": 0.5}


def command(*words: str) -> None:
    argv = [sys.executable, "-m", "testbed", *words]
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def took(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def kill_and_wait() -> None:
    """SIGKILL the lab's first process, and wait for its end: a PID namespace's first process is the last to go."""
    from testbed.lab.folder import find_record

    pidfd = os.pidfd_open(find_record(NAME).pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    import select

    select.select([pidfd], [], [])
    os.close(pidfd)


def measure() -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in BUDGETS_S}
    for _ in range(ROUNDS):
        seconds["up_s"].append(took(lambda: command("up", NAME, "-t", "three-nodes")))
        seconds["down_s"].append(took(lambda: command("down", NAME)))
        command("up", NAME, "-t", "three-nodes")
        seconds["killed_s"].append(took(kill_and_wait))
        seconds["help_s"].append(took(lambda: command("--help")))
        seconds["validate_s"].append(took(lambda: command("validate", "scenarios/quickstart")))
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/up.py needs root: it starts labs")
    measured = measure()
    if options.json:
        print(json.dumps(measured))
        return
    print(f"seconds, median of {ROUNDS}")
    for name, value in measured.items():
        print(f"  {name.removesuffix('_s'):<10} {value:6.2f}    budget {BUDGETS_S[name]:g}")


if __name__ == "__main__":
    main()
