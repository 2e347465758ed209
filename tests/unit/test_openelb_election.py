"""Who announces an address: upstream's formula, its vectors, and what takes part in it."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import hashlib
import random
from ipaddress import IPv4Interface
from typing import Any

import pytest
from openelb_support import eip, lb

from testbed.controllers.openelb.pools import parse_pool, parse_range
from testbed.dataplane.openelb import (
    EVERYTHING,
    ClusterView,
    Elections,
    election_order,
    interface_problem,
    parse_interface,
)
from testbed.model.objects import Object

THREE = ("openeuler-1", "openeuler-2", "openeuler-3")
N = ("n1", "n2", "n3")
NOTHING: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("nodes", "address", "order"),
    [
        (THREE, "192.168.93.231", "231"), (THREE, "192.168.93.232", "132"), (THREE, "192.168.93.233", "2"), (THREE, "192.168.93.234", "1"),
        (THREE, "192.168.93.235", "1"), (THREE, "192.168.93.236", "312"), (THREE, "192.168.93.237", "3"), (THREE, "192.168.93.238", "1"),
        (N, "10.0.0.100", "123"), (N, "10.0.0.101", "132"), (N, "10.0.0.102", "123"),
    ],
)  # fmt: skip
def test_vectors(nodes: tuple[str, ...], address: str, order: str) -> None:
    """Orders that OpenELB 0.6 gives; each digit is the number of a node."""
    assert "".join(node[-1] for node in election_order(nodes, address)).startswith(order)


def test_a_thousand_elections_are_upstreams() -> None:
    """For 1,000 (node set, address) pairs the announcing node has the least sha256(node#address)."""
    chance = random.Random(8)
    for _ in range(1000):
        nodes = {
            f"{chance.choice(['node', 'openeuler-', 'w.example.com-'])}{chance.randrange(200)}"
            for _ in range(chance.randrange(1, 9))
        }
        address = f"{chance.randrange(1, 224)}.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(256)}"
        best, least = "", b"\xff" * 33
        for node in nodes:
            digest = hashlib.sha256(node.encode() + b"#" + address.encode()).digest()
            if digest < least:
                best, least = node, digest
        assert election_order(nodes, address)[0] == best


ADDRESS = "192.168.93.231"


def endpoints(*nodes: str, ready: bool = True) -> Object:
    """Return Endpoints with an address on each of these nodes."""
    addresses = [{"ip": f"10.0.0.{number}", "nodeName": node} for number, node in enumerate(nodes, 1)]
    return {
        "metadata": {"name": "web", "namespace": "dev"},
        "subsets": [{"addresses" if ready else "notReadyAddresses": addresses}],
    }


def view(services: dict[str, Object], backends: dict[str, Object] | None = None, **spec: Any) -> ClusterView:
    """Return a cluster of three nodes in which these Services share 192.168.93.231."""
    pool = parse_pool({**eip(**spec), "status": {"used": {ADDRESS: ";".join(services)}}})
    assert pool is not None
    return ClusterView(pools=[pool], services=services, endpoints=backends or {}, nodes=frozenset(THREE))


def alive(*nodes: str, **cannot: frozenset[str]) -> dict[str, frozenset[str]]:
    return {node: cannot.get(node.replace("-", "_"), NOTHING) for node in nodes}


CLUSTER = {"dev/web": lb()}
LOCAL = {"dev/web": lb(externalTrafficPolicy="Local")}


@pytest.mark.parametrize(
    ("clusterview", "members", "order"),
    [
        pytest.param(view(CLUSTER), alive(*THREE), "231", id="all live nodes"),
        pytest.param(view(CLUSTER), alive("openeuler-1", "openeuler-3"), "31", id="the winner is dead: the next one"),
        pytest.param(view(CLUSTER), alive(*THREE, "stranger"), "231", id="a member that is no node does not count"),
        pytest.param(view(CLUSTER), alive(*THREE, openeuler_2=frozenset({"eip-pool"})), "31", id="a node that cannot announce the pool"),
        pytest.param(view(CLUSTER), alive(*THREE, openeuler_2=frozenset({"other"})), "231", id="one that cannot announce another pool"),
        pytest.param(view(CLUSTER), alive(*THREE, openeuler_2=frozenset({EVERYTHING})), "31", id="a speaker that has just started"),
        pytest.param(view(LOCAL, {"dev/web": endpoints("openeuler-3")}), alive(*THREE), "3", id="Local: only where a ready pod is"),
        pytest.param(view(LOCAL, {"dev/web": endpoints("openeuler-1", "openeuler-3")}), alive(*THREE), "31", id="Local: among several by the formula"),
        pytest.param(view(LOCAL, {"dev/web": endpoints("openeuler-3", ready=False)}), alive(*THREE), "", id="Local: pods that are not ready do not count"),
        pytest.param(view(LOCAL), alive(*THREE), "", id="Local: no pods, nobody"),
        pytest.param(view({**LOCAL, "dev/b": lb("b", externalTrafficPolicy="Local")}, {"dev/web": endpoints("openeuler-1"), "dev/b": endpoints("openeuler-3")}),
                     alive(*THREE), "31", id="a shared address: the union of its Services"),
        pytest.param(view({**LOCAL, "dev/b": lb("b")}), alive(*THREE), "231", id="shared with policy Cluster: all"),
        pytest.param(view(CLUSTER, disable=True), alive(*THREE), "231", id="a disabled pool announces what it has given out"),
    ],
)  # fmt: skip
def test_who_takes_part(clusterview: ClusterView, members: dict[str, frozenset[str]], order: str) -> None:
    """The candidates of an address, in the order in which they would announce it."""
    outcome = Elections().hold(clusterview, members)[ADDRESS]
    assert "".join(node[-1] for node in outcome.order) == order
    assert outcome.owner == (f"openeuler-{order[0]}" if order else "")


def test_other_protocols_are_not_announced() -> None:
    """Pools of protocol bgp and vip have no layer-2 elections."""
    for protocol in ("bgp", "vip", None):
        assert Elections().hold(view(CLUSTER, protocol=protocol), alive(*THREE)) == {}


def test_a_node_that_fails_elsewhere_changes_no_owner() -> None:
    """Only what a dead node has announced moves; every other address stays where it is."""
    addresses = [f"10.1.{high}.{low}" for high in range(4) for low in range(256)]
    nodes = [f"node{number}" for number in range(5)]
    before = {address: election_order(nodes, address)[0] for address in addresses}
    after = {address: election_order(nodes[1:], address)[0] for address in addresses}
    assert all(after[address] == owner for address, owner in before.items() if owner != "node0")


def test_strict_upstream_keeps_the_nodes_of_a_lone_service() -> None:
    """As 0.6: a Service that has its address alone is looked at again only when the members change."""
    elections = Elections(is_strict=True)
    assert elections.hold(view(LOCAL), alive(*THREE))[ADDRESS].order == ()
    with_pod = view(LOCAL, {"dev/web": endpoints("openeuler-3")})
    assert elections.hold(with_pod, alive(*THREE))[ADDRESS].order == ()
    assert elections.hold(with_pod, alive("openeuler-1", "openeuler-3"))[ADDRESS].owner == "openeuler-3"
    shared = {**LOCAL, "dev/b": lb("b", externalTrafficPolicy="Local")}
    moved = view(shared, {"dev/web": endpoints("openeuler-1")})
    assert elections.hold(moved, alive("openeuler-1", "openeuler-3"))[ADDRESS].owner == "openeuler-1"


def test_strict_upstream_elects_nodes_that_cannot_announce() -> None:
    """As 0.6: then nobody answers."""
    outcome = Elections(is_strict=True).hold(view(CLUSTER), alive(*THREE, openeuler_2=frozenset({"eip-pool"})))
    assert outcome[ADDRESS].owner == "openeuler-2"


def test_which_links_can_announce() -> None:
    """Both ends of the range must be in the network of one of the link's addresses."""
    addresses = [IPv4Interface("10.0.0.1/24"), IPv4Interface("192.168.93.11/24")]
    assert interface_problem("eth33", parse_range("192.168.93.231-192.168.93.238"), addresses) == ""
    for text in ("192.168.93.250-192.168.94.3", "10.9.9.9", "fd00::1"):
        parsed = parse_range(text)
        assert interface_problem("eth33", parsed, addresses) == (
            f"eth33's ip and the eip[{parsed.first}-{parsed.last}] are not in the same network segment"
        )


def test_interfaces() -> None:
    """A name, or can_reach:IP."""
    assert parse_interface("eth33") == ("eth33", "")
    assert parse_interface("can_reach:192.168.93.1") == ("", "192.168.93.1")
    with pytest.raises(ValueError, match="invalid interface string, now only support can_reach"):
        parse_interface("via:192.168.93.1")
