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


BILLION_FILES = 'sysctl -qw fs.nr_open=1073741816 && ulimit -n 1000000000 && exec "$0" "$@"'


@pytest.mark.timeout(200)
def test_quickstart_in_iptables_mode() -> None:
    """A whole lab runs there: iptables-legacy is chosen, because nf_tables has no NAT, and the report names the kernel.

    And nothing takes long because a process may open a thousand million files, which only a kernel of our own lets us try.
    """
    command = [sys.executable, "-m", "testbed", "run", "scenarios/quickstart", "--proxy-mode", "iptables", "-o", "json"]
    if is_nested():
        command = ["bash", "-c", BILLION_FILES, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (result,) = json.loads(done.stdout)["results"]
    assert (result["mode"], result["kernel"], result["passed"]) == (
        "iptables",
        "nested" if is_nested() else "own",
        True,
    )


def test_nftables_mode_is_refused_at_once() -> None:
    """Its nf_tables can be listed and has no NAT: a kube-proxy would try for ever."""
    if not is_nested():
        pytest.skip("this kernel has ip_vs itself, and NAT in nf_tables")
    for argv in (["up", "never"], ["run", "scenarios/quickstart"]):
        done = subprocess.run(
            [sys.executable, "-m", "testbed", *argv, "--proxy-mode", "nftables"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(
            "error: this kernel has no NAT in nf_tables (nft_chain_nat, nft_nat, nft_masq): nft said "
        )
        assert done.stderr.count("\n") == 1
