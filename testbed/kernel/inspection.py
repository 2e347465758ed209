"""Looks at a node from inside: what the doctor's detectors are given. Changes nothing.

Meant for `Lab.call`: both functions run in a forked child inside a machine's or a pod's namespaces.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from testbed.dataplane import nft_names
from testbed.dataplane.doctor import DnsCount, LinkSeen, NodeSeen, RouteSeen, RulesSeen
from testbed.dataplane.ipvs import IpvsObjects
from testbed.errors import KernelError
from testbed.kernel.addresses import list_local_addresses
from testbed.kernel.conntrack import list_udp_flows
from testbed.kernel.iptables import Iptables, detect_backend
from testbed.kernel.nftables import Nftables
from testbed.kernel.pace import patient
from testbed.kernel.runner import SubprocessRunner
from testbed.kernel.sysctl import read_sysctl

_LINKS = Path("/sys/class/net")
_SETTINGS = (
    "net/bridge/bridge-nf-call-iptables",
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/all/arp_ignore",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
)
_ANSWER_S = 2.0
_MOST_FLOWS = 20000  # of more, reading them would take longer than all the rest; a table that full is a finding itself
_TCP_LISTEN, _UDP_OPEN = "0A", "07"  # include/net/tcp_states.h, in /proc/net/tcp and udp


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeQuestion:
    """What to look at in a node: its LAN link, its pods' bridge, and what kube-proxy writes there."""

    interface: str
    bridge: str
    mode: str
    iptables_backend: str
    health: str  # kube-proxy's healthzBindAddress; '' for none


def look_at_node(question: NodeQuestion) -> NodeSeen:
    """Return what is there.

    Raises:
        KernelError: a tool or the kernel refused.
    """
    settings = (*_SETTINGS, f"net/ipv4/conf/{question.interface}/rp_filter")
    count, most = (read_sysctl(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    local_addresses, rules = _look_at_rules(question)
    return NodeSeen(
        links={path.name: _look_at_link(path) for path in _LINKS.iterdir() if (path / "mtu").exists()},
        routes=tuple(_read_routes(Path("/proc/thread-self/net/route").read_text())),
        sysctls={name: value for name in settings if (value := read_sysctl(name))},
        bridge_ports={
            path.name: (path / "hairpin_mode").read_text().strip() == "1"
            for path in sorted((_LINKS / question.bridge / "brif").glob("*"))
        },
        conntrack_count=int(count or 0),
        conntrack_max=int(most or 0),
        udp_flows=tuple(list_udp_flows()) if int(count or 0) <= _MOST_FLOWS else (),
        local_addresses=local_addresses,
        listening=frozenset(_listening()),
        proxy_answer=_ask_proxy(question.health),
        rules=rules,
    )


def _look_at_link(path: Path) -> LinkSeen:
    try:
        has_carrier = (path / "carrier").read_text().strip() == "1"
    except OSError:  # the link is down
        has_carrier = False
    return LinkSeen(int((path / "mtu").read_text()), has_carrier)


def _read_routes(text: str) -> list[RouteSeen]:
    """Read /proc/net/route; addresses are hexadecimal in the machine's byte order."""
    routes = []
    for line in text.splitlines()[1:]:
        link, destination, _, flags, _, _, _, mask = line.split()[:8]
        if int(flags, 16) & 1:  # RTF_UP
            network, length = (bytes.fromhex(word)[::-1] for word in (destination, mask))
            routes.append(RouteSeen(IPv4Network((network, IPv4Address(length).exploded)), link))
    return routes


def _listening() -> list[tuple[str, int]]:
    """Return the TCP and UDP ports on which somebody takes what comes from other machines."""
    found = []
    for protocol, wanted in (("tcp", _TCP_LISTEN), ("udp", _UDP_OPEN)):
        for name in (protocol, f"{protocol}6"):
            with contextlib.suppress(OSError):  # no IPv6
                for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
                    _, local, remote, state = line.split()[:4]
                    address, port = local.split(":")
                    is_loopback = len(address) == 8 and address.endswith("7F")
                    if state == wanted and remote.endswith(":0000") and not is_loopback:
                        found.append((protocol, int(port, 16)))
    return found


def _look_at_rules(question: NodeQuestion) -> tuple[tuple[IPv4Address, ...], RulesSeen]:
    """Return the node's addresses, without those that ipvs mode put on its own link, and the rules."""
    runner = SubprocessRunner({"PATH": os.environ.get("PATH", "") or "/usr/sbin:/usr/bin:/sbin:/bin"})
    if question.mode == "nftables":
        table = Nftables(runner, nft_names.FAMILY, nft_names.TABLE)
        return list_local_addresses(), RulesSeen(nftables=table.list())
    saved = Iptables(runner, detect_backend(runner, question.iptables_backend)).save()
    if question.mode != "ipvs":
        return list_local_addresses(), RulesSeen(iptables=saved)
    from testbed.kernel.ipvs_node import IpvsNode  # pyroute2 is heavy: only those who need it load it

    with IpvsNode(runner, "this node") as node:
        listing = node.list()
        objects: IpvsObjects = listing.objects
        return tuple(sorted(listing.local_addresses)), RulesSeen(
            iptables=saved, ipvs=objects, ipvs_missing=listing.missing
        )


def _ask_proxy(bind: str) -> str:
    """Return what is wrong with kube-proxy's answer on its health port, '' when nothing is."""
    host, _, port = bind.rpartition(":")
    if not port.isdigit():
        return ""
    address = "127.0.0.1" if host in ("", "0.0.0.0", "[::]") else host
    status = _fetch(address, int(port), "/livez")[0]
    return "" if status == "200" else status


def _fetch(address: str, port: int, path: str) -> tuple[str, str]:
    """Return the status of an answer, or why there is none, and its body."""
    connection = http.client.HTTPConnection(address, port, timeout=patient(_ANSWER_S))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return str(answer.status), answer.read().decode(errors="replace")
    except ConnectionRefusedError:
        return "refused: nobody listens", ""
    except TimeoutError:
        return "no answer: it does not run on", ""
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__, ""
    finally:
        connection.close()


_RESPONSES = re.compile(r'^coredns_dns_responses_total\{rcode="(\w+)"\} (\d+)', re.MULTILINE)
_REQUESTS = re.compile(r"^coredns_(dns_requests|forward_requests)_total (\d+)", re.MULTILINE)


def count_dns_answers(port: int, clock: Callable[[], float] = time.monotonic) -> DnsCount:
    """Return the counters of the DNS server in whose pod this runs.

    Raises:
        KernelError: it does not answer.
    """
    status, text = _fetch("127.0.0.1", port, "/metrics")
    if status != "200":
        raise KernelError(status)
    by_code = {code: int(number) for code, number in _RESPONSES.findall(text)}
    asked = {name: int(number) for name, number in _REQUESTS.findall(text)}
    by_itself = max(0, asked.get("dns_requests", 0) - asked.get("forward_requests", 0))
    return DnsCount(clock(), by_itself + by_code.get("NOERROR", 0), by_code.get("NXDOMAIN", 0))
