"""What a running lab has to capture at: its places, their namespaces and links, and the names of their addresses."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from ipaddress import IPv4Address

from testbed.capture.names import Directory
from testbed.capture.points import Link, World
from testbed.errors import InputError, NotPresent, TestbedError
from testbed.kernel.netns import inside_network
from testbed.kernel.rtnetlink import RtnetlinkSocket, mac_bytes, mac_of
from testbed.kubelet.runtime import pod_link_name
from testbed.lab.handle import Lab
from testbed.model.flows import Flow
from testbed.model.objects import name_of, namespace_of

_REFRESH_S = 1.0


class LabCluster:
    """A lab's places and objects, as of when this was made; `close` gives the namespaces back."""

    def __init__(self, lab: Lab) -> None:
        """Raises LabError or ApiError when the lab does not answer."""
        self.lab = lab
        self._networks: dict[str, int] = {}
        pods, services, slices = (
            lab.api.list(resource)[0] for resource in ("pods", "services", "endpointslices.discovery.k8s.io")
        )
        self.world = World(
            lab=lab.name, topology=lab.topology, pods=pods, services=services, slices=slices, links_of=self.links_of
        )
        self._links: dict[str, list[Link]] = {}
        self._pod_by_link = {
            pod_link_name(pod["metadata"]["uid"]): pod
            for pod in pods
            if not pod["spec"].get("hostNetwork") and (pod.get("status") or {}).get("podIP")
        }

    def network(self, place: str) -> int:
        """Return a descriptor of a place's network namespace, ours.

        Raises:
            NotPresent: it has none yet, or no more.
        """
        if place not in self._networks:
            try:
                self._networks[place] = self.lab.network(place)
            except InputError as error:
                pod = self.world.pod(place)
                phase = ((pod or {}).get("status") or {}).get("phase", "gone")
                raise NotPresent(f"pod {place} has no network ({phase}): wait until it runs") from error
        return self._networks[place]

    def links_of(self, place: str) -> Sequence[Link]:
        """Return the interfaces of a place, in the order of their numbers, lo last."""
        if place not in self._links:
            with inside_network(self.network(place)), RtnetlinkSocket(place) as netlink:
                found = sorted(netlink.list_links(), key=lambda link: (link.name == "lo", link.index))
            # tunnel devices that some modules put into every namespace are down
            self._links[place] = [self._link(each.name, each.mac) for each in found if each.is_up]
        return self._links[place]

    def _link(self, name: str, mac: bytes) -> Link:
        pod = self._pod_by_link.get(name)
        if pod is None:
            return Link(name, mac)
        address = IPv4Address(pod["status"]["podIP"])
        return Link(name, mac, f"{namespace_of(pod)}/{name_of(pod)}", mac_bytes(mac_of(address)))

    def close(self) -> None:
        """Give the namespaces back: a pod's lives as long as somebody holds it."""
        for fd in self._networks.values():
            os.close(fd)
        self._networks.clear()


class Names:
    """A directory that is read anew when a flow shows an address that it does not know."""

    def __init__(self, cluster: LabCluster) -> None:
        self._lab = cluster.lab
        self._topology = cluster.world.topology
        self.directory = Directory(self._topology, cluster.world.pods, cluster.world.services)
        self._read_at = time.monotonic()

    def meet(self, flow: Flow) -> Directory:
        """Return a directory for a connection that is new."""
        strange = not (
            self.directory.knows(flow.source) and self.directory.names(flow.destination, flow.port, flow.protocol)
        )
        if strange and time.monotonic() > self._read_at + _REFRESH_S:
            self._read_at = time.monotonic()
            with contextlib.suppress(TestbedError, OSError):  # the lab is ending: then old names must do
                pods, services = (self._lab.api.list(resource)[0] for resource in ("pods", "services"))
                self.directory = Directory(self._topology, pods, services)
        return self.directory
