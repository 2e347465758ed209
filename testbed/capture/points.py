"""POINTs of a command line: which interfaces they are. Pure: the cluster's objects and the links of its places in, points out.

======================== ==================================================================================
``node1``                the node's uplink, cni0, lo and its ends of its pods' links
``client``               an outside host's uplink
``NAMESPACE/POD``        the pod's eth0
``WHERE:INTERFACE``      one interface of any of these
``svc/NAMESPACE/NAME``   every place where packets of that Service pass, and of them only those
``all``                  every node, outside host and pod
======================== ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from testbed.capture.names import service_addresses
from testbed.errors import InputError, TestbedError
from testbed.manifests.text import suggestion
from testbed.model.objects import Object, labels_of, name_of, namespace_of
from testbed.model.service import SERVICE_NAME_LABEL
from testbed.model.topology import NodeSpec, Topology

MAX_POINTS = 128
"""Each is a process and a ring buffer of the kernel's."""
_MAX_FILTER_TERMS = 64
POD_BRIDGE = "cni0"
POD_INTERFACE = "eth0"
_MANY_NAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One interface. ``mac`` is its own address, ``peer_mac`` that of the only machine behind it; b'' where not known."""

    place: str  # a node, an outside host or NAMESPACE/POD
    interface: str
    mac: bytes = b""
    peer_mac: bytes = b""
    about: str = ""  # for people: whose link it is
    filter: str = ""  # what a svc/ point lets through; '' for everything

    @property
    def name(self) -> str:
        return f"{self.place}:{self.interface}"


class Link(NamedTuple):
    """An interface that a place has. ``pod``: of a node's end of a pod's link, that pod."""

    name: str
    mac: bytes
    pod: str = ""
    pod_mac: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a lab has. ``links_of`` raises a TestbedError that says why a place has none."""

    lab: str
    topology: Topology
    pods: Sequence[Object]
    services: Sequence[Object]
    slices: Sequence[Object]
    links_of: Callable[[str], Sequence[Link]]

    def pod(self, name: str) -> Object | None:
        return next((pod for pod in self.pods if f"{namespace_of(pod)}/{name_of(pod)}" == name), None)

    @property
    def machine_names(self) -> list[str]:
        return [machine.name for machine in self.topology.machines]

    @property
    def pod_names(self) -> list[str]:
        return [f"{namespace_of(pod)}/{name_of(pod)}" for pod in self.pods if is_alive(pod)]


def is_alive(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def resolve_points(texts: Sequence[str], world: World, *, filter_text: str = "") -> list[Point]:
    """Return the points, each once, in the order they were named.

    Raises:
        InputError: everything that is wrong with them.
    """
    found: dict[str, Point] = {}
    problems: list[str] = []
    for text in texts:
        try:
            for point in _resolve(text, world):
                known = found.get(point.name)
                if known is None or (known.filter and not point.filter):  # seen whole by another POINT
                    found[point.name] = point
        except TestbedError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    if len(found) > MAX_POINTS:
        raise InputError(
            f"{' '.join(texts)} is {len(found)} interfaces, and a capture takes {MAX_POINTS}: "
            "name fewer points, for example the nodes' uplinks (node1:eth0)"
        )
    return [_narrow(point, filter_text) for point in found.values()]


def _narrow(point: Point, filter_text: str) -> Point:
    if point.filter and filter_text:
        filter_text = f"({point.filter}) and ({filter_text})"
    return Point(
        place=point.place, interface=point.interface, mac=point.mac, peer_mac=point.peer_mac, about=point.about,
        filter=filter_text or point.filter,
    )  # fmt: skip


def _resolve(text: str, world: World) -> Iterator[Point]:
    if text == "all":
        for place in (*world.machine_names, *(pod for pod in world.pod_names if _has_network(world, pod))):
            yield from _whole_place(place, world)
    elif text.startswith("svc/") and text.count("/") == 2:
        yield from _service_points(text, world)
    elif ":" in text:
        where, _, interface = text.partition(":")
        place = _place(where, world)
        links = world.links_of(place)
        link = next((link for link in links if link.name == interface), None)
        if link is None:
            names = [link.name for link in links]
            raise InputError(
                f"{where} has no interface {interface!r}{suggestion(interface, names)}; it has {', '.join(names)}"
            )
        yield _point(place, link, world)
    else:
        yield from _whole_place(_place(text, world), world)


def _place(text: str, world: World) -> str:
    """Return the place of a name; a pod with the host's network is its node."""
    if text in world.machine_names:
        return text
    pod = world.pod(text)
    if pod is not None and pod["spec"].get("hostNetwork"):
        if not (node := pod["spec"].get("nodeName")):
            raise InputError(f"pod {text} runs on no node yet")
        return str(node)
    if pod is not None:
        return text
    services = [f"svc/{namespace_of(service)}/{name_of(service)}" for service in world.services]
    known = [*world.machine_names, *world.pod_names, *services, "all"]
    raise InputError(f"there is no point {text!r} in lab {world.lab!r}{suggestion(text, known)}; {_listing(world)}")


def _listing(world: World) -> str:
    nodes = ", ".join(node.name for node in world.topology.nodes)
    hosts = ", ".join(host.name for host in world.topology.hosts) or "none"
    return (
        f"nodes: {nodes}; hosts: {hosts}; pods: {_some(world.pod_names)}; Services: "
        f"{_some([f'svc/{namespace_of(s)}/{name_of(s)}' for s in world.services])}; or WHERE:INTERFACE, or all"
    )


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MANY_NAMES} more" if len(names) > _MANY_NAMES else ""
    return ", ".join(sorted(names)[:_MANY_NAMES]) + more or "none"


def _has_network(world: World, pod_name: str) -> bool:
    pod = world.pod(pod_name)
    return bool(pod and not pod["spec"].get("hostNetwork") and (pod.get("status") or {}).get("podIP") and is_alive(pod))


def _whole_place(place: str, world: World) -> Iterator[Point]:
    is_node = place in {node.name for node in world.topology.nodes}
    for link in world.links_of(place):
        if link.name != "lo" or is_node:  # a node's own requests to its NodePorts pass lo
            yield _point(place, link, world)


def _point(place: str, link: Link, world: World) -> Point:
    machine = next((machine for machine in world.topology.machines if machine.name == place), None)
    about = f"link of pod {link.pod}" if link.pod else ""
    if not about and machine is not None and link.name == machine.interface:
        about = f"{'node' if isinstance(machine, NodeSpec) else 'host'} {place}, {machine.address}"
    elif not about and machine is not None and link.name == POD_BRIDGE:
        about = f"bridge of {place}'s pods"
    elif not about and machine is None:
        pod = world.pod(place)
        about = f"pod on {pod['spec'].get('nodeName')}, {pod['status'].get('podIP')}" if pod else ""
    mac = b"" if link.name == "lo" else link.mac
    return Point(place=place, interface=link.name, mac=mac, peer_mac=link.pod_mac, about=about)


# -- Services ----------------------------------------------------------------------------------------------------------


def _service_points(text: str, world: World) -> Iterator[Point]:
    _, namespace, name = text.split("/")
    service = next((s for s in world.services if (namespace_of(s), name_of(s)) == (namespace, name)), None)
    if service is None:
        known = [f"svc/{namespace_of(s)}/{name_of(s)}" for s in world.services]
        raise InputError(
            f"there is no Service {namespace}/{name} in lab {world.lab!r}{suggestion(text, known)}; Services: {_some(known)}"
        )
    if service["spec"].get("type") == "ExternalName":
        raise InputError(f"Service {namespace}/{name} is an ExternalName: no packet is sent to it")
    slices = [
        one for one in world.slices
        if namespace_of(one) == namespace and labels_of(one).get(SERVICE_NAME_LABEL) == name
    ]  # fmt: skip
    chosen = service_filter(service, slices)
    pods = sorted(_endpoint_pods(slices) & set(world.pod_names))
    for point in _along_the_way(pods, world):
        yield Point(
            place=point.place, interface=point.interface, mac=point.mac, peer_mac=point.peer_mac, about=point.about,
            filter=chosen,
        )  # fmt: skip


def _along_the_way(pods: Sequence[str], world: World) -> Iterator[Point]:
    """Return outside hosts, every node's uplink and bridge, the links of the pods and the pods."""
    for host in world.topology.hosts:
        yield from _whole_place(host.name, world)
    for node in world.topology.nodes:
        for link in world.links_of(node.name):
            if link.name in (node.interface, POD_BRIDGE) or link.pod in pods:
                yield _point(node.name, link, world)
    for pod in pods:
        if _has_network(world, pod):
            yield from _whole_place(pod, world)


def _endpoint_pods(slices: Sequence[Object]) -> set[str]:
    targets = [
        (one, endpoint.get("targetRef") or {}) for one in slices for endpoint in one.get("endpoints") or ()
    ]  # fmt: skip
    return {
        f"{ref.get('namespace') or namespace_of(one)}/{ref['name']}" for one, ref in targets if ref.get("kind") == "Pod"
    }


def service_filter(service: Object, slices: Sequence[Object]) -> str:
    """Return the pcap filter of a Service's packets: to and from its addresses and ports, and its endpoints'; ICMP says no."""
    fronts = [address for _, addresses in service_addresses(service) for address in addresses]
    pairs: set[tuple[str, str, int]] = set()
    ports: set[tuple[str, int]] = set()
    for port in service["spec"].get("ports") or ():
        protocol = port.get("protocol", "TCP").lower()
        pairs |= {(front, protocol, port["port"]) for front in fronts}
        if port.get("nodePort"):
            ports.add((protocol, port["nodePort"]))
    for one in slices:
        addresses = [address for endpoint in one.get("endpoints") or () for address in endpoint.get("addresses") or ()]
        for port in one.get("ports") or ():
            if port.get("port"):
                pairs |= {(address, port.get("protocol", "TCP").lower(), port["port"]) for address in addresses}
    if len(pairs) > _MAX_FILTER_TERMS:  # a filter is a program of at most 4,096 instructions
        ports |= {(protocol, port) for _, protocol, port in pairs}
        pairs = set()
    terms = [f"(host {address} and {protocol} port {port})" for address, protocol, port in sorted(pairs)]
    terms += [f"({protocol} port {port})" for protocol, port in sorted(ports)]
    return " or ".join([*terms, "icmp"])
