"""The faults that the doctor can tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CAUSES: Final[Mapping[str, str]] = {
    "node-lost": "a node is not ready: its kubelet does not report",
    "link-down": "a node's LAN link has no carrier",
    "node-unseen": "a node could not be looked at",
    "br-netfilter-off": "bridged packets do not pass iptables: pod to Service to pod of the same node fails",
    "ip-forward-off": "a node hands nothing on",
    "hairpin-off": "the pods' bridge does not send back where it came from: a pod does not reach itself by its Service",
    "rp-filter": "strict reverse-path filtering where routes are asymmetric",
    "mtu-mismatch": "a node's LAN link takes smaller or larger packets than the others'",
    "conntrack-full": "a node's connection tracking table is (nearly) full",
    "stale-conntrack": "UDP flows go on to an endpoint that is gone",
    "kube-proxy-down": "a node's kube-proxy does not answer, so that its rules fall behind",
    "rules-differ": "kube-proxy runs, and a node's rules are not what they should be",
    "node-port-taken": "a program of a node listens on a Service's nodePort",
    "dns-down": "no pod of cluster DNS answers",
    "dns-degraded": "some pods of cluster DNS do not answer",
    "ndots-storm": "most questions to cluster DNS are for names that the search list made up",
    "no-endpoints": "a Service selects nobody, or no port of anybody",
    "not-ready": "a pod behind a Service is not ready",
    "local-without-endpoints": "externalTrafficPolicy Local, and nodes without an endpoint are asked",
    "address-pending": "a LoadBalancer Service gets no address",
    "pool-exhausted": "a LoadBalancer Service gets no address, because all of its pool are taken",
    "arp-silent": "nobody answers ARP for a load-balancer address",
    "strict-arp-off": "every node answers ARP for a load-balancer address: ipvs mode without strictARP",
    "arp-duplicate": "several machines answer ARP for a load-balancer address",
    "ingress-without-class": "an Ingress names no class, and none is the default",
    "ingress-class-unknown": "an Ingress names a class that is not there",
    "ingress-backend-missing": "an Ingress names a Service that is not there",
}
"""Each cause with what it means; docs/doctor.md explains how each is found and mended."""
