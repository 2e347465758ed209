"""Every scenario file, run as a user runs it: real kernel rules, real packets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.kernel.pace import patient

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SCENARIOS = sorted((Path(__file__).parents[2] / "scenarios").glob("*/scenario.yaml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.parent.name)
def test_scenario(path: Path) -> None:
    """Every step of the scenario passes, in each proxy mode that this version and kernel can run."""
    command = [sys.executable, "-m", "testbed", "run", str(path.parent), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)


@pytest.mark.ipvs
@pytest.mark.parametrize("name", ["quickstart", "affinity"])
def test_scenario_in_ipvs_mode(name: str) -> None:
    """The same file passes in ipvs mode, with the differences that it states."""
    folder = SCENARIOS[0].parents[1] / name
    command = [sys.executable, "-m", "testbed", "run", str(folder), "--proxy-mode", "ipvs", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(120), check=False)
    assert done.returncode == 0, done.stderr + done.stdout
