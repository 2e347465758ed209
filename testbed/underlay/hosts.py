"""Nodes, outside hosts and pods as Mininet hosts.

A `LabHost` has its namespaces from the start and a shell only when something asks for one (`cmd`, Mininet's CLI); a
program started by `popen` lives in all of them. What the three kinds add is their set-up, run inside the new namespaces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Interface
from typing import Any

from testbed.errors import NotPresent
from testbed.kernel import linux, sysctl
from testbed.kernel.iptables import choose_iptables
from testbed.kernel.netns import inside_network
from testbed.kernel.rootfs import overlay_options, write_upper
from testbed.kernel.rtnetlink import LOOPBACK_INDEX, RtnetlinkSocket, add_address, set_link
from testbed.underlay.holder import Holder, hold_namespaces, new_namespaces
from testbed.underlay.stock import Host, Intf

_NODE_NAMESPACES = linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS
_POD_NAMESPACES = linux.CLONE_NEWNET | linux.CLONE_NEWUTS

INTERFACE_INDEX = 32
"""Index of a host's first interface: above the tunnel devices that some modules put into every new namespace."""


class NetlinkIntf(Intf):
    """An interface that netlink made and configures; ``index`` is its number in its node's namespace."""

    index = 0

    def config(self, **_params: Any) -> dict[str, Any]:
        """Nothing is left to configure: the link came up with its address."""
        return {}

    def setIP(self, ipstr: str, prefixLen: int | None = None) -> None:  # noqa: N802, N803  # Mininet's names
        address = IPv4Interface(ipstr if "/" in ipstr else f"{ipstr}/{prefixLen}")
        with self.node.rtnetlink() as netlink:
            netlink.send([add_address(self.index, address)])
        self.ip, self.prefixLen = str(address.ip), address.network.prefixlen

    def updateIP(self) -> str | None:  # noqa: N802
        return self.ip

    def updateMAC(self) -> str | None:  # noqa: N802
        return self.mac

    def updateAddr(self) -> tuple[str | None, str | None]:  # noqa: N802
        return self.ip, self.mac

    def isUp(self, setUp: bool = False) -> bool:  # noqa: N802
        with self.node.rtnetlink() as netlink:
            if setUp:
                netlink.send([set_link(self.index, up=True)])
            return any(link.is_up for link in netlink.list_links() if link.index == self.index)

    def delete(self) -> None:
        """The kernel deletes a link with its namespace or its peer; nothing is typed for that."""
        self.node.delIntf(self)
        self.link = None


class LabHost(Host):
    """A Mininet host whose namespaces are held by a `Holder` instead of by a shell."""

    namespaces = _POD_NAMESPACES
    sysctls: Mapping[str, str] = sysctl.POD

    def __init__(self, name: str, **params: Any) -> None:
        self.holder: Holder | None = None
        self.wants_shell = False
        super().__init__(name, **params)

    def set_up(self) -> None:
        """Runs in the new namespaces, in the process that holds them."""
        linux.sethostname(self.params.get("hostname", self.name))
        sysctl.apply_sysctls(self.sysctls, self.name)
        with RtnetlinkSocket(self.name) as netlink:
            netlink.send([set_link(LOOPBACK_INDEX, up=True)])

    def startShell(self, mnopts: str | None = None) -> None:  # noqa: N802
        """Make the namespaces. Mininet calls this when a host is made; the shell itself waits until it is wanted."""
        if self.wants_shell:
            self._start_real_shell()
            return
        self.holder = hold_namespaces(self.name, self.namespaces, self.set_up)
        self.pid = self.holder.pid

    def _start_real_shell(self) -> None:
        # Mininet's mnexec enters neither PID nor UTS; nsenter (util-linux) does. The rest is Mininet's protocol.
        holder_pid = self.pid
        super().startShell()
        self.pid = holder_pid

    def _popen(self, cmd: Sequence[str], **params: Any) -> Any:
        # Mininet starts a shell by `mnexec -cdn ...`, which would put it into a new network namespace
        if cmd[0] == "mnexec":
            cmd, params["start_new_session"] = [*self._enter_command(), *cmd[2:]], True
        return super()._popen(cmd, **params)

    def _enter_command(self) -> list[str]:
        if self.holder is None:
            raise NotPresent(f"{self.name}: its namespaces are gone")
        mount = ["--mount"] if self.namespaces & linux.CLONE_NEWNS else []
        return ["nsenter", *self.holder.nsenter_options, *mount, "--"]

    def _wanted_shell(self) -> None:
        if not self.shell:
            self.wants_shell = True
            self.startShell()

    def sendCmd(self, *args: Any, **kwargs: Any) -> None:  # noqa: N802
        self._wanted_shell()
        super().sendCmd(*args, **kwargs)

    def cmd(self, *args: Any, **kwargs: Any) -> Any:
        self._wanted_shell()
        return super().cmd(*args, **kwargs)

    def popen(self, *args: Any, **kwargs: Any) -> Any:
        """Mininet's popen, in every namespace of the host."""
        return super().popen(*args, **{"mncmd": self._enter_command(), **kwargs})

    def config(self, **_params: Any) -> dict[str, Any]:
        """Nothing is left to type: addresses and routes came with the links."""
        return {}

    def rtnetlink(self) -> RtnetlinkSocket:
        """Return a netlink socket of this host's network namespace."""
        if self.holder is None:
            raise NotPresent(f"{self.name}: its namespaces are gone")
        with inside_network(self.holder.network_fd):
            return RtnetlinkSocket(self.name)

    def terminate(self) -> None:
        """End the shell, if one ran, and the process that holds the namespaces."""
        super().terminate()
        if self.holder:
            self.holder.release()
            self.holder = None


class OutsideHost(LabHost):
    """A machine beside the cluster: its own network, mounts and hostname.

    Params: ``hostname``; ``private_folder``, a folder of this host alone for what is written to /etc; ``etc_files``
    (name -> text); ``lab_folder``, which stays visible although /run is the host's own.
    """

    namespaces = _NODE_NAMESPACES
    sysctls = sysctl.HOST

    def set_up(self) -> None:
        super().set_up()
        folder, lab_folder = self.params["private_folder"], self.params["lab_folder"]
        for part in ("upper", "work"):
            os.makedirs(f"{folder}/etc/{part}")
        write_upper(f"{folder}/etc/upper", {"hostname": f"{self.name}\n", **self.params["etc_files"]})
        # An overlay, because resolv.conf may be a dangling link, over which nothing can be mounted.
        layers = overlay_options("/etc", f"{folder}/etc/upper", f"{folder}/etc/work")
        linux.mount("overlay", "/etc", "overlay", 0, layers)
        linux.mount("sysfs", "/sys", "sysfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        lab = linux.open_tree(lab_folder)
        linux.mount("tmpfs", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755")
        os.makedirs(lab_folder, mode=0o700, exist_ok=True)
        linux.move_mount(lab, lab_folder)
        os.close(lab)


class ClusterNode(OutsideHost):
    """A cluster's node: an outside host that forwards, with a bridge for its pods.

    Params: also ``iptables_backend``, what ``iptables`` is on this node; '' leaves it as it is on the machine.
    """

    sysctls = sysctl.NODE

    def set_up(self) -> None:
        super().set_up()
        with open("/run/xtables.lock", "w"):  # shared with kube-proxy's pod, which finds it as on a node in use
            pass
        if self.params["iptables_backend"]:
            choose_iptables(self.params["iptables_backend"])


class PodHost(LabHost):
    """A pod's sandbox. Its containers bring mount and PID namespaces of their own.

    ``interface`` holds the requests for its end of the link: it is set up as soon as the link is there.
    """

    def startShell(self, mnopts: str | None = None) -> None:  # noqa: N802
        """Make the namespaces, which descriptors hold: a process for that costs 1 ms and 0.2 MiB a pod."""
        if self.wants_shell:
            super().startShell(mnopts)
            return
        with new_namespaces() as holder:
            self.set_up()
        self.holder = holder
