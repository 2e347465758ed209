"""Every scenario file, run as a user runs it: real kernel rules, real packets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2] / "scenarios"
SCENARIOS = sorted(ROOT.glob("*/scenario.yaml"))
COURSES = sorted({path.parents[1] for path in ROOT.glob("*/*/scenario.yaml")})


@pytest.mark.parametrize("folder", [path.parent for path in SCENARIOS] + COURSES, ids=lambda folder: folder.name)
def test_scenario(folder: Path) -> None:
    """Every step of the scenario passes, in each of its proxy modes; those that this kernel lacks run in the nested one.

    A course is a folder of scenarios that share a lab.
    """
    command = [sys.executable, "-m", "testbed", "run", str(folder), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)
