"""Many labs at once, and many nodes and pods in one: benchmarks/scale.py with numbers that a test run has time for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.root]


def scale(*words: str) -> dict[str, float]:
    """Run the benchmark, which ends with a status when something is missing, and return its figures."""
    argv = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--json", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_three_labs_and_six_nodes() -> None:
    """Three labs at once keep apart; on six nodes every one of 60 pods is answered by every Service."""
    found = scale("--labs", "3", "--nodes", "6", "--pods", "10")
    assert found["labs"] == 3
    assert (found["pods"], found["services"], found["requests"]) == (60, 2, 120)
    assert found["pods_that_answered"] > 30  # 120 requests to 60 pods miss a few by chance, and half of them never


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_eight_labs_and_twenty_nodes(mode: str) -> None:
    """Eight labs at once; 1,000 pods on 20 nodes, each answered by 20 Services, each of them answering some."""
    found = scale("--labs", "8" if mode == "iptables" else "0", "--nodes", "20", "--pods", "50", "--proxy-mode", mode)
    assert (found["pods"], found["services"], found["requests"]) == (1000, 20, 20_000)
    # 1,000 requests to each Service of 50 pods: that one of the 1,000 pods is never chosen has a chance of 2 in a million
    assert found["pods_that_answered"] == 1000
