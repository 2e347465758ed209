"""LAN switches and the links to them, made by netlink."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from ipaddress import IPv4Interface
from typing import Any

from testbed.errors import KernelError, MissingFeature
from testbed.kernel.modules import WITHOUT_NETEM, is_unknown_qdisc
from testbed.kernel.netlink import Request
from testbed.kernel.rtnetlink import RtnetlinkSocket, add_address, add_bridge, add_veth, mac_of, set_link
from testbed.kernel.runner import not_installed
from testbed.model.topology import LinkSpec
from testbed.underlay.hosts import NetlinkIntf
from testbed.underlay.stock import Link, Switch


def port_name(host: str, interface: str) -> str:
    """Return the name of a switch's port: HOST-INTERFACE as Mininet has it, or a hash where that is over 15 characters."""
    name = f"{host}-{interface}"
    return name if len(name) <= 15 else f"port{hashlib.sha256(name.encode()).hexdigest()[:10]}"


class LanSwitch(Switch):
    """A LAN: a bridge in the lab's own network namespace, which also routes between LANs (its address is the gateway).

    Params: ``bridge`` (interface name), ``index``, ``gateway`` (IPv4Interface).
    """

    def __init__(self, name: str, **params: Any) -> None:
        # Not Switch.__init__: it wants a digit in the name for a datapath id, and types ifconfig for the loopback.
        super(Switch, self).__init__(name, **{**params, "inNamespace": False})
        self.dpid, self.opts, self.listenPort, self.controlIntf = "", "", None, None

    def startShell(self, mnopts: str | None = None) -> None:  # noqa: N802
        """Make the bridge; like the hosts, no shell until one is wanted."""
        bridge, index = self.params["bridge"], self.params["index"]
        gateway: IPv4Interface = self.params["gateway"]
        with RtnetlinkSocket(self.name) as netlink:
            netlink.send([add_bridge(bridge, index, mac=mac_of(gateway.ip)), add_address(index, gateway)])

    def rtnetlink(self) -> RtnetlinkSocket:
        return RtnetlinkSocket(self.name)

    def cmd(self, *args: Any, **kwargs: Any) -> Any:
        if not self.shell:
            super().startShell()
        return super().cmd(*args, **kwargs)

    def connected(self) -> bool:
        return True

    def start(self, _controllers: Any) -> None:
        """It forwards since it was made."""

    def config(self, **_params: Any) -> dict[str, Any]:
        return {}

    def stop(self, deleteIntfs: bool = True) -> None:  # noqa: N803
        """The kernel takes the bridge away with the lab's namespace."""
        super().stop(deleteIntfs=False)


class LanLink(Link):
    """A veth pair from a host (its interface, up, with its address) to a port of a LAN switch.

    Params: ``address`` (IPv4Interface), ``index`` (of the port), ``extra`` (requests to carry out in the host with it).
    """

    def __init__(
        self, host: Any, switch: LanSwitch, *, interface: str, index: int, host_index: int, address: IPv4Interface,
        extra: tuple[Request, ...] = (),
    ) -> None:  # fmt: skip
        port, mac = port_name(host.name, interface), mac_of(address.ip)
        with switch.rtnetlink() as netlink:
            veth = add_veth(
                port, index, interface, host_index, host.holder.network_fd, peer_mac=mac, master=switch.params["index"]
            )
            netlink.send([veth])
        with host.rtnetlink() as netlink:
            netlink.send([set_link(host_index, up=True), add_address(host_index, address), *extra])
        self.fast = True
        self.intf1 = NetlinkIntf(interface, node=host, link=self, mac=mac, moveIntfFn=self._ignore)
        self.intf1.index, self.intf1.ip, self.intf1.prefixLen = host_index, str(address.ip), address.network.prefixlen
        self.intf2 = NetlinkIntf(port, node=switch, link=self, moveIntfFn=self._ignore)
        self.intf2.index = index


def shape(host: Any, interface: str, link: LinkSpec) -> None:
    """Limit the rate, delay or thin out what leaves an interface.

    Raises:
        MissingFeature: tc is not installed, or the kernel has no netem for delay and loss.
        KernelError: tc refused.
    """
    where = f"{host.name}: link {link.between[0]}-{link.between[1]}"
    if shutil.which("tc") is None:
        raise not_installed("tc")
    parent = ["root", "handle", "1:"]
    if link.delay_ms or link.loss_percent:
        netem = ["netem"]
        if link.delay_ms:
            netem += ["delay", f"{link.delay_ms:g}ms"]
        if link.loss_percent:
            netem += ["loss", f"{link.loss_percent:g}%"]
        message = _tc(host, interface, [*parent, *netem])
        if is_unknown_qdisc(message):
            raise MissingFeature(f"{where}: {WITHOUT_NETEM}")
        if message:
            raise KernelError(f"{where}: tc refused {' '.join(netem)}: {message}")
        parent = ["parent", "1:"]
    if link.rate_mbit:
        # a burst of 10 ms or 16 packets, whichever is more: the bucket must hold what arrives between two timer ticks
        burst = max(int(link.rate_mbit * 1e6 / 8 * 0.01), 16 * 1514)
        rate = ["tbf", "rate", f"{int(link.rate_mbit * 1000)}kbit", "burst", str(burst), "latency", "50ms"]
        message = _tc(host, interface, [*parent, *rate])
        if message:
            raise KernelError(f"{where}: tc refused {' '.join(rate)}: {message}")


def _tc(host: Any, interface: str, words: list[str]) -> str:
    """Run tc in the host's namespace; return what it complained about, or ''."""
    inside = [] if isinstance(host, LanSwitch) else host._enter_command()
    argv = [*inside, "tc", "qdisc", "add", "dev", interface, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"status {done.returncode}")
