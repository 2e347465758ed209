"""Every golden case in iptables mode: what we write, put into a real kernel, equals what a real kube-proxy wrote."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from compare import differences, parse
from proxy_support import real_iptables, without_counters

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.iptables import Installed, IptablesRenderer, make_settings, parse_installed, saved_form
from testbed.dataplane.state import ProxyState
from testbed.kernel.iptables import Backend, Iptables
from testbed.model.proxyconfig import KubeProxyConfig, parse_proxy_config
from testbed.model.service import NodeView, parse_node

CASES = sorted((Path(__file__).parent / "kube-proxy").glob("*.yaml"))


def read_case(path: Path) -> tuple[KubeProxyConfig, NodeView, ProxyState]:
    """Return the configuration, the node and the Services and endpoints that one golden file describes."""
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text()))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for obj in objects:
        by_kind.setdefault(obj["kind"], []).append(obj)
    config, problems = parse_proxy_config(by_kind["KubeProxyConfiguration"][0])
    assert not problems
    node = parse_node(by_kind["Node"][0])
    tracker = ChangeTracker(node.name)
    tracker.replace_services(by_kind.get("Service", []))
    tracker.replace_slices(by_kind.get("EndpointSlice", []))
    return config, node, tracker.take()[0]


def load(path: Path) -> IptablesRenderer:
    """Return a renderer that has taken in the state that one golden file describes."""
    config, node, state = read_case(path)
    assert node.internal_ip is not None
    settings = make_settings(config, node, [IPv4Address("127.0.0.1"), node.internal_ip])
    renderer = IptablesRenderer(settings)
    renderer.update(state)
    return renderer


@pytest.fixture(params=list(Backend), ids=lambda backend: backend.value)
def iptables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Iptables]:
    """The tools of one family in a network namespace of their own."""
    with real_iptables(request.param, tmp_path) as runner:
        yield Iptables(runner, request.param)


@pytest.mark.root
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernel_holds_what_kube_proxy_wrote(path: Path, iptables: Iptables) -> None:
    """The rules saved after a restore of ours are those saved after a sync of upstream's kube-proxy v1.30."""
    renderer = load(path)
    payload = renderer.full(Installed())
    iptables.apply(payload.text)
    saved = iptables.save()
    ours = {key: rules for key, rules in parse(without_counters(saved)).items() if key[0] in ("filter", "nat")}
    assert list(differences(ours, parse(path.with_suffix(".iptables").read_text()))) == []
    # We know every line as it is printed, so a second full sync finds that there is nothing to write.
    written = [saved_form(line) for line in payload.text.splitlines() if line.startswith("-A")]
    assert sorted(written) == sorted(line for line in saved.splitlines() if line.startswith("-A KUBE-"))
    assert renderer.full(parse_installed(saved)).text == ""
