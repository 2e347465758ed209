"""Cluster-wide settings: what a real cluster gives to its API server, controllers and kubelets as flags."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

# Kubernetes' own defaults: --service-cluster-ip-range of kubeadm, --service-node-port-range of kube-apiserver.
DEFAULT_SERVICE_CIDR = IPv4Network("10.96.0.0/12")
DEFAULT_POD_CIDR = IPv4Network("10.244.0.0/16")
DEFAULT_NODE_PORT_RANGE = (30000, 32767)
DEFAULT_DOMAIN = "cluster.local"
DEFAULT_NODE_MONITOR_GRACE_S = 40.0  # --node-monitor-grace-period of kube-controller-manager, and the kubelet's Lease
DNS_OFFSET = 10  # kubeadm's convention: the tenth address of the Service range


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Address ranges and names that every part of one cluster agrees on."""

    pod_cidr: IPv4Network = DEFAULT_POD_CIDR
    service_cidr: IPv4Network = DEFAULT_SERVICE_CIDR
    node_port_range: tuple[int, int] = DEFAULT_NODE_PORT_RANGE  # first and last port, both included
    domain: str = DEFAULT_DOMAIN
    dns: IPv4Address | None = DEFAULT_SERVICE_CIDR[DNS_OFFSET]  # None: the cluster has no DNS
    #: How long a node may be silent before it is NotReady; None: its silence is not noticed (there is no kubelet).
    #: Also the duration of its Lease, which its kubelet renews four times as often.
    node_monitor_grace_s: float | None = None
