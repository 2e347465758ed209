"""Every scenario file, run as a user runs it: real kernel rules, real packets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.manifests import load_scenario
from testbed.scenario.modes import why_not_here

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

SCENARIOS = sorted((Path(__file__).parents[2] / "scenarios").glob("*/scenario.yaml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.parent.name)
def test_scenario(path: Path) -> None:
    """Every step of the scenario passes, in each of its proxy modes; those that this kernel lacks run in the nested one.

    A scenario whose topology neither can make is skipped, with the feature that is missing.
    """
    command = [sys.executable, "-m", "testbed", "run", str(path.parent), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    topology = load_scenario(path.parent).topology
    if done.returncode == 3 and (lacks := why_not_here("iptables", topology)):
        assert lacks in done.stderr
        pytest.skip(lacks)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)
