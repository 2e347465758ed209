"""The fields of a KubeProxyConfiguration, as in ``kubeProxy:`` of a topology.

Source: kubernetes staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go (v1.30); udpIdleTimeout and portRange are of
the releases that had userspace mode (up to v1.25).
"""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from typing import Annotated, Literal

from msgspec import Meta, field

from testbed.manifests.decode import Wire
from testbed.manifests.scalars import GoDuration

_Count = Annotated[int, Meta(ge=0)]
_Mark = Annotated[int, Meta(ge=0, le=31)]  # one bit of a 32-bit packet mark


class ClientConnectionWire(Wire):
    """How kube-proxy reaches the API."""

    kubeconfig: str | None = None
    accept_content_types: str | None = None
    content_type: str | None = None
    qps: float | None = None
    burst: int | None = None


class IptablesWire(Wire):
    """Mode iptables; masqueradeBit and masqueradeAll hold for userspace and ipvs as well."""

    masquerade_bit: _Mark | None = None
    masquerade_all: bool | None = None
    localhost_node_ports: bool | None = None
    sync_period: GoDuration | None = None
    min_sync_period: GoDuration | None = None


class NftablesWire(Wire):
    """Mode nftables."""

    masquerade_bit: _Mark | None = None
    masquerade_all: bool | None = None
    sync_period: GoDuration | None = None
    min_sync_period: GoDuration | None = None


class IpvsWire(Wire):
    """Mode ipvs."""

    sync_period: GoDuration | None = None
    min_sync_period: GoDuration | None = None
    scheduler: (
        Literal["", "rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf"] | None
    ) = None
    exclude_cidrs: list[str] | None = field(default=None, name="excludeCIDRs")
    strict_arp: bool | None = field(default=None, name="strictARP")
    tcp_timeout: GoDuration | None = None
    tcp_fin_timeout: GoDuration | None = None
    udp_timeout: GoDuration | None = None


class ConntrackWire(Wire):
    """Connection tracking."""

    max_per_core: _Count | None = None
    min: _Count | None = None
    tcp_established_timeout: GoDuration | None = None
    tcp_close_wait_timeout: GoDuration | None = None
    tcp_be_liberal: bool | None = None
    udp_timeout: GoDuration | None = None
    udp_stream_timeout: GoDuration | None = None


class DetectLocalWire(Wire):
    """What detectLocalMode needs to know."""

    bridge_interface: str | None = None
    interface_name_prefix: str | None = None


class KubeProxyWire(Wire):
    """A KubeProxyConfiguration."""

    api_version: Literal["kubeproxy.config.k8s.io/v1alpha1"] | None = None
    kind: Literal["KubeProxyConfiguration"] | None = None
    mode: Literal["", "userspace", "iptables", "ipvs", "nftables"] | None = None
    feature_gates: dict[str, bool] | None = None
    client_connection: ClientConnectionWire | None = None
    hostname_override: str | None = None
    bind_address: str | None = None
    bind_address_hard_fail: bool | None = None
    healthz_bind_address: str | None = None
    metrics_bind_address: str | None = None
    enable_profiling: bool | None = None
    show_hidden_metrics_for_version: str | None = None
    config_sync_period: GoDuration | None = None
    iptables: IptablesWire | None = None
    ipvs: IpvsWire | None = None
    nftables: NftablesWire | None = None
    conntrack: ConntrackWire | None = None
    detect_local_mode: Literal["", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"] | None = None
    detect_local: DetectLocalWire | None = None
    cluster_cidr: str | None = field(default=None, name="clusterCIDR")
    node_port_addresses: list[str] | None = None
    oom_score_adj: Annotated[int, Meta(ge=-1000, le=1000)] | None = field(default=None, name="oomScoreAdj")
    port_range: str | None = None
    udp_idle_timeout: GoDuration | None = field(default=None, name="udpIdleTimeout")
