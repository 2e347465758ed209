"""ipvs mode in a real kernel: changes, repairs, leftovers, and kube-proxy as a process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeNamespace
from ipvs_support import FakeNode, dump, network_namespace, real_node, unlike
from proxy_support import endpoint, endpoint_slice, node_object, service, state_of
from random_cluster import random_objects

from testbed.api.client import ApiClient
from testbed.dataplane.ipvs import Balancing, Change, VirtualServer
from testbed.dataplane.ipvs_rules import DEVICE
from testbed.errors import MissingFeature
from testbed.kernel.iptables import Backend
from testbed.kernel.runner import SubprocessRunner
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node
from testbed.programs.proxy_ipvs import Node
from testbed.programs.proxy_modes import clean_up_all, clean_up_other_modes, make_proxier

pytestmark = [pytest.mark.root, pytest.mark.ipvs]

Eventually = Callable[..., Any]
_START_S, _RECOVERY_S = 120.0, 60.0
WEB = [service("web", "172.30.0.41", node_port=30080, ingress=["5.6.7.8"])]
BOTH = [endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2"))]


def config_of(**fields: Any) -> Any:
    config, problems = parse_proxy_config({"clusterCIDR": "10.0.0.0/8", "mode": "ipvs", **fields})
    assert not problems
    return config


def test_history_ends_as_a_fresh_start_does(tmp_path: Path) -> None:
    """After changes by chance, one by one, the kernel holds what a first sync of the last state makes."""
    view = parse_node(node_object())
    with real_node(tmp_path, "192.168.0.2") as one:
        before: frozenset[Any] = frozenset()
        for seed in range(6):
            state = state_of(*random_objects(seed % 5, services=6))
            changed = before | frozenset(state.services)
            settings = one.proxier.make_settings(config_of(), view)
            report = one.proxier.sync(state, changed, settings)
            assert not report.partial_failed and report.refused == {}
            before = frozenset(state.services)
        walked = dump(one.runner)
        assert one.proxier.find_damage() == ""
    with real_node(tmp_path, "192.168.0.2") as other:
        other.proxier.sync(state, changed, other.proxier.make_settings(config_of(), view))
        assert unlike(walked, dump(other.runner)) == []


@pytest.mark.parametrize("kind", ["real", "fake"])
def test_node_and_its_stand_in_refuse_the_same(kind: str, tmp_path: Path) -> None:
    """What is there cannot be added, what is absent can be deleted; the in-memory node of the unit tests agrees."""
    key, how = VirtualServer("tcp", "172.30.0.9", 80), Balancing()
    member = ("KUBE-CLUSTER-IP", "172.30.0.9,tcp:80")
    whole = Change(
        bind=("172.30.0.9",), add_servers=((key, how),), add_real=((key, "10.0.0.1:80"),), add_members=(member,)
    )

    def check(node: Node) -> None:
        node.ensure({}, node.list())
        assert node.add(whole) == []
        assert {thing for thing, _ in node.add(whole)} == {key}
        assert node.list().objects.servers[key].real == {"10.0.0.1:80": 1}
        other = VirtualServer("tcp", "172.30.0.10", 80)
        assert [thing for thing, _ in node.add(Change(add_real=((other, "10.0.0.1:80"),)))] == [other]
        gone = Change(delete_servers=(key,), delete_members=(member,), unbind=("172.30.0.9",))
        assert (node.remove(gone), node.remove(gone)) == ([], [])
        assert node.list().objects == node.list().objects.__class__()
        assert node.count_connections([(key, "10.0.0.1:80")]) == {}

    if kind == "fake":
        check(FakeNode())
        return
    with real_node(tmp_path, "192.168.0.2") as here:
        check(here.node)


@pytest.mark.parametrize("reals", [3, 40])
def test_all_is_seen_beside_other_nodes(reals: int, tmp_path: Path) -> None:
    """Three nodes in one kernel, each with more than fits into a page of /proc/net/ip_vs, which then leaves some out."""
    keys = [VirtualServer("tcp", f"172.30.1.{number}", 80) for number in range(1, 201)]
    addresses = [f"10.0.0.{number}:80" for number in range(1, reals + 1)]
    change = Change(
        add_servers=tuple((key, Balancing()) for key in keys),
        add_real=tuple((key, real) for key in keys for real in addresses),
    )
    with contextlib.ExitStack() as entered:
        nodes = [entered.enter_context(real_node(tmp_path, f"192.168.0.{number}")).node for number in (2, 3, 4)]
        assert [node.add(change) for node in nodes] == [[], [], []]
        everything = [(key, real) for key in keys for real in addresses]
        for node in nodes:
            found = node.list().objects.servers
            assert {key: dict(server.real) for key, server in found.items()} == {
                key: dict.fromkeys(addresses, 1) for key in keys
            }
            assert node.count_connections(everything) == dict.fromkeys(everything, 0)


def test_damage_is_seen_and_repaired(tmp_path: Path) -> None:
    """Whatever tool somebody uses against our objects: it is named, and repaired."""
    state, view = state_of(WEB, BOTH), parse_node(node_object())
    harms = {
        "the virtual server": ["ipvsadm", "-C"],
        "is gone from the set KUBE-CLUSTER-IP": ["ipset", "flush", "KUBE-CLUSTER-IP"],
        "is gone from kube-ipvs0": ["ip", "addr", "flush", "dev", DEVICE],
        "the link kube-ipvs0 is gone": ["ip", "link", "del", DEVICE],
        "rules": ["iptables-legacy", "-t", "nat", "-F", "KUBE-SERVICES"],
        "a jump is gone": ["iptables-legacy", "-F", "INPUT"],
        "net.ipv4.vs.conntrack is 0": ["sysctl", "-qw", "net.ipv4.vs.conntrack=0"],
    }
    with real_node(tmp_path, "192.168.0.2") as here:
        settings = here.proxier.make_settings(config_of(), view)
        here.proxier.sync(state, frozenset(), settings)
        whole = dump(here.runner)
        for words, harm in harms.items():
            here.run(*harm)
            assert words in here.proxier.find_damage()
            here.proxier.require_full()
            assert here.proxier.sync(state, frozenset(), settings).refused == {}
        assert unlike(whole, dump(here.runner)) == []


def test_cleanup_leaves_nothing(tmp_path: Path) -> None:
    """--cleanup, and a start in nftables mode, remove servers, link, sets and chains; a start in iptables mode none of it."""
    state, view = state_of(WEB, BOTH), parse_node(node_object())
    with real_node(tmp_path, "192.168.0.2") as here:
        settings = here.proxier.make_settings(config_of(), view)
        for remove in (
            lambda: clean_up_all(here.runner, "legacy"),
            lambda: clean_up_other_modes(config_of(mode="nftables"), here.runner, "legacy"),
        ):
            here.proxier.require_full()
            here.proxier.sync(state, frozenset(), settings)
            clean_up_other_modes(config_of(mode="iptables"), here.runner, "legacy")
            assert here.proxier.find_damage() == ""
            remove()
            assert here.run("ipvsadm", "-Sn") == "" and here.run("ipset", "save") == ""
            assert DEVICE not in here.run("ip", "-br", "link")
            saved = here.run("iptables-legacy-save")
            assert [line for line in saved.splitlines() if "KUBE" in line and "KUBE-MARK-MASQ" not in line] == []


def test_scheduler_that_is_missing_is_named(tmp_path: Path) -> None:
    """The kernel is asked; what it cannot load keeps kube-proxy from starting, as upstream, and leaves nothing behind."""
    with network_namespace():
        runner = SubprocessRunner()
        with pytest.raises(MissingFeature, match=r"no IPVS scheduler 'wishful'.*such as rr"):
            make_proxier(config_of(ipvs={"scheduler": "wishful"}), runner, "legacy")
        assert runner.run(["ipvsadm", "-Sn"]) == ""
        for scheduler in ("wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh"):
            with contextlib.closing(make_proxier(config_of(ipvs={"scheduler": scheduler}), runner, "legacy")):  # type: ignore[type-var]
                pass
        assert runner.run(["ipvsadm", "-Sn"]) == ""


def test_timeouts_are_set(tmp_path: Path) -> None:
    """What is 0 stays as the kernel has it."""
    config = config_of(ipvs={"tcpTimeout": "10m", "udpTimeout": "7s"})
    with network_namespace():
        runner = SubprocessRunner({"XTABLES_LOCKFILE": str(tmp_path / "lock")})
        with contextlib.closing(make_proxier(config, runner, "legacy")) as proxier:  # type: ignore[type-var]
            proxier.sync(state_of([], []), frozenset(), proxier.make_settings(config, parse_node(node_object()), ()))
        assert runner.run(["ipvsadm", "-L", "--timeout"]).strip() == "Timeout (tcp tcpfin udp): 600 120 7"


def test_process_is_killed_and_starts_again(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """What it programmed stays and serves; the next one repairs what changed meanwhile, and follows the API."""
    config = {"mode": "ipvs", "ipvs": {"syncPeriod": "1s"}}
    for obj in (*WEB, *BOTH):
        api.create(obj)

    def start() -> Any:
        node.ready_file.unlink(missing_ok=True)
        proxy = node.start_proxy(Backend.LEGACY, config=config)
        eventually(lambda: node.ready_file.exists() or proxy.poll() is not None, within_s=_START_S)
        assert proxy.poll() is None, node.log
        return proxy

    def servers() -> str:
        return node.run("ipvsadm", "-Ln")

    proxy = start()
    assert "TCP  172.30.0.41:80 rr" in servers() and "10.180.1.1:80" in servers()
    assert "\n172.30.0.41,tcp:80" in node.run("ipset", "list", "KUBE-CLUSTER-IP")
    node.run("ipvsadm", "-C")
    eventually(lambda: "172.30.0.41:80" in servers(), within_s=_RECOVERY_S)
    proxy.send_signal(signal.SIGKILL)
    proxy.wait(10)
    assert "10.180.1.1:80" in servers()
    node.run("ipvsadm", "-D", "-t", "172.30.0.41:80")
    api.delete("endpointslices.discovery.k8s.io", "ns", BOTH[0]["metadata"]["name"])
    api.create(endpoint_slice("web", endpoint("10.180.1.9", "node2")))
    start()
    assert "172.30.0.41:80" in servers() and "10.180.1.9:80" in servers() and "10.180.0.1:80" not in servers()


def test_process_without_its_scheduler_says_so(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """It ends with status 3; its log and an event about the Node name the scheduler."""
    proxy = node.start_proxy(Backend.LEGACY, config={"mode": "ipvs", "ipvs": {"scheduler": "wishful"}})
    assert proxy.wait(_START_S) == 3
    assert "can't use the IPVS proxier: the kernel has no IPVS scheduler 'wishful'" in node.log
    found = [e for e in api.list("events")[0] if e["reason"] == "FailedToStartProxy"]
    assert [e["involvedObject"]["name"] for e in found] == ["node1"] and "wishful" in found[0]["message"]
