"""POINTs of `testbed capture`: which interfaces they are, and what is said when there is no such point."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.capture.points import Link, Point, World, resolve_points, service_filter
from testbed.errors import InputError, NotPresent
from testbed.manifests import find_topology, load_topology

TOPOLOGY = load_topology(find_topology("three-nodes"))


def pod(name: str, node: str, ip: str, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "dev", "name": name, "uid": name},
        "spec": {"nodeName": node, **spec},
        "status": {"phase": "Running" if ip else "Pending", "podIP": ip},
    }


PODS = [
    pod("web-1", "node2", "10.244.2.2"),
    pod("web-2", "node3", "10.244.3.2"),
    pod("proxy", "node1", "192.168.93.11", hostNetwork=True),
    pod("waiting", "node1", ""),
    {**pod("done", "node1", "10.244.1.9"), "status": {"phase": "Succeeded", "podIP": "10.244.1.9"}},
]
SERVICE = {
    "metadata": {"namespace": "dev", "name": "web"},
    "spec": {"clusterIP": "10.96.1.10", "clusterIPs": ["10.96.1.10"], "ports": [{"port": 80, "nodePort": 30888}]},
}
OUTSIDE = {"metadata": {"namespace": "dev", "name": "far"}, "spec": {"type": "ExternalName", "externalName": "a.b"}}
SLICE = {
    "metadata": {"namespace": "dev", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
    "ports": [{"port": 8080, "protocol": "TCP"}],
    "endpoints": [
        {"addresses": ["10.244.2.2"], "targetRef": {"kind": "Pod", "name": "web-1"}},
        {"addresses": ["10.244.3.2"], "targetRef": {"kind": "Pod", "name": "web-2"}},
    ],
}


def links_of(place: str) -> list[Link]:
    if place == "dev/waiting":
        raise NotPresent("pod dev/waiting has no network (Pending): wait until it runs")
    lo = Link("lo", b"\0" * 6)
    if place.startswith("node"):
        pods = {"node2": "dev/web-1", "node3": "dev/web-2"}
        veths = [Link(f"veth{place[-1]}", b"\5" * 6, pods[place], b"\6" * 6)] if place in pods else []
        return [Link("eth0", b"\1" * 6), Link("cni0", b"\2" * 6), *veths, lo]
    return [Link("eth0", b"\3" * 6), lo]


WORLD = World(
    lab="lab1", topology=TOPOLOGY, pods=PODS, services=[SERVICE, OUTSIDE], slices=[SLICE], links_of=links_of
)  # fmt: skip


def names(*texts: str) -> list[str]:
    return [point.name for point in resolve_points(texts, WORLD)]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        pytest.param(["node1"], ["node1:eth0", "node1:cni0", "node1:lo"], id="a node"),
        pytest.param(["node2"], ["node2:eth0", "node2:cni0", "node2:veth2", "node2:lo"], id="a node and its pods' links"),
        pytest.param(["client"], ["client:eth0"], id="an outside host"),
        pytest.param(["dev/web-1"], ["dev/web-1:eth0"], id="a pod"),
        pytest.param(["node1:cni0", "client", "client:eth0"], ["node1:cni0", "client:eth0"], id="each once, in order"),
        pytest.param(["dev/proxy:eth0"], ["node1:eth0"], id="a pod with the host's network is its node"),
        pytest.param(
            ["svc/dev/web"],
            [
                "client:eth0", "node1:eth0", "node1:cni0", "node2:eth0", "node2:cni0", "node2:veth2", "node3:eth0",
                "node3:cni0", "node3:veth3", "dev/web-1:eth0", "dev/web-2:eth0",
            ],
            id="a Service: hosts, uplinks, bridges, its pods' links, its pods",
        ),
    ],
)  # fmt: skip
def test_what_a_point_is(texts: list[str], wanted: list[str]):
    """Each POINT stands for interfaces."""
    assert names(*texts) == wanted


def test_all_is_every_place_that_has_a_network():
    """Pods that wait, have ended, or use the host's network are left out."""
    places = dict.fromkeys(point.place for point in resolve_points(["all"], WORLD))
    assert list(places) == ["node1", "node2", "node3", "client", "dev/web-1", "dev/web-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nod2", r"""there is no point 'nod2' in lab 'lab1' \(did you mean "node2"\?\); nodes: node1, node2, node3; hosts: """
                 r"client; pods: dev/proxy, dev/waiting, dev/web-1, dev/web-2; Services: svc/dev/far, svc/dev/web; or WHERE:"),
        ("node1:eth1", r"""node1 has no interface 'eth1' \(did you mean "eth0"\?\); it has eth0, cni0, lo"""),
        ("dev/web", r"there is no point 'dev/web' in lab 'lab1'"),
        ("svc/dev/wbe", r"""there is no Service dev/wbe in lab 'lab1' \(did you mean "svc/dev/web"\?\); Services: svc/dev/"""),
        ("svc/dev/far", r"Service dev/far is an ExternalName: no packet is sent to it"),
        ("dev/waiting", r"pod dev/waiting has no network \(Pending\): wait until it runs"),
        ("", r"there is no point '' in lab"),
        ("a:b:c", r"there is no point 'a' in lab"),
    ],
)  # fmt: skip
def test_a_point_that_is_not_there(text: str, message: str):
    """The message names what there is, and what was probably meant."""
    with pytest.raises(InputError, match=message):
        names(text)


def test_every_wrong_point_is_named_at_once():
    """Nobody has to correct a command word by word."""
    with pytest.raises(InputError) as refused:
        names("nod1", "client", "node1:eht0")
    assert [line.split(" (")[0] for line in str(refused.value).splitlines()] == [
        "there is no point 'nod1' in lab 'lab1'", "node1 has no interface 'eht0'",
    ]  # fmt: skip


def test_too_many_points_are_refused():
    """Each is a process and a buffer of the kernel's."""
    many = World(lab="lab1", topology=TOPOLOGY, pods=[pod(f"p{n}", "node1", f"10.244.1.{n}") for n in range(2, 140)],
                 services=[], slices=[], links_of=links_of)  # fmt: skip
    with pytest.raises(InputError, match="all is 150 interfaces, and a capture takes 128: name fewer points"):
        resolve_points(["all"], many)


def test_a_service_point_sees_only_its_service():
    """svc/ points have a filter of the Service's addresses and ports; --filter narrows it; a place named as well sees all."""
    web = "(host 10.244.2.2 and tcp port 8080) or (host 10.244.3.2 and tcp port 8080) or (host 10.96.1.10 and tcp port 80)"
    assert service_filter(SERVICE, [SLICE]) == f"{web} or (tcp port 30888) or icmp"
    narrowed = resolve_points(["svc/dev/web", "client"], WORLD, filter_text="not arp")
    filters = {point.name: point.filter for point in narrowed}
    assert filters["client:eth0"] == "not arp"
    assert filters["node1:eth0"] == f"({web} or (tcp port 30888) or icmp) and (not arp)"


def test_the_filter_of_a_service_with_many_endpoints_stays_short():
    """With hundreds of endpoints their ports must do: the kernel takes filters of 4,096 instructions."""
    endpoints = [{"addresses": [f"10.244.2.{n}"]} for n in range(2, 250)]
    assert service_filter(SERVICE, [{**SLICE, "endpoints": endpoints}]) == (
        "(tcp port 80) or (tcp port 8080) or (tcp port 30888) or icmp"
    )


def test_points_know_whose_frames_go_out():
    """A node's end of a pod's link knows the pod's address: what comes from it comes in."""
    point = next(point for point in resolve_points(["node2"], WORLD) if point.interface == "veth2")
    assert point == Point(
        place="node2", interface="veth2", mac=b"\5" * 6, peer_mac=b"\6" * 6, about="link of pod dev/web-1"
    )
