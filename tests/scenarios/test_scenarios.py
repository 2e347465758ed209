"""Every scenario file, run as a user runs it: real kernel rules, real packets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools_support import load_tool

from testbed.kernel.pace import patient
from testbed.manifests import find_scenarios, load_scenario
from testbed.scenario.modes import why_not_here

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2] / "scenarios"
SCENARIOS = sorted(ROOT.glob("*/scenario.yaml"))
COURSES = sorted(
    {path.parents[1] for path in ROOT.glob("*/*/scenario.yaml")} - {ROOT / "tutorial"}
)  # that one is below


def _runs() -> Iterator[Any]:
    """Yield each folder of scenarios with the modes of one run. What needs ip_vs or netem is for a kernel that has them."""
    for folder in [path.parent for path in SCENARIOS] + COURSES:
        scenarios = [load_scenario(path) for path in find_scenarios(folder)]
        modes = sorted({mode for scenario in scenarios for mode in scenario.proxy_modes})
        lacks = any(why_not_here("iptables", scenario.topology) for scenario in scenarios)
        if own := [mode for mode in modes if mode != "ipvs"]:
            yield pytest.param(folder, own, id=folder.name, marks=pytest.mark.ipvs if lacks else ())
        if "ipvs" in modes:
            yield pytest.param(folder, ["ipvs"], id=f"{folder.name}-ipvs", marks=pytest.mark.ipvs)


@pytest.mark.parametrize(("folder", "modes"), [*_runs()])
def test_scenario(folder: Path, modes: list[str]) -> None:
    """Every step of the scenario passes, in each of its proxy modes. A course is a folder of scenarios that share a lab."""
    chosen = [word for mode in modes for word in ("--proxy-mode", mode)]
    command = [sys.executable, "-m", "testbed", "run", str(folder), *chosen, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(380), check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)


def _exposures() -> Iterator[Any]:
    """Yield the ingress controller's scenarios with the modes that they do not declare, to keep the ordinary suite short."""
    for path in sorted(ROOT.glob("ingress*/scenario.yaml")):
        others = {"iptables", "ipvs", "nftables", "userspace"} - set(load_scenario(path).proxy_modes)
        if path.parent.name == "ingress":
            others.discard("userspace")  # that proxy connects anew: no policy keeps the client's address
        for mode in sorted(others):
            marks = [pytest.mark.ipvs] if mode == "ipvs" else []
            yield pytest.param(path.parent, mode, id=f"{path.parent.name}-{mode}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "mode"), [*_exposures()])
def test_the_controller_is_reached_in_every_mode(folder: Path, mode: str, tmp_path: Path) -> None:
    """What is in front of nginx is kube-proxy's; whichever mode it has, the three exposures do the same."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    text, found = re.subn(r"proxyModes: \[.*\]", f"proxyModes: [{mode}]", (copy / "scenario.yaml").read_text())
    assert found == 1
    (copy / "scenario.yaml").write_text(text)
    test_scenario(copy, [mode])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial(tmp_path: Path) -> None:
    """All 35 rows pass, and docs/tutorial.md is what tools/tutorial.py makes of this run, but for names and numbers."""
    command = [
        sys.executable,
        "-m",
        "testbed",
        "run",
        str(ROOT / "tutorial"),
        "--report",
        str(tmp_path),
        "--no-capture",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "35 of 35 rows passed" in done.stdout
    generator = load_tool("tutorial")
    outputs = generator.outputs_of_run(json.loads((tmp_path / "scenario.json").read_text()))
    page = (ROOT.parent / "docs" / "tutorial.md").read_text()
    assert generator.normalized(generator.render(outputs)) == generator.normalized(page)
