"""What requests meet in a kernel: no route, silence, and every way a rule can say no."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from testbed.kernel.processes import Target, call_in
from testbed.model.scenario import Request, Scheme
from testbed.probes import Observation, Outcome, ask

pytestmark = pytest.mark.root

HOST = "10.99.0.2"  # nobody: a route leads there, and rules answer first


@pytest.fixture(scope="module")
def place() -> Iterator[Target]:
    """A namespace with loopback and a link to nobody, whose OUTPUT chain treats ports in different ways."""
    rejections = {
        1001: ["DROP"],
        1002: ["REJECT", "--reject-with", "icmp-port-unreachable"],  # kube-proxy's
        1003: ["REJECT", "--reject-with", "icmp-host-unreachable"],
        1004: ["REJECT", "--reject-with", "icmp-net-unreachable"],
        1005: ["REJECT", "--reject-with", "icmp-admin-prohibited"],
    }
    rules = [f"-A OUTPUT -p {protocol} --dport {port} -j {' '.join(target)}"
             for port, target in rejections.items() for protocol in ("tcp", "udp")]  # fmt: skip
    rules.append("-A OUTPUT -p tcp --dport 1006 -j REJECT --reject-with tcp-reset")
    holder = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "--", "sh", "-c", "echo; exec sleep 600"],
                              stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.read(1)  # it is inside
        enter = ["nsenter", "-t", str(holder.pid), "--net", "--"]
        text = "\n".join(["*filter", *rules, "COMMIT", ""])
        for command in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "add", "here", "type", "veth", "peer", "name", "there"],
            ["ip", "address", "add", "10.99.0.1/24", "dev", "here"],
            ["ip", "link", "set", "here", "up"],
            ["ip", "link", "set", "there", "up"],
        ):
            subprocess.run([*enter, *command], check=True, timeout=30)
        subprocess.run([*enter, "iptables-restore", "-w"], input=text, text=True, check=True, timeout=30)
        target = Target(name="place", pidfd=os.pidfd_open(holder.pid))
        yield target
        target.close()
    finally:
        holder.kill()
        holder.communicate()


def ask_from(place: Target, scheme: Scheme, host: str, port: int, patience_s: float = 0.3) -> Observation:
    question = Request(scheme=scheme, host=host, port=port, path="/", patience_s=patience_s)
    (seen,) = call_in(place, ask, question, 1, timeout_s=60)
    return seen


@pytest.mark.parametrize(
    ("scheme", "port", "outcome", "detail"),
    [
        # DROP on the way out: a UDP sender is told so at once (EPERM), a TCP sender is not; to us both are silence
        pytest.param(Scheme.TCP, 1001, Outcome.TIMED_OUT, "no answer within 0.3 s", id="tcp drop"),
        pytest.param(Scheme.HTTP, 1001, Outcome.TIMED_OUT, "no answer within 0.3 s", id="http drop"),
        pytest.param(Scheme.UDP, 1001, Outcome.TIMED_OUT, "no answer within 0.3 s", id="udp drop"),
        # a Service without endpoints: icmp-port-unreachable reads as "refused" for both
        pytest.param(Scheme.TCP, 1002, Outcome.REFUSED, "Connection refused", id="tcp icmp-port-unreachable"),
        pytest.param(Scheme.HTTP, 1002, Outcome.REFUSED, "Connection refused", id="http icmp-port-unreachable"),
        pytest.param(Scheme.UDP, 1002, Outcome.REFUSED, "Connection refused", id="udp icmp-port-unreachable"),
        pytest.param(Scheme.TCP, 1003, Outcome.UNREACHABLE, "No route to host", id="tcp icmp-host-unreachable"),
        pytest.param(Scheme.TCP, 1004, Outcome.UNREACHABLE, "Network is unreachable", id="tcp icmp-net-unreachable"),
        pytest.param(Scheme.TCP, 1005, Outcome.UNREACHABLE, "No route to host", id="tcp icmp-admin-prohibited"),
        pytest.param(Scheme.TCP, 1006, Outcome.REFUSED, "Connection refused", id="tcp-reset"),
    ],
)
def test_what_rules_say(place: Target, scheme: Scheme, port: int, outcome: Outcome, detail: str) -> None:
    """Each target of a rule, as a client meets it."""
    seen = ask_from(place, scheme, HOST, port, 5 if outcome is not Outcome.TIMED_OUT else 0.3)
    assert (seen.outcome, seen.detail) == (outcome, detail)


def test_no_route(place: Target) -> None:
    """The kernel knows no way there."""
    for scheme in (Scheme.TCP, Scheme.UDP):
        seen = ask_from(place, scheme, "192.0.2.1", 80)
        assert (seen.outcome, seen.detail) == (Outcome.UNREACHABLE, "Network is unreachable")


def test_nobody_has_that_address(place: Target) -> None:
    """ARP stays without an answer: the kernel says so after three seconds, patience is over sooner."""
    assert ask_from(place, Scheme.TCP, "10.99.0.77", 80).outcome is Outcome.TIMED_OUT
    seen = ask_from(place, Scheme.TCP, "10.99.0.77", 80, patience_s=30)
    assert (seen.outcome, seen.detail) == (Outcome.UNREACHABLE, "No route to host")
