"""Objects for proxy tests, a stand-in for the iptables tools that holds state, and a namespace for the real ones."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, ClassVar

import pytest

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.iptables import IptablesSettings, make_settings, saved_form
from testbed.dataplane.nftables import NftablesSettings, make_nftables_settings
from testbed.dataplane.state import ProxyState
from testbed.errors import CommandError, KernelError, MissingFeature
from testbed.kernel.iptables import Backend
from testbed.kernel.runner import Runner, SubprocessRunner
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import NodeView, parse_node

Object = dict[str, Any]

POD_CIDR = "10.0.0.0/8"
NODE, NODE_IP, SECOND_IP = "node1", "192.168.0.2", "192.168.1.2"


def service(
    name: str, cluster_ip: str, *, namespace: str = "ns", port: int = 80, node_port: int = 0, **spec: Any
) -> Object:
    """Return a Service with one port ``p80``; keywords are fields of its spec, ``ingress`` its load-balancer addresses."""
    ingress = spec.pop("ingress", ())
    protocol = spec.pop("protocol", "TCP")
    annotations = spec.pop("annotations", {})
    entry = {"name": spec.pop("port_name", "p80"), "port": port, "protocol": protocol}
    if node_port:
        entry["nodePort"] = node_port
    kind = "LoadBalancer" if ingress else "NodePort" if node_port else "ClusterIP"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        "spec": {"type": kind, "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [entry], **spec},
        "status": {"loadBalancer": {"ingress": [{"ip": ip} for ip in ingress]}},
    }


def endpoint(
    address: str, node: str = NODE, *, ready: bool = True, serving: bool | None = None, terminating: bool = False
) -> Object:
    """Return one endpoint of a slice; serving follows ready unless said otherwise."""
    conditions = {"ready": ready, "serving": ready if serving is None else serving, "terminating": terminating}
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def endpoint_slice(
    service_name: str,
    *endpoints: Object,
    namespace: str = "ns",
    port: int = 80,
    port_name: str = "p80",
    suffix: str = "x",
    protocol: str = "TCP",
) -> Object:
    """Return an EndpointSlice of one port."""
    labels = {"kubernetes.io/service-name": service_name}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {"name": f"{service_name}-{suffix}", "namespace": namespace, "labels": labels},
        "ports": [{"name": port_name, "port": port, "protocol": protocol}],
        "endpoints": list(endpoints),
    }


def node_object(name: str = NODE, address: str = NODE_IP, **labels: str) -> Object:
    """Return a Node; keywords are labels, '__' stands for '/'."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {key.replace("__", "/").replace("_", "."): v for key, v in labels.items()},
        },
        "spec": {"podCIDR": "10.0.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def state_of(services: Sequence[Object], slices: Sequence[Object]) -> ProxyState:
    """Return the state of a proxy on `NODE` that has heard of these objects."""
    tracker = ChangeTracker(NODE)
    tracker.replace_services(services)
    tracker.replace_slices(slices)
    return tracker.take()[0]


def settings_of(config: Mapping[str, Any] | None = None, node: NodeView | None = None) -> IptablesSettings:
    """Return settings for a configuration; pods are `POD_CIDR` unless it says otherwise."""
    parsed, problems = parse_proxy_config({"clusterCIDR": POD_CIDR, **(config or {})})
    assert not problems
    addresses = [IPv4Address(a) for a in ("127.0.0.1", NODE_IP, SECOND_IP)]
    return make_settings(parsed, node or parse_node(node_object()), addresses)


def nftables_settings(
    config: Mapping[str, Any] | None = None, *, service_cidrs: Sequence[str] = ("172.30.0.0/16",)
) -> NftablesSettings:
    """Return the settings of nftables mode for a configuration; pods are `POD_CIDR` unless it says otherwise."""
    parsed, problems = parse_proxy_config({"clusterCIDR": POD_CIDR, **(config or {})})
    assert not problems
    addresses = [IPv4Address(a) for a in ("127.0.0.1", NODE_IP, SECOND_IP)]
    return make_nftables_settings(parsed, parse_node(node_object()), addresses, [IPv4Network(c) for c in service_cidrs])


class FakeIptables:
    """Stands for iptables-legacy-save and -restore: holds tables, and refuses what the real ones refuse.

    It keeps rules as they were written, and prints them as the real ones do.
    """

    BUILTIN: ClassVar = {
        "filter": ("INPUT", "FORWARD", "OUTPUT"),
        "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
        "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    }

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.calls: list[list[str]] = []
        self.payloads: list[str] = []
        self.refused = ""  # rules with this in them are refused when the table is committed
        self.failing: KernelError | None = None  # what every restore ends with

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60) -> str:
        self.calls.append(list(argv))
        if argv[0] == "iptables":
            return "iptables v1.8.9 (legacy)\n"
        if argv[0] == "cat":
            return "\n".join(self.tables)
        if argv[0].startswith("iptables-nft"):
            raise MissingFeature(f"{argv[0]} is not installed")
        if argv[0] == "iptables-legacy-save":
            return self._save()
        assert argv[0] == "iptables-legacy-restore" and "--noflush" in argv, argv
        if self.failing is not None:
            raise self.failing
        self.payloads.append(stdin)
        self._restore(argv, stdin)
        return ""

    def _save(self) -> str:
        lines = []
        for table, chains in self.tables.items():
            lines.append(f"*{table}")
            lines += [f":{chain} {'ACCEPT' if chain in self.BUILTIN[table] else '-'} [0:0]" for chain in chains]
            lines += [saved_form(f"-A {chain} {rule}") for chain, rules in chains.items() for rule in rules]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def _restore(self, argv: Sequence[str], text: str) -> None:
        table, chains = "", {}
        for number, line in enumerate(text.splitlines(), start=1):
            if line.startswith("*"):
                table = line[1:]
                known = self.tables.get(table) or {chain: [] for chain in self.BUILTIN[table]}
                chains = {chain: list(rules) for chain, rules in known.items()}
            elif line.startswith(":"):
                chain = line[1:].split()[0]
                chains[chain] = chains[chain] if chain in self.BUILTIN[table] else []
            elif line == "COMMIT":
                self._check(argv, number, chains, self.refused)
                self.tables[table] = chains
            else:
                verb, chain, rule = [*line.split(" ", 2), ""][:3]
                if chain not in chains:
                    raise CommandError(
                        argv, 1, f"iptables-restore: line {number} failed: No chain/target/match by that name."
                    )
                if verb == "-X":
                    used = any(
                        words[-1] == chain for rules in chains.values() for r in rules if (words := shlex.split(r))
                    )
                    if used or chains[chain]:
                        raise CommandError(argv, 1, f"iptables-restore: line {number} failed: Directory not empty.")
                    del chains[chain]
                elif verb == "-F":
                    chains[chain] = []
                elif verb == "-D":
                    if rule not in chains[chain]:
                        raise CommandError(argv, 1, f"iptables-restore: line {number} failed: Bad rule.")
                    chains[chain].remove(rule)
                else:
                    chains[chain].insert(0 if verb == "-I" else len(chains[chain]), rule)

    @staticmethod
    def _check(argv: Sequence[str], number: int, chains: Mapping[str, list[str]], refused: str) -> None:
        known = {*chains, "ACCEPT", "DROP", "REJECT", "RETURN", "MARK", "MASQUERADE", "DNAT", "REDIRECT"}
        for rules in chains.values():
            for rule in rules:
                words = shlex.split(rule)
                unknown = "-j" in words and words[words.index("-j") + 1] not in known
                if unknown or (refused and refused in rule):
                    raise CommandError(
                        argv, 1, f"iptables-restore: line {number} failed: No chain/target/match by that name."
                    )


@contextlib.contextmanager
def real_iptables(backend: Backend, folder: Path) -> Iterator[Runner]:
    """Give a runner in a network namespace of its own; skip the test when the tools are not there."""
    tool = f"iptables-{backend.value}-restore"
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (apt-get install iptables)")
    holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    try:
        holder.stdin.write(b"x")
        holder.stdin.flush()
        holder.stdout.read(1)  # cat runs, so the namespace is there
        enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        yield SubprocessRunner({"XTABLES_LOCKFILE": str(folder / "lock")}, prefix=enter)
    finally:
        holder.communicate()


def without_counters(saved: str) -> str:
    """Return a dump of iptables-save without dates and packet counts."""
    return "\n".join(line.rsplit(" [", 1)[0] for line in saved.splitlines() if not line.startswith("#"))
