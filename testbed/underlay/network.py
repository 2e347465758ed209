"""A topology as a running Mininet network, and pods' sandboxes added to it.

::

    lab namespace     br-lan 192.168.93.1 ── node1-eth0 ─┐      (one bridge a LAN; routes between LANs)
    node namespace                                  eth0 192.168.93.11
                      cni0 10.244.1.1 ── vethXXXXXXXX ─┐   (hairpin on every port)
    pod namespace                                   eth0 10.244.1.2, default via 10.244.1.1
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from testbed.errors import NotPresent
from testbed.kernel import sysctl
from testbed.kernel.netlink import Request
from testbed.kernel.rtnetlink import (
    RtnetlinkSocket,
    add_address,
    add_bridge,
    add_neighbour,
    add_route,
    add_veth,
    delete_neighbour,
    mac_of,
    retire_link,
    set_hairpin,
    set_link,
)
from testbed.model.topology import HostSpec, LinkSpec, NodeSpec, Topology
from testbed.underlay.hosts import INTERFACE_INDEX, ClusterNode, LabHost, NetlinkIntf, OutsideHost, PodHost
from testbed.underlay.links import LanLink, LanSwitch, shape
from testbed.underlay.stock import Mininet

DEFAULT_ROUTE = IPv4Network("0.0.0.0/0")
POD_BRIDGE = "cni0"
_POD_BRIDGE_INDEX = 40
_FIRST_POD_LINK_INDEX = 100


@dataclass(slots=True)
class _PodLink:
    """A pod's link, as its node sees it."""

    node: str
    index: int
    address: IPv4Address


class LabNetwork(Mininet):
    """The lab's network; ``net['node1']`` is a Mininet host. Must be made in the lab's own network namespace."""

    def __init__(self, topology: Topology, lab_folder: str, private_folder: str, iptables_backend: str = "") -> None:
        """Store what to build; `build_topology` acts.

        Args:
            topology: The machines and networks.
            lab_folder: Stays visible in nodes and outside hosts.
            private_folder: A folder on the lab's own tmpfs.
            iptables_backend: What ``iptables`` is on nodes: ``legacy`` or ``nft``; '' leaves it as it is on this machine.
        """
        self.topology = topology
        self.lab_folder = lab_folder
        self.private_folder = private_folder
        self.iptables_backend = iptables_backend
        self._pods: dict[str, _PodLink] = {}
        self._next_pod_index = _FIRST_POD_LINK_INDEX
        self._node_sockets: dict[str, RtnetlinkSocket] = {}
        super().__init__(topo=None, switch=LanSwitch, host=LabHost, controller=None, link=LanLink, build=False)
        self.built = True

    def build_topology(self) -> None:
        """Make LANs, nodes and outside hosts, and their links, addresses and routes.

        Raises:
            KernelError: what the kernel refused, with the name of the host or link.
        """
        sysctl.apply_sysctls(sysctl.LAN, "the lab")
        with RtnetlinkSocket("the lab") as netlink:
            netlink.send([set_link(1, up=True)])
        for number, network in enumerate(self.topology.networks):
            self.addSwitch(
                network.name,
                bridge=f"br-{network.name}",
                index=10 + number,
                gateway=IPv4Interface((network.gateway, network.cidr.prefixlen)),
            )
        for number, machine in enumerate(self.topology.machines):
            self._add_host(machine, 1000 + number)
        self._route_to_pods()
        for link in self.topology.links:
            self._shape(link)

    def _add_host(self, spec: NodeSpec | HostSpec, port_index: int) -> None:
        network = self.topology.network(spec.network)
        params = {
            "private_folder": f"{self.private_folder}/hosts/{spec.name}",
            "lab_folder": self.lab_folder,
            "etc_files": self._etc_files(spec),
            "iptables_backend": self.iptables_backend,
        }
        host = self.addHost(spec.name, cls=ClusterNode if isinstance(spec, NodeSpec) else OutsideHost, **params)
        if isinstance(spec, NodeSpec):
            requests = [add_route(DEFAULT_ROUTE, network.gateway), *self._node_requests(spec)]
        else:
            requests = [add_route(DEFAULT_ROUTE, spec.gateway)]
        self.addLink(
            host,
            self[spec.network],
            interface=spec.interface,
            index=port_index,
            host_index=INTERFACE_INDEX,
            address=IPv4Interface((spec.address, network.cidr.prefixlen)),
            extra=tuple(requests),
        )

    def _node_requests(self, node: NodeSpec) -> list[Request]:
        """What a node has beyond an outside host: the bridge for its pods, and routes to the other nodes' pods."""
        gateway = first_address(node.pod_cidr)
        requests = [
            add_bridge(POD_BRIDGE, _POD_BRIDGE_INDEX, mac=mac_of(gateway)),
            add_address(_POD_BRIDGE_INDEX, IPv4Interface((gateway, node.pod_cidr.prefixlen))),
        ]
        for other in self.topology.nodes:
            if other.name != node.name and other.network == node.network:
                requests.append(add_route(other.pod_cidr, other.address))
        return requests

    def _route_to_pods(self) -> None:
        """Let the gateways know where pods are, as a BGP CNI does: pods reach outside hosts with their own address.

        The other usual way, a masquerade rule of the CNI's on each node, would stand between kube-proxy's.
        """
        with RtnetlinkSocket("the lab") as netlink:
            netlink.send([add_route(node.pod_cidr, node.address) for node in self.topology.nodes])

    def _etc_files(self, spec: NodeSpec | HostSpec) -> dict[str, str]:
        lines = ["127.0.0.1\tlocalhost"]
        lines += [f"{other.address}\t{other.name}" for other in self.topology.machines]
        return {"hosts": "\n".join(lines) + "\n", "resolv.conf": self.topology.resolv_conf}

    def _shape(self, link: LinkSpec) -> None:
        host, switch = self[link.between[0]], self[link.between[1]]
        mininet_link = next(found for found in self.links if found.intf1.node is host and found.intf2.node is switch)
        shape(host, mininet_link.intf1.name, link)
        shape(switch, mininet_link.intf2.name, link)

    def node_netlink(self, node: str) -> RtnetlinkSocket:
        """Return a netlink socket of a node's namespace that stays open: pods come and go through it."""
        if node not in self._node_sockets:
            self._node_sockets[node] = self[node].rtnetlink()
        return self._node_sockets[node]

    def add_pod(
        self, name: str, link_name: str, *, node: str, hostname: str, address: IPv4Address, network: IPv4Network
    ) -> PodHost:
        """Make a pod's namespaces and its link to the node's bridge, which forwards to it once the kernel has seen the link
        come up: at once, unless it has much to do with other namespaces.

        Args:
            name: the pod's name in this network, ``NAMESPACE/POD``.
            link_name: of the node's end, at most 15 characters.
        """
        pod: PodHost = self.addHost(name, cls=PodHost, hostname=hostname)
        index = self._next_pod_index
        self._next_pod_index += 1
        try:
            mac, gateway = mac_of(address), first_address(network)
            self.node_netlink(node).send(
                [
                    add_veth(
                        link_name,
                        index,
                        "eth0",
                        INTERFACE_INDEX,
                        _network_fd(pod),
                        peer_mac=mac,
                        master=_POD_BRIDGE_INDEX,
                    ),
                    set_hairpin(index),
                    add_neighbour(_POD_BRIDGE_INDEX, address, mac),
                ]
            )
            with pod.rtnetlink() as netlink:
                netlink.send(
                    [
                        set_link(INTERFACE_INDEX, up=True),
                        add_address(INTERFACE_INDEX, IPv4Interface((address, network.prefixlen))),
                        add_route(DEFAULT_ROUTE, gateway),
                        add_neighbour(INTERFACE_INDEX, gateway, mac_of(gateway)),
                    ]
                )
        except BaseException:
            self.delHost(pod)
            raise
        interface = NetlinkIntf("eth0", node=pod, mac=mac, moveIntfFn=lambda *_: None)
        interface.index, interface.ip, interface.prefixLen = INTERFACE_INDEX, str(address), network.prefixlen
        self._pods[name] = _PodLink(node, index, address)
        return pod

    def delete_pod(self, name: str) -> None:
        """Remove a pod's link and namespaces; succeeds when it is not there."""
        link = self._pods.pop(name, None)
        if link is not None:
            # The kernel deletes the link with the namespace, in its own time; deleting it here would wait 20 ms for
            # that. Taking it down makes the bridge forget at once what it learned about the address.
            self.node_netlink(link.node).send(
                [*retire_link(link.index), delete_neighbour(_POD_BRIDGE_INDEX, link.address)]
            )
        if name in self.nameToNode:
            self.delHost(self[name])

    def set_link(self, name: str, *, up: bool) -> None:
        """Plug or unplug a node's or outside host's LAN link, at the switch: both ends see it."""
        for link in self.links:
            if link.intf1.node.name == name:
                with link.intf2.node.rtnetlink() as netlink:
                    netlink.send([set_link(link.intf2.index, up=up)])
                return
        raise NotPresent(f"{name} has no link to a LAN")

    def addLink(self, node1: Any, node2: Any, **params: Any) -> Any:  # noqa: N802
        """Mininet's, without the interface class and ports that it would fill in."""
        link = LanLink(node1, node2, **params)
        self.links.append(link)
        return link

    def addHost(self, name: str, cls: Any = None, **params: Any) -> Any:  # noqa: N802
        """Mininet's, without the address it would take from a range of its own."""
        host = (cls or self.host)(name, **params)
        self.hosts.append(host)
        self.nameToNode[name] = host
        return host


def first_address(network: IPv4Network) -> IPv4Address:
    return network.network_address + 1


def _network_fd(host: LabHost) -> int:
    if host.holder is None:
        raise NotPresent(f"{host.name}: its namespaces are gone")
    return host.holder.network_fd


def make_private_folder(lab_folder: str) -> str:
    """Return the folder of the lab for what only its own mount namespace sees."""
    folder = f"{lab_folder}/private"
    os.makedirs(folder, exist_ok=True)
    return folder
