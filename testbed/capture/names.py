"""Whose an address is: pods, Services, nodes, outside hosts, by what the API says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from testbed.model.flows import PROTOCOL_NAMES
from testbed.model.objects import Object, name_of, namespace_of
from testbed.model.topology import Topology

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Name:
    """Who has an address and port. ``place`` is the machine or pod whose it is, '' for an address that nobody has (a VIP)."""

    text: str
    place: str = ""
    node: str = ""  # of a pod: where it runs


class Directory:
    """Names of addresses, as of one moment."""

    def __init__(self, topology: Topology, pods: Sequence[Object], services: Sequence[Object]) -> None:
        self._topology = topology
        self._addresses: dict[str, Name] = {}
        self._ports: dict[tuple[str, str, int], str] = {}  # address, protocol, port -> text
        self._node_ports: dict[tuple[str, int], str] = {}
        for machine in topology.machines:
            self._addresses[str(machine.address)] = Name(machine.name, machine.name)
        for node in topology.nodes:
            self._addresses[str(node.pod_cidr.network_address + 1)] = Name(f"{node.name} (cni0)", node.name)
        for network in topology.networks:
            self._addresses[str(network.gateway)] = Name(f"gateway of {network.name}")
        for pod in pods:
            self._add_pod(pod)
        for service in services:
            self._add_service(service)

    def _add_pod(self, pod: Object) -> None:
        status, spec = pod.get("status") or {}, pod["spec"]
        if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
            return
        name = f"{namespace_of(pod)}/{name_of(pod)}"
        for address in {status.get("podIP"), *(each.get("ip") for each in status.get("podIPs") or ())} - {None, ""}:
            self._addresses[address] = Name(name, name, str(spec.get("nodeName", "")))

    def _add_service(self, service: Object) -> None:
        name = f"{namespace_of(service)}/{name_of(service)}"
        for port in service["spec"].get("ports") or ():
            full = f"{name}:{port['name']}" if port.get("name") else name
            protocol = port.get("protocol", "TCP")
            for kind, addresses in service_addresses(service):
                for address in addresses:
                    self._ports[address, protocol, port["port"]] = f"{kind} of {full}"
            if port.get("nodePort"):
                self._node_ports[protocol, port["nodePort"]] = full

    def knows(self, address: Address) -> bool:
        return str(address) in self._addresses

    def names(self, address: Address, port: int, protocol: int) -> bool:
        """Say whether an address is known, by itself or as a Service's with this port."""
        return self.knows(address) or (str(address), PROTOCOL_NAMES.get(protocol, ""), port) in self._ports

    def of(self, address: Address, port: int, protocol: int) -> Name:
        """Return who has an address, and which Service it is when somebody sends to this port of it."""
        text, name = PROTOCOL_NAMES.get(protocol, ""), self._addresses.get(str(address))
        if front := self._ports.get((str(address), text, port)):
            return Name(front, name.place if name else "")
        if name is not None and not name.node and (full := self._node_ports.get((text, port))):
            return Name(f"NodePort {port} of {full} at {name.text}", name.place)
        return name or Name(str(address))

    def who(self, address: Address) -> Name:
        """Return who has an address, whatever the port."""
        return self._addresses.get(str(address)) or Name(str(address))


def service_addresses(service: Object) -> Iterable[tuple[str, list[str]]]:
    """Return the addresses of a Service, by what they are."""
    spec: dict[str, Any] = service["spec"]
    yield "ClusterIP", [ip for ip in spec.get("clusterIPs") or [spec.get("clusterIP")] if ip and ip != "None"]
    yield "external IP", list(spec.get("externalIPs") or ())
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    yield "load balancer", [each["ip"] for each in ingress if each.get("ip")]
