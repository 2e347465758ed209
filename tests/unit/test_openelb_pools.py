"""OpenELB's pools: what an Eip's address means, which pool a Service gets, and which address of it."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from openelb_support import eip

from testbed.controllers.openelb.pools import (
    NotAllocated,
    Pool,
    Wish,
    allocate_address,
    choose_pool,
    keep_services,
    parse_pool,
    parse_range,
    release_address,
    status_of,
)


@pytest.mark.parametrize(
    ("text", "first", "last", "size"),
    [
        pytest.param("192.168.1.5", "192.168.1.5", "192.168.1.5", 1, id="one address"),
        pytest.param(
            "192.168.93.231-192.168.93.238", "192.168.93.231", "192.168.93.238", 8, id="from-to, both included"
        ),
        pytest.param(
            "192.168.1.0/24", "192.168.1.0", "192.168.1.255", 256, id="a CIDR, with its network and broadcast address"
        ),
        pytest.param("192.168.1.77/30", "192.168.1.76", "192.168.1.79", 4, id="a CIDR begins with its network address"),
        pytest.param("10.0.0.1/32", "10.0.0.1", "10.0.0.1", 1, id="/32"),
        pytest.param("FD00::1-fd00::4", "fd00::1", "fd00::4", 4, id="IPv6, in any case"),
    ],
)
def test_what_an_address_means(text: str, first: str, last: str, size: int) -> None:
    """First, last and size as OpenELB counts them."""
    found = parse_range(text)
    assert (str(found.first), str(found.last), found.size) == (first, last, size)


@pytest.mark.parametrize(
    "text",
    ["", "x", "10-5", "192.168.1.9-192.168.1.5", "192.168.1.0/255.255.255.0", "192.168.1.0/33", "192.168.1.1-fd00::1", "1.2.3.4/",
     "1.2.3.4-", "-", "192.168.1.256", "1.2.3.4/24/24"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    """Ranges that end before they begin, netmasks and mixtures of families are refused."""
    with pytest.raises(ValueError):
        parse_range(text)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("10.0.0.1-10.0.0.5", "10.0.0.5", True),
        ("10.0.0.1-10.0.0.5", "10.0.0.6-10.0.0.9", False),
        ("10.0.0.0/24", "10.0.0.128/25", True),
        ("10.0.0.0/24", "10.0.1.0/24", False),
        ("::a00:1", "10.0.0.1", False),
    ],
)
def test_overlaps(one: str, other: str, overlap: bool) -> None:
    """Two ranges overlap when an address is in both, whichever is asked."""
    assert parse_range(one).overlaps(parse_range(other)) is overlap
    assert parse_range(other).overlaps(parse_range(one)) is overlap


def pool(
    name: str = "p", address: str = "10.0.0.1-10.0.0.3", used: dict[str, str] | None = None, **fields: Any
) -> Pool:
    """Return a pool; ``used`` as in an Eip's status."""
    found = parse_pool({**eip(name, address), "status": {"used": used or {}}})
    assert found is not None
    return replace(found, **fields)


def why(call: Any, *arguments: Any) -> str:
    with pytest.raises(NotAllocated) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_lowest_free_address_comes_first() -> None:
    """Addresses are given out from the first on; one that was released is the next one again."""
    current = pool()
    for name, expected in (("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")):
        address, current = allocate_address(Wish(service=f"dev/{name}"), current)
        assert address == expected
    assert why(allocate_address, Wish(service="dev/d"), current) == "no avliable eip, err:no suitable ip to allocate"
    current = release_address("dev/b", current)
    assert allocate_address(Wish(service="dev/d"), current)[0] == "10.0.0.2"


def test_a_cidr_gives_out_its_network_address() -> None:
    """As OpenELB does: the first one of 192.168.1.0/24 is .0."""
    assert allocate_address(Wish(service="dev/a"), pool(address="192.168.1.0/24"))[0] == "192.168.1.0"


def test_a_large_pool_costs_what_is_used_of_it() -> None:
    """A /64 is a pool like any other."""
    assert allocate_address(Wish(service="dev/a", families=("IPv6",)), pool(address="fd00::/64"))[0] == "fd00::"


def test_a_fixed_address_is_shared() -> None:
    """One that somebody has is given all the same, and both are told in ``used``."""
    address, shared = allocate_address(Wish(service="dev/b", address="10.0.0.2"), pool(used={"10.0.0.2": "dev/a"}))
    assert address == "10.0.0.2"
    assert status_of(shared)["used"] == {"10.0.0.2": "dev/a;dev/b"} and status_of(shared)["usage"] == 1
    assert status_of(release_address("dev/a", shared))["used"] == {"10.0.0.2": "dev/b"}
    assert "used" not in status_of(release_address("dev/b", release_address("dev/a", shared)))


@pytest.mark.parametrize(
    ("wish", "fields", "text"),
    [
        pytest.param(
            {"address": "10.0.0.9"},
            {},
            "no avliable eip, err:the specified ip:10.0.0.9 is beyond the range of eip[p:10.0.0.1-10.0.0.3]",
            id="outside",
        ),
        pytest.param(
            {"address": "hello"},
            {},
            "no avliable eip, err:the specified ip:hello is beyond the range of eip[p:10.0.0.1-10.0.0.3]",
            id="no address",
        ),
        pytest.param({}, {"is_disabled": True}, "no avliable eip, err:eip:p is disabled", id="disabled"),
        pytest.param({}, {"is_deleting": True}, "no avliable eip, err:eip:p is deleting", id="deleting"),
        pytest.param({"families": ("IPv6",)}, {}, "service can't use different family eip", id="family"),
    ],
)
def test_why_no_address(wish: dict[str, Any], fields: dict[str, Any], text: str) -> None:
    """Refusals have OpenELB's texts, with its spelling."""
    assert why(allocate_address, Wish(service="dev/a", **wish), pool(**fields)) == text


FULL = {"10.0.0.1": "x/a", "10.0.0.2": "x/b", "10.0.0.3": "x/c"}


@pytest.mark.parametrize(
    ("wish", "pools", "chosen"),
    [
        pytest.param(Wish(service="dev/w", pool="q"), [pool(is_default=True)], "q", id="a pool by name, even one that is not there"),
        pytest.param(Wish(service="dev/w", pool="p"), [pool(is_disabled=True), pool("q", is_default=True)], "p", id="by name, disabled: no other instead"),
        pytest.param(Wish(service="dev/w", address="10.0.1.5"), [pool(is_default=True), pool("q", "10.0.1.0/24")], "q", id="the pool that holds the address"),
        pytest.param(Wish(service="dev/w"), [pool(is_default=True), pool("q", "10.0.1.0/24", namespaces=("dev",))], "q", id="bound to the namespace, before the default"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespace_selector={"team": "a"}), pool("r", "10.0.1.1", namespace_selector={"team": "b"})], "q", id="by labels of the namespace"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespaces=("dev",), priority=5), pool("r", "10.0.1.1", namespaces=("dev",), priority=2)], "r", id="the smaller priority number"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespaces=("dev",), used=FULL), pool("r", "10.0.1.1", namespaces=("dev",), priority=9)], "r", id="an occupied one last"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespaces=("dev",), is_disabled=True), pool("r", "10.0.1.1", is_default=True)], "r", id="disabled ones are not looked at"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespaces=("other",)), pool("r", "10.0.1.1", is_default=True)], "r", id="the default one"),
        pytest.param(Wish(service="dev/w"), [pool("q", namespace_selector={}), pool("r", "10.0.1.1", is_default=True)], "r", id="an empty selector selects nothing"),
    ],
)  # fmt: skip
def test_which_pool(wish: Wish, pools: list[Pool], chosen: str) -> None:
    """By name, by address, by namespace and priority, then the default one."""
    assert choose_pool(wish, pools, "dev", {"team": "a"}) == chosen


@pytest.mark.parametrize(
    ("wish", "pools", "text"),
    [
        pytest.param(Wish(service="dev/w"), [pool()], "no available default eip found", id="nothing fits"),
        pytest.param(Wish(service="dev/w"), [pool(is_default=True, is_disabled=True)], "no available default eip found", id="the default one is disabled"),
        pytest.param(Wish(service="dev/w", address="10.0.9.9"), [pool(is_default=True)], "no available eip was found containing the ip:[10.0.9.9]", id="nobody has the address"),
        pytest.param(Wish(service="dev/w", address="10.0.0.1"), [pool(is_disabled=True)], "eip:p is disabled", id="its pool is disabled"),
        pytest.param(Wish(service="dev/w", address="10.0.0.1"), [pool(is_deleting=True)], "eip:p is deleting", id="its pool is being deleted"),
    ],
)  # fmt: skip
def test_why_no_pool(wish: Wish, pools: list[Pool], text: str) -> None:
    """Refusals have OpenELB's texts."""
    assert why(choose_pool, wish, pools, "dev", {}) == text


def test_a_status_leaves_out_what_is_zero() -> None:
    """As Go's omitempty: usage is absent, not 0, and kubectl prints a blank."""
    assert status_of(pool()) == {"firstIP": "10.0.0.1", "lastIP": "10.0.0.3", "poolSize": 3, "v4": True}
    assert status_of(pool(address="fd00::1-fd00::2")) == {"firstIP": "fd00::1", "lastIP": "fd00::2", "poolSize": 2}
    full = status_of(pool(used=FULL))
    assert (full["usage"], full["occupied"]) == (3, True)
    assert list(full["used"]) == sorted(FULL)


def test_what_deleted_services_had_is_free() -> None:
    """Only Services that there are stay in ``used``."""
    left = keep_services(pool(used={"10.0.0.1": "dev/a;dev/b", "10.0.0.2": "dev/c"}), ["dev/b"])
    assert dict(left.used) == {"10.0.0.1": ("dev/b",)}


def test_addresses_in_a_range() -> None:
    """Membership goes by family and number."""
    found = parse_range("10.0.0.1-10.0.0.3")
    assert (
        ip_address("10.0.0.3") in found and ip_address("10.0.0.4") not in found and ip_address("::a00:1") not in found
    )
