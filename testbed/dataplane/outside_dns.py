"""The DNS of the world around the cluster: dnsmasq on one outside host, with the names that the topology gives. Pure.

It knows the machines and the names of outside hosts, and of every other name that there is none, as the Internet's would.
"""

from __future__ import annotations

from testbed.model.topology import HostSpec, Topology

_TTL_S = 60


def render_outside_hosts(topology: Topology) -> str:
    """Return a hosts file: every machine under its own name; outside hosts under their other names, which their PTR gives."""
    lines = []
    for machine in topology.machines:
        names = machine.names if isinstance(machine, HostSpec) else ()
        lines.append(" ".join([str(machine.address), *names, machine.name]))
    return "\n".join(lines) + "\n"


def render_outside_dnsmasq(topology: Topology, hosts_file: str) -> str:
    """Return dnsmasq's configuration for the host ``outsideDNS``."""
    lines = [
        f"listen-address={topology.machine(topology.outside_dns).address}",
        "bind-interfaces",
        "user=root",
        "group=",
        "pid-file=",
        "log-facility=-",
        "no-resolv",
        "no-hosts",
        "no-poll",
        f"addn-hosts={hosts_file}",
        f"local-ttl={_TTL_S}",
        "edns-packet-max=1232",
        "local=/#/",  # any name that is not here is nowhere
    ]
    return "\n".join(lines) + "\n"
