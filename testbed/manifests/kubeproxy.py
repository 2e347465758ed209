"""The fields of a KubeProxyConfiguration, as in ``kubeProxy:`` of a topology.

Source: kubernetes staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go (v1.30); udpIdleTimeout and portRange are of
the releases that had userspace mode (up to v1.25).
"""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from typing import Annotated, Literal

from msgspec import field

from testbed.manifests.decode import Wire, described
from testbed.manifests.scalars import GoDuration

_Mark = Annotated[  # one bit of a 32-bit packet mark
    int, described("the bit of the packet mark that asks for masquerading: 14 is 0x4000", default=14, ge=0, le=31)
]
_MasqueradeAll = Annotated[
    bool, described("masquerade everything that goes to a ClusterIP, also from pods", default=False)
]
_SyncPeriod = Annotated[
    GoDuration,
    described("how often rules are looked after, and what failed is tried again; more than 0", default="30s"),
]
_MinSyncPeriod = Annotated[
    GoDuration, described("how much time lies between two syncs at least; not more than syncPeriod", default="1s")
]
_WITHOUT_EFFECT = "taken and passed over: it has no effect here"


class ClientConnectionWire(Wire):
    """How kube-proxy reaches the API. Taken, so that files of real clusters can be used, and passed over."""

    kubeconfig: Annotated[str, described(_WITHOUT_EFFECT)] | None = None
    accept_content_types: Annotated[str, described(_WITHOUT_EFFECT)] | None = None
    content_type: Annotated[str, described(_WITHOUT_EFFECT)] | None = None
    qps: Annotated[float, described(_WITHOUT_EFFECT)] | None = None
    burst: Annotated[int, described(_WITHOUT_EFFECT)] | None = None


class IptablesWire(Wire):
    """Mode iptables. Userspace mode takes syncPeriod and minSyncPeriod from here, ipvs mode masqueradeBit and masqueradeAll."""

    masquerade_bit: _Mark | None = None
    masquerade_all: _MasqueradeAll | None = None
    localhost_node_ports: (
        Annotated[bool, described("NodePorts answer on 127.0.0.1 of the node; sets route_localnet", default=True)]
        | None
    ) = None
    sync_period: _SyncPeriod | None = None
    min_sync_period: _MinSyncPeriod | None = None


class NftablesWire(Wire):
    """Mode nftables."""

    masquerade_bit: _Mark | None = None
    masquerade_all: _MasqueradeAll | None = None
    sync_period: _SyncPeriod | None = None
    min_sync_period: _MinSyncPeriod | None = None


class IpvsWire(Wire):
    """Mode ipvs."""

    sync_period: _SyncPeriod | None = None
    min_sync_period: (
        Annotated[
            GoDuration,
            described("how much time lies between two syncs at least; not more than syncPeriod", default="0s"),
        ]
        | None
    ) = None
    scheduler: (
        Annotated[
            Literal["", "rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf"],
            described(
                "how a virtual server chooses its real server; the kernel must have it; empty means rr", default="rr"
            ),
        ]
        | None
    ) = None
    exclude_cidrs: (
        Annotated[
            list[str],
            described("virtual servers with an address in one of these networks are left alone; default: none"),
        ]
        | None
    ) = field(default=None, name="excludeCIDRs")
    strict_arp: (
        Annotated[
            bool,
            described(
                "set arp_ignore and arp_announce, so that a node does not answer ARP for the addresses on kube-ipvs0; what "
                "announces load balancers' addresses needs it",
                default=False,
            ),
        ]
        | None
    ) = field(default=None, name="strictARP")
    tcp_timeout: (
        Annotated[GoDuration, described("of idle TCP connections in IPVS; 0s leaves the kernel's", default="0s")] | None
    ) = None
    tcp_fin_timeout: (
        Annotated[GoDuration, described("of TCP connections after a FIN in IPVS; 0s leaves the kernel's", default="0s")]
        | None
    ) = None
    udp_timeout: (
        Annotated[GoDuration, described("of UDP flows in IPVS; 0s leaves the kernel's", default="0s")] | None
    ) = None


class ConntrackWire(Wire):
    """Connection tracking: sysctls that kube-proxy sets on its node when it starts."""

    max_per_core: (
        Annotated[int, described("taken and passed over: the table's size is global to the machine", ge=0)] | None
    ) = None
    min: Annotated[int, described("taken and passed over: the table's size is global to the machine", ge=0)] | None = (
        None
    )
    tcp_established_timeout: (
        Annotated[GoDuration, described("of idle TCP connections; 0s leaves the kernel's", default="24h")] | None
    ) = None
    tcp_close_wait_timeout: (
        Annotated[GoDuration, described("of TCP connections in CLOSE_WAIT; 0s leaves the kernel's", default="1h")]
        | None
    ) = None
    tcp_be_liberal: (
        Annotated[bool, described("packets outside the TCP window are not invalid", default=False)] | None
    ) = None
    udp_timeout: (
        Annotated[GoDuration, described("of UDP flows with one packet; 0s leaves the kernel's", default="0s")] | None
    ) = None
    udp_stream_timeout: (
        Annotated[GoDuration, described("of UDP flows in both directions; 0s leaves the kernel's", default="0s")] | None
    ) = None


class DetectLocalWire(Wire):
    """What detectLocalMode needs to know."""

    bridge_interface: (
        Annotated[str, described("for BridgeInterface: the bridge that pods are on, here cni0; default: none")] | None
    ) = None
    interface_name_prefix: (
        Annotated[
            str, described("for InterfaceNamePrefix: how the pods' links on a node begin, here veth; default: none")
        ]
        | None
    ) = None


class KubeProxyWire(Wire):
    """A KubeProxyConfiguration. It becomes `config.conf` of the ConfigMap kube-proxy in kube-system.

    Where a field is left out, the default of upstream's holds; [kube-proxy.md](kube-proxy.md) says what has no effect here.
    """

    api_version: Annotated[Literal["kubeproxy.config.k8s.io/v1alpha1"], described("may be left out")] | None = None
    kind: Annotated[Literal["KubeProxyConfiguration"], described("may be left out")] | None = None
    mode: (
        Annotated[
            Literal["", "userspace", "iptables", "ipvs", "nftables"],
            described(
                "which rules kube-proxy writes ([proxy-modes.md](proxy-modes.md)); empty means iptables",
                default="iptables",
            ),
        ]
        | None
    ) = None
    feature_gates: (
        Annotated[
            dict[str, bool],
            described(
                "by name; ServiceTrafficDistribution and PreferSameTrafficDistribution have an effect, others do not; "
                "default: none",
                examples=[{"PreferSameTrafficDistribution": True}],
            ),
        ]
        | None
    ) = None
    client_connection: Annotated[ClientConnectionWire | None, described("how it reaches the API: no effect here")] = (
        None
    )
    hostname_override: (
        Annotated[str, described("the name of its Node; default: the node's, which each kube-proxy gets as a flag")]
        | None
    ) = None
    bind_address: (
        Annotated[
            str,
            described(
                "an address that it takes for the node's own instead of the Node's; in userspace mode proxy ports listen there",
                default="0.0.0.0",
            ),
        ]
        | None
    ) = None
    bind_address_hard_fail: Annotated[bool, described(_WITHOUT_EFFECT)] | None = None
    healthz_bind_address: (
        Annotated[str, described("`IP:PORT` of /healthz and /livez", default="0.0.0.0:10256")] | None
    ) = None
    metrics_bind_address: (
        Annotated[str, described("`IP:PORT` of /metrics, /proxyMode, /configz", default="127.0.0.1:10249")] | None
    ) = None
    enable_profiling: Annotated[bool, described(_WITHOUT_EFFECT)] | None = None
    show_hidden_metrics_for_version: Annotated[str, described(_WITHOUT_EFFECT)] | None = None
    config_sync_period: (
        Annotated[GoDuration, described("taken and passed over: a watch that ended is continued")] | None
    ) = None
    iptables: Annotated[IptablesWire | None, described("mode iptables")] = None
    ipvs: Annotated[IpvsWire | None, described("mode ipvs")] = None
    nftables: Annotated[NftablesWire | None, described("mode nftables")] = None
    conntrack: Annotated[ConntrackWire | None, described("connection tracking")] = None
    detect_local_mode: (
        Annotated[
            Literal["", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"],
            described(
                "how a packet of a local pod is told from others; empty means ClusterCIDR", default="ClusterCIDR"
            ),
        ]
        | None
    ) = None
    detect_local: Annotated[DetectLocalWire | None, described("what detectLocalMode needs to know")] = None
    cluster_cidr: (
        Annotated[
            str,
            described(
                "the pods' range: what comes from elsewhere and goes to a ClusterIP is masqueraded; default: `cluster.podCIDR`"
            ),
        ]
        | None
    ) = field(default=None, name="clusterCIDR")
    node_port_addresses: (
        Annotated[
            list[str],
            described(
                "networks whose addresses of the node NodePorts answer on, or `primary`; default: all addresses "
                "(nftables mode: the Node's first)"
            ),
        ]
        | None
    ) = None
    oom_score_adj: Annotated[int, described(_WITHOUT_EFFECT, ge=-1000, le=1000)] | None = field(
        default=None, name="oomScoreAdj"
    )
    port_range: (
        Annotated[
            str,
            described(
                "userspace mode: its proxy ports, as `40000-41000`, `40000+1000` or one port; default: as the kernel chooses"
            ),
        ]
        | None
    ) = None
    udp_idle_timeout: (
        Annotated[GoDuration, described("userspace mode: how long a UDP client may be quiet", default="250ms")] | None
    ) = field(default=None, name="udpIdleTimeout")
