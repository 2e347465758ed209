"""Addresses and ports that Services ask for by name, against a cluster's ranges and each other, before a cluster is there.

The registry refuses the same when it allocates; here all of it is found at once, with lines, and before a lab is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any

from testbed.errors import Problem
from testbed.manifests.objects import SourceObject
from testbed.model.cluster import ClusterConfig


def allocation_problems(
    objects: Sequence[SourceObject], config: ClusterConfig, *, may_reuse: bool = False
) -> list[Problem]:
    """Return a problem for each ClusterIP and NodePort that is out of range, or that an earlier Service has.

    The same Service may appear twice (applied again with a change): it keeps what it has. With ``may_reuse``, Services
    may be gone before the next one comes, and only the ranges are looked at.
    """
    addresses = {config.service_cidr[1]: "Service default/kubernetes"}
    ports: dict[tuple[str, int], str] = {}
    problems = []
    for source in objects:
        spec = source.object.get("spec")
        if source.kind == "Service" and source.object["apiVersion"] == "v1" and isinstance(spec, dict):
            problems += _address_problems(source, spec, config, {} if may_reuse else addresses)
            problems += _port_problems(source, spec, config, {} if may_reuse else ports)
    return problems


def _owner(source: SourceObject) -> str:
    return f"Service {source.namespace}/{source.name}"


def _address_problems(
    source: SourceObject, spec: dict[str, Any], config: ClusterConfig, taken: dict[IPv4Address, str]
) -> list[Problem]:
    text = spec.get("clusterIP")
    try:
        address = IPv4Address(text) if isinstance(text, str) else None
    except ValueError:  # '', 'None', or malformed, which `kinds` reports
        address = None
    if address is None:
        return []
    owner = taken.setdefault(address, _owner(source))
    unusable = (config.service_cidr.network_address, config.service_cidr.broadcast_address)
    if address not in config.service_cidr or address in unusable:
        reason = (
            f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {config.service_cidr}"
        )
    elif owner != _owner(source):
        reason = f"provided IP is already allocated (to {owner})"
    else:
        return []
    message = f'spec.clusterIPs: Invalid value: []string{{"{address}"}}: failed to allocate IP {address}: {reason}'
    return [Problem(source.file, source.line_of("spec.clusterIP"), message)]


def _port_problems(
    source: SourceObject, spec: dict[str, Any], config: ClusterConfig, taken: dict[tuple[str, int], str]
) -> list[Problem]:
    first, last = config.node_port_range
    problems = []
    for index, port in enumerate(spec.get("ports") or ()):
        number = port.get("nodePort") if isinstance(port, dict) else None
        if not isinstance(number, int) or number == 0:
            continue
        owner = taken.setdefault((str(port.get("protocol") or "TCP"), number), _owner(source))
        if not first <= number <= last:
            reason = f"provided port is not in the valid range. The range of valid ports is {first}-{last}"
        elif owner != _owner(source):
            reason = f"provided port is already allocated (to {owner})"
        else:
            continue
        field = f"spec.ports[{index}].nodePort"
        problems.append(Problem(source.file, source.line_of(field), f"{field}: Invalid value: {number}: {reason}"))
    return problems
