"""Every golden case in iptables mode: what we write, put into a real kernel, equals what a real kube-proxy wrote."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from compare import differences, parse

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.iptables import Installed, IptablesRenderer, make_settings, parse_installed
from testbed.dataplane.state import ProxyState
from testbed.kernel.iptables import Backend, Iptables
from testbed.kernel.runner import SubprocessRunner
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node

CASES = sorted((Path(__file__).parent / "kube-proxy").glob("*.yaml"))


def load(path: Path) -> tuple[IptablesRenderer, ProxyState]:
    """Return the renderer and the state that one golden file describes."""
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text()))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for obj in objects:
        by_kind.setdefault(obj["kind"], []).append(obj)
    config, problems = parse_proxy_config(by_kind["KubeProxyConfiguration"][0])
    assert not problems
    node = parse_node(by_kind["Node"][0])
    assert node.internal_ip is not None
    tracker = ChangeTracker(node.name)
    tracker.replace_services(by_kind.get("Service", []))
    tracker.replace_slices(by_kind.get("EndpointSlice", []))
    settings = make_settings(config, node, [IPv4Address("127.0.0.1"), node.internal_ip])
    return IptablesRenderer(settings), tracker.take()[0]


@pytest.fixture(scope="module", params=list(Backend), ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Backend:
    """One of the two families of iptables tools."""
    tool = f"iptables-{request.param.value}-restore"
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (apt-get install iptables)")
    return Backend(request.param)


@pytest.fixture
def iptables(backend: Backend, tmp_path: Path) -> Iterator[Iptables]:
    """The tools of one family in a network namespace of their own."""
    holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    holder.stdin.write(b"x")
    holder.stdin.flush()
    holder.stdout.read(1)  # cat runs, so the namespace is there
    enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    try:
        yield Iptables(SubprocessRunner({"XTABLES_LOCKFILE": str(tmp_path / "lock")}, prefix=enter), backend)
    finally:
        holder.communicate()


@pytest.mark.root
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernel_holds_what_kube_proxy_wrote(path: Path, iptables: Iptables) -> None:
    """The rules saved after a restore of ours are those saved after a sync of upstream's kube-proxy v1.30."""
    renderer, state = load(path)
    iptables.apply(renderer.full(state, Installed()).text)
    saved = iptables.save()
    ours = {key: rules for key, rules in parse(strip_counters(saved)).items() if key[0] in ("filter", "nat")}
    assert list(differences(ours, parse(path.with_suffix(".iptables").read_text()))) == []
    # Again, knowing what is there: nothing is added a second time.
    iptables.apply(renderer.full(state, parse_installed(saved)).text)
    again = iptables.save()
    assert strip_counters(again) == strip_counters(saved)


def strip_counters(saved: str) -> str:
    """Return a dump without dates and packet counts."""
    lines = (line.rsplit(" [", 1)[0] for line in saved.splitlines() if not line.startswith("#"))
    return "\n".join(lines)
