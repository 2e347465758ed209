"""benchmarks/curves.py: which shapes over the number of Services are right, and which are not."""

from __future__ import annotations

import pytest
from bench_world import LATENCY, NS_PER_SERVICE, benchmark, run
from tools_support import load_tool

curves = load_tool("curves", "benchmarks")


def wrong(*modes: str, slows: float = 0.0, noise: float = 0.002) -> list[str]:
    """Return what is said of fake modes at 0 to 10,000 Services; ``slows``: µs that each Service costs every connection."""
    asked = benchmark(proxy_modes=modes, cases=LATENCY, services=(0, 1000, 5000, 10000), samples=7)
    results = run(asked, slows=slows, noise=noise)
    return list(curves.wrong_shapes(results, curves.slopes(results)))


def test_published_shapes_are_right() -> None:
    assert wrong("iptables", "nftables", "ipvs") == []


def test_what_every_connection_takes_is_no_fault_of_a_mode() -> None:
    """In the nested kernel a connection without a Service takes longer with more Services, too."""
    assert wrong("iptables", "ipvs", slows=0.07) == []


@pytest.mark.parametrize("slows", [0.0, 0.07])
def test_a_hash_that_is_none(monkeypatch: pytest.MonkeyPatch, slows: float) -> None:
    """IPVS that looks at each Service in turn is wrong, whatever else takes longer."""
    monkeypatch.setitem(NS_PER_SERVICE, "ipvs", 0.02)
    (line,) = wrong("iptables", "ipvs", slows=slows)
    assert line.startswith("ipvs on host, last Service: rises by ")
    assert line.endswith(" beyond a connection without one")


def test_rules_that_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NS_PER_SERVICE, "iptables", 0.0)
    assert "iptables on host, last Service: the slope is not above 0" in wrong("iptables", "nftables")
