"""Expectations about names: what dig printed, and whether it is what was wanted."""

# ruff: noqa: E501  # dig's own lines

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from testbed.kernel.processes import Completed
from testbed.model.scenario import ResolveStep, Selector
from testbed.probes import Resolution, dig_argv, read_dig
from testbed.scenario.judge_dns import judge_resolution

FOUND = b"""\
;; Got answer:
;; WARNING: .local is reserved for Multicast DNS
;; You are currently testing what happens when an mDNS query is leaked to DNS
;; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 20992
;; flags: qr aa rd ra; QUERY: 1, ANSWER: 2, AUTHORITY: 0, ADDITIONAL: 1

;; ANSWER SECTION:
shop.dev.svc.cluster.local. 30\tIN\tCNAME\tshop.example.com.
shop.example.com.\t60\tIN\tA\t192.0.2.80

"""
TIMED_OUT = b";; communications error to 10.96.0.10#53: timed out\n;; no servers could be reached\n\n"


def test_what_dig_is_asked() -> None:
    """The search list counts; an address becomes the name of its PTR record; a server may be named."""
    options = ["+search", "+tries=2", "+time=2", "+noall", "+comments", "+answer"]
    assert dig_argv("web", "SRV", None) == ["dig", *options, "-t", "SRV", "-q", "web"]
    assert dig_argv("10.0.0.1", "PTR", IPv4Address("10.96.0.10")) == [
        "dig", "@10.96.0.10", *options, "-t", "PTR", "-q", "1.0.0.10.in-addr.arpa.",
    ]  # fmt: skip


def test_what_dig_prints() -> None:
    """Status and records; without an answer the reason."""
    assert read_dig(Completed(0, FOUND, b"")) == Resolution(
        rcode="NOERROR",
        records=(("shop.dev.svc.cluster.local", 30, "CNAME", "shop.example.com"), ("shop.example.com", 60, "A", "192.0.2.80")),
    )  # fmt: skip
    assert read_dig(Completed(9, TIMED_OUT, b"")) == Resolution(rcode="", detail="no servers could be reached")
    missing = Completed(127, b"", b"dig: command not found\n")
    assert read_dig(missing) == Resolution(rcode="", detail="dig: command not found")
    assert read_dig(Completed(139, b"", b"")).detail == "dig ended with status 139"


def resolution(*records: tuple[str, str], rcode: str = "NOERROR") -> Resolution:
    return Resolution(rcode=rcode, records=tuple(("n", 30, kind, value) for kind, value in records))


A1, A2 = ("A", "10.0.0.1"), ("A", "10.0.0.2")
SRV = ("SRV", "0 50 80 web.dev.svc.cluster.local")


@pytest.mark.parametrize(
    ("claims", "seen", "passed", "texts"),
    [
        ({}, resolution(A1), True, ("NOERROR: a A record", "NOERROR: 10.0.0.1")),
        ({}, resolution(), False, ("NOERROR: a A record", "NOERROR: no A record")),
        ({}, resolution(("CNAME", "x")), False, ("NOERROR: a A record", "NOERROR: no A record (and CNAME x)")),
        ({"answers": ("10.0.0.2", "10.0.0.1")}, resolution(A1, A2), True, ("NOERROR: 10.0.0.1, 10.0.0.2", "NOERROR: 10.0.0.1, 10.0.0.2")),
        ({"answers": ("10.0.0.1",)}, resolution(A1, A2), False, ("NOERROR: 10.0.0.1", "NOERROR: 10.0.0.1, 10.0.0.2")),
        ({"answers": ("10.0.0.1", "10.0.0.1")}, resolution(A1), False, ("NOERROR: 10.0.0.1, 10.0.0.1", "NOERROR: 10.0.0.1")),
        ({"answers": ()}, resolution(), True, ("NOERROR: no A record", "NOERROR: no A record")),
        ({"answers": ()}, resolution(rcode="NXDOMAIN"), False, ("NOERROR: no A record", "NXDOMAIN: no A record")),
        ({"answers": (Selector("dev", "web"),)}, resolution(A1, ("A", "10.0.9.9")), True, ("NOERROR: 10.0.0.1, 10.0.9.9", "NOERROR: 10.0.0.1, 10.0.9.9")),
        ({"rcode": "NXDOMAIN"}, resolution(rcode="NXDOMAIN"), True, ("NXDOMAIN", "NXDOMAIN: no A record")),
        ({"rcode": "NXDOMAIN"}, resolution(A1), False, ("NXDOMAIN", "NOERROR: 10.0.0.1")),
        ({"rcode": "NXDOMAIN"}, Resolution(rcode="", detail="timed out"), False, ("NXDOMAIN", "no answer: timed out")),
        ({"record_type": "SRV", "answers": ("80 Web.dev.svc.cluster.local.",)}, resolution(SRV), True, None),
        ({"record_type": "SRV", "answers": ("0 50 80 web.dev.svc.cluster.local",)}, resolution(SRV), True, None),
        ({"record_type": "SRV", "answers": ("0 100 80 web.dev.svc.cluster.local",)}, resolution(SRV), False, None),
        ({"record_type": "SRV", "answers": ("81 web.dev.svc.cluster.local",)}, resolution(SRV), False, None),
        ({"record_type": "TXT", "answers": ('"Case counts"',)}, resolution(("TXT", '"case counts"')), False, None),
    ],
)  # fmt: skip
def test_the_verdict(claims: dict[str, Any], seen: Resolution, passed: bool, texts: tuple[str, str] | None) -> None:
    """All values, in any order, each as often as wanted; an rcode other than NOERROR says enough by itself."""
    step = ResolveStep(file="f", line=1, title="t", where="node1", name="n", **claims)
    pods = ["10.0.0.1", "10.0.9.9"] if any(isinstance(a, Selector) for a in step.answers or ()) else []
    verdict = judge_resolution(step, seen, pods)
    assert verdict.passed is passed
    if texts is not None:
        assert (verdict.wanted, verdict.seen) == texts
