"""A node's rules against those that its kube-proxy should have written: the proxiers' own comparison, from outside."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from testbed.dataplane import ipvs_rules, userspace
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.doctor.observations import ClusterSeen, NodeSeen
from testbed.dataplane.iptables import NOTHING_INSTALLED, IptablesRenderer, make_settings, parse_installed
from testbed.dataplane.ipvs import IpvsRenderer, describe, make_ipvs_settings, plan
from testbed.dataplane.nft_table import differences, parse_listing
from testbed.dataplane.nftables import NftablesRenderer, make_nftables_settings
from testbed.dataplane.state import ProxyState
from testbed.model.objects import Object
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import ServicePortName, is_proxied, parse_node, parse_service_cidr

_PROXY_PORT = re.compile(r'--comment "?([^" ]+)"? .* --to-(?:ports |destination [\d.]+:)(\d+)$')
_LIBERAL = "net/netfilter/nf_conntrack_tcp_be_liberal"


@dataclass(frozen=True, slots=True)
class RuleDamage:
    """How rules differ, in a few words ('': not at all), and the Services whose own rules do, where that can be told."""

    text: str
    services: tuple[str, ...] = ()


def proxy_state(seen: ClusterSeen, node: str) -> ProxyState:
    """Return what the kube-proxy of a node should know."""
    tracker = ChangeTracker(seen.config.hostname_override or node)
    tracker.replace_services([service for service in seen.list("services") if is_proxied(service)])
    tracker.replace_slices([one for one in seen.list("endpointslices.discovery.k8s.io") if is_proxied(one)])
    return tracker.take()[0]


def find_damage(seen: ClusterSeen, node: Object, inside: NodeSeen, state: ProxyState) -> RuleDamage:
    """Compare what a node has with what the state asks for, in the mode of the configuration."""
    config = seen.config
    if inside.sysctls.get(_LIBERAL, "0") != "0":
        config = replace(config, conntrack=replace(config.conntrack, tcp_be_liberal=True))
    if config.mode == "nftables":
        return _nftables_damage(seen, config, node, inside, state)
    if config.mode == "ipvs":
        return _ipvs_damage(config, node, inside, state)
    if config.mode == "userspace":
        return _userspace_damage(config, node, inside, state)
    addresses = inside.local_addresses if config.node_port_addresses else ()
    renderer = IptablesRenderer(make_settings(config, parse_node(node), addresses))
    renderer.update(state)
    renderer.accept(renderer.full(NOTHING_INSTALLED))
    installed = parse_installed(inside.rules.iptables)
    if differing := renderer.find_damaged(installed):
        renderer.render_anew(differing, large=not renderer.is_large)
        renderer.accept(renderer.full(NOTHING_INSTALLED))
    text = renderer.find_damage(installed)
    if text:
        return RuleDamage(text, _services(renderer.find_damaged(installed)))
    return RuleDamage(text)


def _nftables_damage(
    seen: ClusterSeen, config: KubeProxyConfig, node: Object, inside: NodeSeen, state: ProxyState
) -> RuleDamage:
    if inside.rules.nftables is None:
        return RuleDamage("its table is gone")
    cidrs: tuple[IPv4Network, ...] = tuple(
        network for one in seen.list("servicecidrs.networking.k8s.io") for network in parse_service_cidr(one)
    )
    addresses = inside.local_addresses if config.node_port_addresses else ()
    renderer = NftablesRenderer(make_nftables_settings(config, parse_node(node), addresses, cidrs))
    renderer.full(state, None)
    listed = parse_listing(inside.rules.nftables)
    wanted = renderer.wanted()
    # Older kernels cannot delete a chain at once: those that no element leads to any more are on their way out.
    stale = listed.chains.keys() - wanted.chains.keys()
    found = differences(wanted, listed, ignored_chains=dict.fromkeys(stale))
    return RuleDamage("" if not found else found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else ""))


def _ipvs_damage(config: KubeProxyConfig, node: Object, inside: NodeSeen, state: ProxyState) -> RuleDamage:
    settings = make_ipvs_settings(config, parse_node(node), inside.local_addresses)
    renderer = IpvsRenderer(settings)
    renderer.update(state)
    wanted, there = renderer.wanted(), inside.rules.ipvs
    # Real servers with weight 0 wait for their connections to end.
    retiring = {
        (key, real) for key, server in there.servers.items() for real, weight in server.real.items() if not weight
    }
    text = (
        inside.rules.ipvs_missing
        or describe(plan(there, wanted, settings, retiring))
        or ipvs_rules.find_rule_damage(renderer.rules(), ipvs_rules.parse_installed_rules(inside.rules.iptables))
    )
    return RuleDamage(text)


def _userspace_damage(config: KubeProxyConfig, node: Object, inside: NodeSeen, state: ProxyState) -> RuleDamage:
    """Compare with the rules for the ports that the kernel has chosen, which only the node's own rules tell."""
    settings = userspace.make_userspace_settings(config, parse_node(node))
    installed = userspace.parse_installed(inside.rules.iptables)
    ports: dict[str, str] = {}
    for lines in installed.chains.values():
        for line in lines:
            if match := _PROXY_PORT.search(line):
                ports[match[1]] = match[2]
    wanted = [
        rule
        for name, service in sorted(state.services.items())
        if userspace.is_supported(service)
        for rule in userspace.render_rules(service, ports.get(str(name), "<a port>"), settings)
    ]
    lacking = [name for name in sorted(state.services) if str(name) not in ports]
    return RuleDamage(userspace.find_damage(wanted, installed), _services(lacking))


def _services(names: list[ServicePortName]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{name.namespace}/{name.name}" for name in names))
