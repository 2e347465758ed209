"""`testbed proxy sync` in a network namespace of its own: what a user compares with a node of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nft_support import real_nft
from proxy_support import real_iptables

from testbed.errors import CommandError
from testbed.kernel.iptables import Backend
from testbed.kernel.runner import Runner, SubprocessRunner

pytestmark = pytest.mark.root

CASES = Path(__file__).parents[1] / "golden" / "kube-proxy"
sys.path.insert(0, str(CASES.parent))
from compare import differences, parse  # noqa: E402  (tests/golden is no package)


@pytest.fixture(params=list(Backend), ids=lambda backend: backend.value)
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Runner, Backend]]:
    """A namespace, and which iptables is to be used in it."""
    with real_nft(), real_iptables(request.param, tmp_path) as runner:
        yield runner, request.param


def sync(runner: Runner, *words: str) -> str:
    return runner.run([sys.executable, "-m", "testbed", "proxy", "sync", *words])


def test_sync_and_clean_up(here: tuple[Runner, Backend]) -> None:
    """Rules equal upstream's; a second time there is nothing to write; the other mode replaces them; --cleanup removes them."""
    runner, backend = here
    case, options = str(CASES / "tutorial.yaml"), ("--node", "node1", "--iptables-backend", backend.value)
    save = [f"iptables-{backend.value}-save"]
    assert sync(runner, *options, case).startswith("iptables: ")
    rules = {key: found for key, found in parse(runner.run(save)).items() if key[0] in ("filter", "nat")}
    assert list(differences(rules, parse((CASES / "tutorial.iptables").read_text()))) == []
    assert sync(runner, *options, case) == "iptables: nothing to write: all is as it should be\n"
    assert sync(runner, "--mode", "nftables", *options, case).startswith("nftables: ")
    assert "KUBE-SERVICES" not in runner.run(save)
    assert "chain services" in runner.run(["nft", "list", "table", "ip", "kube-proxy"])
    assert sync(runner, "--mode", "nftables", *options, case) == "nftables: nothing to write: all is as it should be\n"
    assert sync(runner, "--cleanup", "--iptables-backend", backend.value) == ""
    assert "kube-proxy" not in runner.run(["nft", "list", "tables"])
    assert sync(runner, *options, case).startswith("iptables: ")
    sync(runner, "--cleanup", "--iptables-backend", backend.value)
    left = runner.run(save)
    assert "KUBE-SERVICES" not in left and "KUBE-POSTROUTING" not in left
    sync(runner, "--cleanup", "--iptables-backend", backend.value)  # deleting what is absent succeeds


def test_missing_tool_is_exit_3(tmp_path: Path) -> None:
    """nft is not there: the message says what to install."""
    with real_nft() as runner:
        assert isinstance(runner, SubprocessRunner)
        env = {"PATH": str(tmp_path), "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-m", "testbed", "proxy", "sync", "--mode", "nftables", "--node", "node1"]
        done = subprocess.run(
            [*command, str(CASES / "tutorial.yaml")], env=env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 3
    assert "nft is not installed (apt-get install nftables)" in done.stderr


def test_mistakes_are_exit_2(tmp_path: Path) -> None:
    """A file with a mistake is refused before anything is touched."""
    file = tmp_path / "bad.yaml"
    file.write_text("apiVersion: v1\nkind: Service\nmetadata: {}\n")
    with real_nft() as runner:
        with pytest.raises(CommandError) as refusal:
            sync(runner, "--node", "node1", "--mode", "nftables", str(file))
        assert (
            refusal.value.status == 2
            and f'{file}:3: metadata: required field "name" is missing' in refusal.value.stderr
        )
        assert runner.run(["nft", "list", "tables"]) == ""
