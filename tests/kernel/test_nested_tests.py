"""Tests marked ``ipvs`` run on a kernel that has it: this one, or the nested one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.kernel.pace import is_nested

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.root, pytest.mark.ipvs]


def test_the_kernel_has_ipvs() -> None:
    """A marked test finds ip_vs, wherever it runs."""
    assert Path("/proc/net/ip_vs").exists()


@pytest.mark.timeout(200)
def test_quickstart_in_iptables_mode() -> None:
    """A whole lab runs there: iptables-legacy is chosen, because nf_tables has no NAT, and the report names the kernel."""
    command = [sys.executable, "-m", "testbed", "run", "scenarios/quickstart", "--proxy-mode", "iptables", "-o", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (result,) = json.loads(done.stdout)["results"]
    assert (result["mode"], result["kernel"], result["passed"]) == (
        "iptables",
        "nested" if is_nested() else "own",
        True,
    )
