#!/usr/bin/env python3
"""How long `testbed doctor` takes on a healthy lab of three nodes with 100 Services, beside what any command takes.

Starts a lab of its own and prints the median of RUNS runs of `testbed doctor` and of `testbed ls`, which starts the same
Python and looks at nothing. ``--json`` prints the same for machines. Needs root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTBED = [sys.executable, "-m", "testbed"]
LAB = "bench-doctor"
SERVICES, RUNS = 98, 5  # kubernetes and kube-dns are there as well

WEB = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: echo}]
"""
SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {name: web-NUMBER, namespace: default}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
"""


def run(*words: str) -> tuple[float, str]:
    """Return how long a command took, in seconds, and what it printed; it must succeed."""
    began = time.monotonic()
    done = subprocess.run([*TESTBED, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"testbed {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.monotonic() - began, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as manifest:
        manifest.write(WEB + "".join(SERVICE.replace("NUMBER", str(number)) for number in range(SERVICES)))
        manifest.flush()
        run("up", LAB, "-f", manifest.name)
        try:
            run("kubectl", "-l", LAB, "rollout", "status", "deployment/web", "--timeout=60s")
            time.sleep(1.0)  # a change under way costs the doctor a second look
            doctor = statistics.median(run("doctor", "-l", LAB)[0] for _ in range(RUNS))
            listing = statistics.median(run("ls")[0] for _ in range(RUNS))
        finally:
            run("down", LAB)
    if options.json:
        print(
            json.dumps({"doctor_s": round(doctor, 2), "ls_s": round(listing, 2), "ratio": round(doctor / listing, 1)})
        )
    else:
        figures = f"testbed doctor: {doctor:.2f} s; testbed ls: {listing:.2f} s; {doctor / listing:.1f} times"
        print(f"3 nodes, {SERVICES + 2} Services: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
