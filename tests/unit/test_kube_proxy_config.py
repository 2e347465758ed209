"""KubeProxyConfiguration: defaults, every accepted field, and every problem of a wrong one at once."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import pytest

from testbed.model.proxyconfig import KubeProxyConfig, parse_duration_s, parse_proxy_config


def test_defaults() -> None:
    """An empty document is upstream's default configuration."""
    config, problems = parse_proxy_config(
        {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
    )
    assert problems == ()
    assert config == KubeProxyConfig()
    assert (config.mode, config.iptables.sync_period_s, config.iptables.min_sync_period_s) == ("iptables", 30, 1)


def test_values_are_read() -> None:
    """Sections, durations, networks and gates arrive; of two cluster networks the IPv4 one counts."""
    config, problems = parse_proxy_config(
        {
            "mode": "ipvs",
            "clusterCIDR": "fd00::/48,10.244.0.0/16",
            "ipvs": {"scheduler": "wlc", "tcpTimeout": "15m", "excludeCIDRs": ["10.9.0.0/16"], "strictARP": True},
            "iptables": {"minSyncPeriod": 0, "masqueradeBit": 3},
            "healthzBindAddress": "127.0.0.1",
            "featureGates": {"ServiceTrafficDistribution": True},
        }
    )
    assert problems == ()
    assert config.cluster_cidr == "10.244.0.0/16"
    assert (config.ipvs.tcp_timeout_s, config.ipvs.exclude_cidrs) == (900, (IPv4Network("10.9.0.0/16"),))
    assert (config.iptables.min_sync_period_s, config.iptables.masquerade_bit) == (0, 3)
    assert config.healthz_bind_address == "127.0.0.1:10256"
    assert config.feature_gates == {"ServiceTrafficDistribution": True}


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("", None), ("0", None), ("0-0", None), ("40000-41000", (40000, 41000)), ("40000+500", (40000, 40500)),
        ("65000+900", (65000, 65535)), (" 40000 - 40001 ", (40000, 40001)), ("40000", (40000, 40000)),
    ],
)  # fmt: skip
def test_port_ranges(text: str, ports: tuple[int, int] | None) -> None:
    """Two ports, a port and how many above it, or one; nothing leaves the choice to the kernel."""
    config, problems = parse_proxy_config({"mode": "userspace", "portRange": text, "udpIdleTimeout": "1s"})
    assert (problems, config.port_range, config.udp_idle_timeout_s) == ((), ports, 1.0)


@pytest.mark.parametrize("text", ["41000-40000", "1-70000", "a-b", "-5", "1-2-3", "0-5", "40000-"])
def test_wrong_port_ranges(text: str) -> None:
    """The field is named, with an example."""
    config, [problem] = parse_proxy_config({"portRange": text})
    assert str(problem) == f"portRange: Invalid value: {text!r}: must be a valid port range (e.g. 300-2000)"
    assert config.port_range is None


def test_udp_idle_timeout() -> None:
    """0 is the default, as kubeadm writes it; less is wrong."""
    assert parse_proxy_config({"udpIdleTimeout": "0s"})[0].udp_idle_timeout_s == 0.25
    [problem] = parse_proxy_config({"udpIdleTimeout": "-1s"})[1]
    assert str(problem) == "udpIdleTimeout: Invalid value: '-1s': must be greater than 0"


def test_every_problem_is_reported() -> None:
    """Wrong types, wrong values and unknown fields are all named, the latter with a suggestion."""
    _, problems = parse_proxy_config(
        {
            "mode": "ebpf",
            "clusterCIDR": "10.244.0.0",
            "iptables": {"masqueradeAl": True, "masqueradeBit": 32, "syncPeriod": "1s", "minSyncPeriod": "5s"},
            "nodePortAddresses": ["nowhere"],
            "ipvs": {"syncPeriod": "soon"},
            "conntrack": [],
        }
    )
    assert [str(problem) for problem in problems] == [
        "mode: Invalid value: 'ebpf': must be one of iptables, ipvs, nftables, userspace",
        "clusterCIDR: Invalid value: '10.244.0.0': must be a valid CIDR block, (e.g. 10.100.0.0/16 or fde4:8dd8::/64)",
        "nodePortAddresses[0]: Invalid value: 'nowhere': must be a valid CIDR",
        "iptables.masqueradeBit: Invalid value: 32: must be within the range [0, 31]",
        "iptables.syncPeriod: Invalid value: '1s': must be greater than or equal to minSyncPeriod (5s)",
        "iptables.masqueradeAl: unknown field (did you mean 'masqueradeAll'?)",
        "ipvs.syncPeriod: Invalid value: 'soon': must be a duration such as 30s",
        "conntrack: Invalid value: []: must be a mapping",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("1m30s", 90), ("250ms", 0.25), ("24h0m0s", 86400), ("0", 0), (0, 0), ("1.5h", 5400),
     ("30", None), ("s", None), (30, None)],
)  # fmt: skip
def test_durations(text: Any, seconds: float | None) -> None:
    """Go's duration syntax; a bare number other than 0 has no unit and is refused."""
    assert parse_duration_s(text) == (pytest.approx(seconds) if seconds is not None else None)
