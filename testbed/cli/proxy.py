"""``testbed proxy``: what kube-proxy would write, writing it here, and what it does to a packet."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

import click

from testbed.dataplane.iptables import make_settings, render_full
from testbed.dataplane.ipvs import IpvsRenderer, make_ipvs_settings, render_document
from testbed.dataplane.nftables import NftablesRenderer, make_nftables_settings, render_table
from testbed.dataplane.trace import Fate, Node, Packet, Verdict, parse_rules, trace
from testbed.dataplane.trace_ipvs import IpvsTracer
from testbed.dataplane.trace_nftables import trace_nftables
from testbed.dataplane.userspace import make_userspace_settings, render_node, stand_in_ports, trace_userspace
from testbed.errors import InputError, MissingFeature
from testbed.kernel.addresses import list_local_addresses
from testbed.kernel.runner import SubprocessRunner
from testbed.model.topology import PROXY_MODES
from testbed.programs.kube_proxy import prepare_node, sync_once
from testbed.programs.proxy_input import ProxyInput, read_proxy_input
from testbed.programs.proxy_modes import clean_up_all, clean_up_other_modes

_ENDS = {
    Verdict.DROP: "dropped: the client waits until its time is over",
    Verdict.REJECT: "refused: the client is told at once (ICMP port unreachable; TCP clients see `connection refused`)",
    Verdict.CLOSED: "accepted by kube-proxy, and closed at once: there is no endpoint",
    Verdict.ACCEPT: "let in, its destination unchanged",
    Verdict.NONE: "not kube-proxy's: no rule is about it, it goes where routing sends it",
}


def read_input(files: Sequence[Path], node: str, mode: str | None, config: Path | None) -> ProxyInput:
    """Read manifests and configuration; warnings go to standard error.

    Raises:
        InputError: there is no such mode, or the files are wrong.
    """
    if mode is not None and mode not in PROXY_MODES:
        raise InputError(f"there is no proxy mode {mode!r}; the modes are {', '.join(PROXY_MODES)}")
    found = read_proxy_input(files, node=node, mode=mode, config=config)
    for warning in found.warnings:
        click.echo(str(warning), err=True)
    return found


def render(given: ProxyInput) -> str:
    """Return what kube-proxy sends to iptables-restore or nft on a node that has nothing yet; of ipvs mode, all it makes.

    Userspace mode: the first ports of portRange stand for those that kube-proxy draws, and words where the kernel chooses.
    """
    if given.config.mode == "nftables":
        settings = make_nftables_settings(given.config, given.node, given.addresses, given.service_cidrs)
        return render_table(given.state, settings)
    if given.config.mode == "ipvs":
        return render_document(given.state, make_ipvs_settings(given.config, given.node, given.addresses))
    if given.config.mode == "userspace":
        first, last = given.config.port_range or (0, 0)
        ports = stand_in_ports(given.state, first)
        if first and len(ports) > last - first + 1:
            raise InputError(f"portRange {first}-{last} has too few ports for {len(ports)} Service ports")
        where = f"drawn from {first}-{last}" if first else "chosen by the kernel"
        note = f"# proxy ports are {where} when kube-proxy runs; these stand for them\n"
        return note + render_node(given.state, make_userspace_settings(given.config, given.node), ports)
    return render_full(given.state, make_settings(given.config, given.node, given.addresses)).text


def sync(given: ProxyInput, backend: str) -> int:
    """Program the network namespace of this process once; return 0, or 3 when a Service was refused.

    Raises:
        InputError: userspace mode: there would be nobody at the ports that the rules lead to.
    """
    if given.config.mode == "userspace":
        raise InputError(
            "userspace mode cannot be written once: its rules lead to ports that only a running kube-proxy listens on; "
            "`testbed up --proxy-mode userspace` runs one on each node, `testbed proxy render` prints the rules"
        )
    runner = SubprocessRunner()
    prepare_node(given.config, given.node.name, lambda line: click.echo(f"warning: {line}", err=True))
    report = sync_once(
        given.config, given.node, given.services, given.slices, runner=runner, backend=backend,
        local_addresses=list_local_addresses(), service_cidrs=given.service_cidrs,
    )  # fmt: skip
    clean_up_other_modes(given.config, runner, backend)  # last: where this mode is not to be had, what is there stays
    for name, reason in report.refused.items():
        click.echo(f"error: service {name} ({name.protocol}) is left out: {reason}", err=True)
    lines, changes = len(report.payload.text.splitlines()), getattr(report.payload, "changes", 0)
    done = [f"{changes} objects changed"] if changes else []
    done += [f"{lines} lines written"] if lines else []
    click.echo(f"{given.config.mode}: {', '.join(done) or 'nothing to write: all is as it should be'}")
    return MissingFeature.exit_status if report.refused else 0


def clean_up(backend: str) -> None:
    """Remove from the network namespace of this process what kube-proxy wrote, in any mode."""
    clean_up_all(SubprocessRunner(), backend)


#: Stands for the proxy port of the first Service port, in walks through userspace mode's rules.
_EXPLAIN_PORT = 40001
_TARGET = re.compile(r"([\d.]+):(\d+)(?:/(tcp|udp|sctp))?")


def parse_packet(source: str, target: str, interface: str) -> Packet:
    """Return the packet that two options describe.

    Raises:
        InputError: one of them is not of the form ``IP`` or ``IP:PORT[/udp]``.
    """
    match = _TARGET.fullmatch(target)
    try:
        if match is None or not 0 < int(match[2]) < 65536:
            raise AddressValueError
        destination = str(IPv4Address(match[1]))
    except AddressValueError:
        raise InputError(
            f"--to {target!r}: wants IP:PORT, with /udp or /sctp behind it for those, such as 10.96.0.10:53/udp"
        ) from None
    try:
        return Packet(str(IPv4Address(source)), destination, int(match[2]), match[3] or "tcp", interface)
    except AddressValueError:
        raise InputError(f"--from {source!r}: wants an IPv4 address") from None


def find_fate(given: ProxyInput, packet: Packet) -> Fate:
    """Walk a packet through what kube-proxy writes on the node.

    Raises:
        InputError: what happens to the packet depends on chance in kind, not only in the endpoint.
    """
    here = Node(frozenset(given.addresses))
    try:
        if given.config.mode == "nftables":
            settings = make_nftables_settings(given.config, given.node, given.addresses, given.service_cidrs)
            table = NftablesRenderer(settings)
            table.full(given.state, None)
            return trace_nftables(table.wanted(), packet, here)
        if given.config.mode == "ipvs":
            renderer = IpvsRenderer(make_ipvs_settings(given.config, given.node, given.addresses))
            renderer.update(given.state)
            return IpvsTracer(renderer, here).trace(packet)
        if given.config.mode == "userspace":
            ports = stand_in_ports(given.state, _EXPLAIN_PORT)
            text = render_node(given.state, make_userspace_settings(given.config, given.node), ports)
            names = {int(port): name for name, port in ports.items()}
            return trace_userspace(parse_rules(text), packet, here, given.state, names)
        return trace(parse_rules(render(given)), packet, here)
    except ValueError as error:
        raise InputError(f"cannot follow the packet: {error}") from error


def explain_json(given: ProxyInput, packet: Packet, fate: Fate) -> str:
    """Return a walk as JSON."""
    return json.dumps(
        {
            "mode": given.config.mode,
            "node": given.node.name,
            "from": packet.source,
            "to": f"{packet.destination}:{packet.port}",
            "protocol": packet.protocol,
            "fate": fate.verdict.value,
            "endpoints": list(fate.endpoints),
            "masquerade": fate.masquerade,
            "rules": list(fate.rules),
        },
        indent=2,
    )


def explain_text(given: ProxyInput, packet: Packet, fate: Fate) -> str:
    """Return a walk for people: the rules met, in order, and how it ends."""
    paint = _bold if sys.stdout.isatty() else str
    mode, node = given.config.mode, given.node.name
    lines = [
        paint(f"{packet.source} → {packet.destination}:{packet.port}/{packet.protocol} at {node}, {mode} mode"),
        "",
        *_walk(fate.rules),
        "",
    ]
    if fate.verdict is Verdict.ENDPOINT:
        ways = {"userspace": "in turn", "ipvs": f"as scheduler {given.config.ipvs.scheduler} chooses"}
        how = ways.get(mode, "by chance")
        chance = f", one of {len(fate.endpoints)} {how}" if len(fate.endpoints) > 1 else ""
        lines.append(f"fate    {paint(' or '.join(fate.endpoints))}{chance}")
        lines.append(f"source  {_seen_source(packet, fate, mode)}")
    else:
        lines.append(f"fate    {paint(_ENDS[fate.verdict])}")
    return "\n".join(lines)


def _walk(rules: Sequence[str]) -> list[str]:
    """Return the rules under the heading of their chain or table."""
    if not rules:
        return ["no rule of kube-proxy is met"]
    lines: list[str] = []
    last = ""
    for number, rule in enumerate(rules, start=1):
        place, _, text = rule.partition(": ")
        if place != last:
            lines.append(f"  {place}")
            last = place
        lines.append(f"    {number:>2}  {text}")
    return lines


def _seen_source(packet: Packet, fate: Fate, mode: str) -> str:
    if mode == "userspace":
        return "hidden (kube-proxy connects on its own): the endpoint sees an address of the node"
    if not fate.masquerade:
        return f"kept: the endpoint sees {packet.source}"
    if any(endpoint.startswith(f"{packet.source}:") for endpoint in fate.endpoints) and len(fate.endpoints) > 1:
        return "hidden (masqueraded), for this packet at least if it is sent to where it came from"
    return "hidden (masqueraded): the endpoint sees an address of the node"


def _bold(text: str) -> str:
    return click.style(text, bold=True)
