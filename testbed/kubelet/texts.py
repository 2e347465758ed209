"""The files that the kubelet writes for a pod: /etc/hosts, /etc/resolv.conf, /etc/hostname. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, name_of, namespace_of

MAX_NAMESERVERS = 3  # glibc's MAXNS, which the kubelet enforces
MAX_SEARCH_PATHS = 32
MAX_SEARCH_CHARACTERS = 2048
_MAX_HOSTNAME = 63


def hostname_of(pod: Object, node_name: str) -> str:
    """Return a pod's hostname: the node's for hostNetwork, else spec.hostname or the pod's name, cut to 63 characters."""
    spec = pod["spec"]
    if spec.get("hostNetwork"):
        return node_name
    return str(spec.get("hostname") or name_of(pod))[:_MAX_HOSTNAME].rstrip("-.")


def qualified_hostname(pod: Object, hostname: str, domain: str) -> str:
    """Return HOSTNAME.SUBDOMAIN.NAMESPACE.svc.DOMAIN for a pod with a subdomain, else ''."""
    subdomain = pod["spec"].get("subdomain")
    return f"{hostname}.{subdomain}.{namespace_of(pod)}.svc.{domain}" if subdomain else ""


def hosts_file(pod: Object, hostname: str, address: IPv4Address, domain: str) -> str:
    """Return /etc/hosts in the kubelet's form (kubelet_pods.go, managedHostsFileContent)."""
    lines = [
        "# Kubernetes-managed hosts file.",
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::0\tip6-localnet",
        "fe00::0\tip6-mcastprefix",
        "fe00::1\tip6-allnodes",
        "fe00::2\tip6-allrouters",
    ]
    names = [name for name in (qualified_hostname(pod, hostname, domain), hostname) if name]
    lines.append("\t".join([str(address), *names]))
    aliases = pod["spec"].get("hostAliases") or []
    if aliases:
        lines += ["", "# Entries added by HostAliases."]
        lines += ["\t".join([alias["ip"], *(alias.get("hostnames") or [])]) for alias in aliases]
    return "\n".join(lines) + "\n"


def resolv_conf(pod: Object, cluster: ClusterConfig, node_resolv_conf: str) -> str:
    """Return /etc/resolv.conf for a pod's dnsPolicy and dnsConfig; lines in the kubelet's order."""
    servers, searches, options = _dns_of(pod, cluster, node_resolv_conf)
    lines = [f"nameserver {server}" for server in servers[:MAX_NAMESERVERS]]
    if searches:
        lines.append("search " + " ".join(_fitting(searches)))
    if options:
        lines.append("options " + " ".join(f"{name}:{value}" if value else name for name, value in options.items()))
    return "\n".join(lines) + "\n"


def _dns_of(pod: Object, cluster: ClusterConfig, node_resolv_conf: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Return nameservers, search paths and options that a pod asks for, without the limits."""
    spec = pod["spec"]
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    if (policy == "ClusterFirst" and spec.get("hostNetwork")) or lacks_cluster_dns(pod, cluster):
        policy = "Default"
    servers, searches, options = _parse(node_resolv_conf) if policy != "None" else ([], [], {})
    if policy in ("ClusterFirst", "ClusterFirstWithHostNet"):
        own = [f"{namespace_of(pod)}.svc.{cluster.domain}", f"svc.{cluster.domain}", cluster.domain]
        servers, searches, options = [str(cluster.dns)], own + searches, {"ndots": "5"}
    config: Mapping[str, Any] = spec.get("dnsConfig") or {}
    servers = list(dict.fromkeys([*servers, *(config.get("nameservers") or [])]))
    searches = list(dict.fromkeys([*searches, *(config.get("searches") or [])]))
    for option in config.get("options") or []:
        options[option["name"]] = option.get("value") or ""
    return servers, searches, options


def lacks_cluster_dns(pod: Object, cluster: ClusterConfig) -> bool:
    """Say whether a pod asks for cluster DNS in a cluster that has none."""
    spec = pod["spec"]
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    wants = policy == "ClusterFirstWithHostNet" or (policy == "ClusterFirst" and not spec.get("hostNetwork"))
    return wants and cluster.dns is None


def dns_config_warnings(pod: Object, cluster: ClusterConfig, node_resolv_conf: str) -> list[tuple[str, str]]:
    """Return (reason, message) of each event that the kubelet records about a pod's DNS.

    Source: pkg/kubelet/network/dns/dns.go (v1.30).
    """
    found = []
    if lacks_cluster_dns(pod, cluster):
        policy = pod["spec"].get("dnsPolicy") or "ClusterFirst"
        message = (
            f'kubelet does not have ClusterDNS IP configured and cannot create Pod using "{policy}" policy. '
            'Falling back to "Default" policy.'
        )
        found.append(("MissingClusterDNS", message))
    servers, searches, _ = _dns_of(pod, cluster, node_resolv_conf)
    if len(servers) > MAX_NAMESERVERS:
        applied = " ".join(servers[:MAX_NAMESERVERS])
        message = (
            "Nameserver limits were exceeded, some nameservers have been omitted, "
            f"the applied nameserver line is: {applied}"
        )
        found.append(("DNSConfigForming", message))
    fitting = _fitting(searches)
    if len(fitting) < len(searches):
        message = (
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: "
            + " ".join(fitting)
        )
        found.append(("DNSConfigForming", message))
    return found


def _fitting(searches: list[str]) -> list[str]:
    kept: list[str] = []
    for search in searches[:MAX_SEARCH_PATHS]:
        if len(" ".join([*kept, search])) > MAX_SEARCH_CHARACTERS:
            break
        kept.append(search)
    return kept


def _parse(text: str) -> tuple[list[str], list[str], dict[str, str]]:
    servers: list[str] = []
    searches: list[str] = []
    options: dict[str, str] = {}
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest:
            servers.append(rest[0])
        elif word == "search":
            searches = rest
        elif word == "options":
            options.update((name, value) for name, _, value in (option.partition(":") for option in rest))
    return servers, searches, options
