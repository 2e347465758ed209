"""Network settings of the namespace this process is in.

A new namespace starts with the first one's values, not with the kernel's defaults (docs/architecture.md), so everything that
packets depend on is set, in nodes, outside hosts and pods alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from testbed.errors import KernelError

_COMMON = {
    "net/ipv6/conf/all/disable_ipv6": "1",  # IPv6 is off unless asked for: its neighbours share one small table
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/arp_ignore": "0",
    "net/ipv4/conf/all/arp_announce": "0",
    "net/ipv4/conf/default/arp_ignore": "0",
    "net/ipv4/conf/all/route_localnet": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    # what container runtimes set, so that a program without capabilities may listen on port 80 and ping
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/ping_group_range": "0 2147483647",
}

HOST: Mapping[str, str] = {**_COMMON, "net/ipv4/ip_forward": "0"}
POD: Mapping[str, str] = HOST
NODE: Mapping[str, str] = {
    **_COMMON,
    "net/ipv4/ip_forward": "1",
    # same-node pod -> ClusterIP -> pod: the reply must pass the node's netfilter to be translated back
    "net/bridge/bridge-nf-call-iptables": "1",
}
LAN: Mapping[str, str] = {
    **_COMMON,
    "net/ipv4/ip_forward": "1",
    # a FORWARD policy must not act on frames that only cross a switch; it also costs 30% of throughput
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}

_OPTIONAL = ("net/ipv6/",)  # a kernel without IPv6 has it off
_OPTIONAL_BRIDGE = ("net/bridge/bridge-nf-call-ip6tables", "net/bridge/bridge-nf-call-arptables")


def apply_sysctls(values: Mapping[str, str], where: str) -> None:
    """Set every value in the namespace this process is in.

    Raises:
        KernelError: a setting is missing or read-only; names it and ``where``.
    """
    for name, value in values.items():
        try:
            fd = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except FileNotFoundError:
            if name.startswith(_OPTIONAL) or name in _OPTIONAL_BRIDGE:
                continue
            hint = " (try `modprobe br_netfilter`)" if name.startswith("net/bridge/") else ""
            raise KernelError(f"{where}: the kernel has no setting {name.replace('/', '.')}{hint}") from None
        except OSError as error:
            raise KernelError(
                f"{where}: could not set {name.replace('/', '.')} to {value!r}: {error.strerror}"
            ) from error


def read_sysctl(name: str) -> str:
    """Return a setting of the namespace this process is in, '' when there is none of that name."""
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except OSError:
        return ""
