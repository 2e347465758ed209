"""Services and EndpointSlices by chance: every kind of address, policy, protocol and condition, from a seed."""

from __future__ import annotations

import random
from typing import Any

from proxy_support import NODE, endpoint, endpoint_slice, service

Object = dict[str, Any]


def random_objects(seed: int, services: int = 8) -> tuple[list[Object], list[Object]]:
    """Return Services and their slices; the same for the same seed. A pod may stand behind several Services."""
    chance = random.Random(seed)
    found: list[Object] = []
    slices: list[Object] = []
    for number in range(services):
        name = f"svc{number}"
        spec: dict[str, Any] = {"protocol": chance.choice(["TCP", "TCP", "UDP", "SCTP"])}
        if chance.random() < 0.5:
            spec["node_port"] = 30000 + number
        if chance.random() < 0.4:
            spec["ingress"] = [f"5.6.{number}.{n}" for n in range(chance.randint(1, 2))]
            if chance.random() < 0.5:
                ranges = ["203.0.113.0/25", "192.168.0.0/24", "198.51.100.0/24", "203.0.113.64/26"]
                spec["loadBalancerSourceRanges"] = chance.sample(ranges, chance.randint(1, 3))
        if chance.random() < 0.3:
            spec["externalIPs"] = [f"192.168.99.{number}"]
        if chance.random() < 0.3:
            spec["internalTrafficPolicy"] = "Local"
        if chance.random() < 0.4:
            spec["externalTrafficPolicy"] = "Local"
        if chance.random() < 0.3:
            spec["sessionAffinity"] = "ClientIP"
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": chance.choice([10, 3600, 10800])}}
        port_name = chance.choice(["", "p80", "http"])
        found.append(service(name, f"172.30.0.{number + 1}", port=80 + number, port_name=port_name, **spec))
        for suffix in ("a", "b")[: chance.randint(0, 2)]:
            behind = [_random_endpoint(chance) for _ in range(chance.randint(0, 3))]
            port, protocol = chance.choice([80, 8080]), spec["protocol"]
            slices.append(
                endpoint_slice(name, *behind, port=port, port_name=port_name, suffix=suffix, protocol=protocol)
            )
    return found, slices


def _random_endpoint(chance: random.Random) -> Object:
    here = chance.random() < 0.4
    address, node = f"10.180.{0 if here else 1}.{chance.randint(1, 9)}", NODE if here else "node2"
    kind = chance.random()
    if kind < 0.7:
        return endpoint(address, node)
    return endpoint(address, node, ready=False, serving=kind < 0.9, terminating=True)
