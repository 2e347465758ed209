"""What is wrong with a cluster's service network: observations in, findings out. Pure.

::

    lab/doctor.py asks the API, every node, the LAN and DNS ──▶ ClusterSeen ──▶ diagnose ──▶ findings

Each detector looks for one kind of fault and knows nothing of the others; `diagnose` leaves out what another finding
explains: where a node is lost, its kube-proxy is not reported as dead too. docs/doctor.md has the list.
"""

from __future__ import annotations

from testbed.dataplane.doctor.addresses import find_address_faults
from testbed.dataplane.doctor.finding import Finding
from testbed.dataplane.doctor.http import find_ingress_faults
from testbed.dataplane.doctor.names import find_dns_faults
from testbed.dataplane.doctor.nodes import find_node_faults
from testbed.dataplane.doctor.observations import (
    ArpSeen,
    ClusterSeen,
    DnsCount,
    DnsSeen,
    LinkSeen,
    NodeSeen,
    RouteSeen,
    RulesSeen,
)
from testbed.dataplane.doctor.services import find_service_faults

__all__ = [
    "FLEETING", "ArpSeen", "ClusterSeen", "DnsCount", "DnsSeen", "Finding", "LinkSeen", "NodeSeen", "RouteSeen",
    "RulesSeen", "diagnose",
]  # fmt: skip

FLEETING = frozenset({"rules-differ", "stale-conntrack", "arp-silent", "arp-duplicate", "strict-arp-off"})
"""Causes that a change under way looks like: they count when they are seen twice."""


def diagnose(seen: ClusterSeen) -> tuple[Finding, ...]:
    """Return what is wrong, each cause once for each place, the cluster's machines first."""
    found = [
        *find_node_faults(seen),
        *find_dns_faults(seen),
        *find_service_faults(seen),
        *find_address_faults(seen),
        *find_ingress_faults(seen),
    ]
    return tuple(dict.fromkeys(found))
