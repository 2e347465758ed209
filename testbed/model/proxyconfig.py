"""KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as frozen values, with upstream's defaults and checks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from testbed.errors import Cause
from testbed.model.service import NodeView, parse_address, parse_network

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
MODES = ("iptables", "ipvs", "nftables", "userspace")
PRIMARY = "primary"


class DetectLocalMode(StrEnum):
    """How a proxy tells a local pod's packet from others."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class Origin(Enum):
    """What a `LocalDetector` looks at."""

    ADDRESS = "address"
    INTERFACE = "interface"
    INTERFACE_PREFIX = "interface prefix"


@dataclass(frozen=True, slots=True)
class LocalDetector:
    """The test for "this packet comes from a pod": its source CIDR, input interface, or input interface's prefix."""

    origin: Origin
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IptablesOptions:
    """The ``iptables`` section; ipvs mode uses its masquerade fields too."""

    masquerade_all: bool = False
    masquerade_bit: int = 14
    localhost_node_ports: bool = True
    sync_period_s: float = 30.0
    min_sync_period_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IpvsOptions:
    scheduler: str = "rr"
    strict_arp: bool = False
    exclude_cidrs: tuple[IPv4Network, ...] = ()
    sync_period_s: float = 30.0
    min_sync_period_s: float = 0.0
    tcp_timeout_s: float = 0.0
    tcp_fin_timeout_s: float = 0.0
    udp_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NftablesOptions:
    masquerade_all: bool = False
    masquerade_bit: int = 14
    sync_period_s: float = 30.0
    min_sync_period_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackOptions:
    max_per_core: int = 32768
    minimum: int = 131072
    tcp_established_timeout_s: float = 86400.0
    tcp_close_wait_timeout_s: float = 3600.0
    tcp_be_liberal: bool = False
    udp_timeout_s: float = 0.0
    udp_stream_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeProxyConfig:
    """The fields of a KubeProxyConfiguration that have an effect here."""

    mode: str = "iptables"
    cluster_cidr: str = ""
    detect_local_mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"
    node_port_addresses: tuple[str, ...] = ()
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    config_sync_period_s: float = 900.0
    iptables: IptablesOptions = field(default_factory=IptablesOptions)
    ipvs: IpvsOptions = field(default_factory=IpvsOptions)
    nftables: NftablesOptions = field(default_factory=NftablesOptions)
    conntrack: ConntrackOptions = field(default_factory=ConntrackOptions)
    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    port_range: tuple[int, int] | None = None  # of proxy ports, both included; None: the kernel chooses
    udp_idle_timeout_s: float = 0.25

    @property
    def sync_period_s(self) -> float:
        """How often the mode in use looks after its rules, and tries again what failed."""
        return self._options.sync_period_s

    @property
    def min_sync_period_s(self) -> float:
        """How much time lies between two syncs at least, in the mode in use."""
        return self._options.min_sync_period_s

    @property
    def _options(self) -> IptablesOptions | IpvsOptions | NftablesOptions:
        if self.mode == "ipvs":
            return self.ipvs
        return self.nftables if self.mode == "nftables" else self.iptables


#: The kernel's names are at most 15 characters long (linux/ip_vs.h, IP_VS_SCHEDNAME_MAXLEN).
_SCHEDULER = re.compile(r"[a-z0-9_-]{1,15}")
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|us|µs|ns|m|s)")


def parse_duration_s(text: object) -> float | None:
    """Return the seconds of a Go duration (``1m30s``, ``0``), or None when it is not one."""
    if text in ("0", 0):
        return 0.0
    if not isinstance(text, str) or not text:
        return None
    sign, rest = (-1.0, text[1:]) if text[0] == "-" else (1.0, text)
    if not rest or _DURATION.sub("", rest):
        return None
    return sign * sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(rest))


class _Reader:
    """Takes known fields out of one section and writes down what is wrong with the rest."""

    def __init__(self, section: object, path: str, problems: list[Cause]) -> None:
        self.path = path
        self.problems = problems
        self.left: dict[str, Any] = {}
        self.known: set[str] = set()
        if isinstance(section, Mapping):
            self.left = dict(section)
        elif section is not None:
            problems.append(Cause(path.rstrip("."), f"Invalid value: {section!r}: must be a mapping"))

    def complain(self, name: str, value: object, message: str) -> None:
        self.problems.append(Cause(self.path + name, f"Invalid value: {value!r}: {message}"))

    def _take(self, name: str, default: Any, wanted: str, accept: Callable[[Any], Any]) -> Any:
        self.known.add(name)
        value = self.left.pop(name, None)
        if value is None:
            return default
        accepted = accept(value)
        if accepted is None:
            self.complain(name, value, f"must be {wanted}")
            return default
        return accepted

    def text(self, name: str, default: str = "") -> str:
        return str(self._take(name, default, "a string", lambda v: v if isinstance(v, str) else None))

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self._take(name, default, "true or false", lambda v: v if isinstance(v, bool) else None))

    def number(self, name: str, default: int) -> int:
        return int(self._take(name, default, "a whole number", lambda v: v if type(v) is int else None))

    def seconds(self, name: str, default: float) -> float:
        return float(self._take(name, default, "a duration such as 30s", parse_duration_s))

    def period(self, name: str, default: float) -> float:
        """Return a duration that is the default when it is 0, as upstream fills them in."""
        return self.seconds(name, default) or default

    def texts(self, name: str) -> tuple[str, ...]:
        def accept(value: object) -> tuple[str, ...] | None:
            return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else None

        return tuple(self._take(name, (), "a list of strings", accept))

    def section(self, name: str) -> _Reader:
        self.known.add(name)
        return _Reader(self.left.pop(name, None), f"{self.path}{name}.", self.problems)

    def ignore(self, *names: str) -> None:
        for name in names:
            self.known.add(name)
            self.left.pop(name, None)

    def finish(self) -> None:
        for name in self.left:
            near = difflib.get_close_matches(str(name), self.known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            self.problems.append(Cause(f"{self.path}{name}", f"unknown field{hint}", "FieldValueNotSupported"))


def parse_proxy_config(document: Mapping[str, Any]) -> tuple[KubeProxyConfig, tuple[Cause, ...]]:
    """Return the configuration with defaults filled in, and every problem found in the document.

    A field with a problem keeps its default, so the result is usable for further checks.
    """
    problems: list[Cause] = []
    reader = _Reader(document, "", problems)
    reader.ignore("apiVersion", "kind", "metadata", "clientConnection", "oomScoreAdj", "logging", "winkernel")
    reader.ignore("enableProfiling", "showHiddenMetricsForVersion", "bindAddressHardFail")
    mode = reader.text("mode") or "iptables"
    if mode not in MODES:
        reader.complain("mode", mode, f"must be one of {', '.join(MODES)}")
        mode = "iptables"
    local = reader.text("detectLocalMode") or DetectLocalMode.CLUSTER_CIDR.value
    if local not in {m.value for m in DetectLocalMode}:
        reader.complain("detectLocalMode", local, f"must be one of {', '.join(m.value for m in DetectLocalMode)}")
        local = DetectLocalMode.CLUSTER_CIDR.value
    detect = reader.section("detectLocal")
    config = KubeProxyConfig(
        mode=mode,
        cluster_cidr=_cluster_cidr(reader),
        detect_local_mode=DetectLocalMode(local),
        bridge_interface=detect.text("bridgeInterface"),
        interface_name_prefix=detect.text("interfaceNamePrefix"),
        hostname_override=reader.text("hostnameOverride"),
        bind_address=reader.text("bindAddress", "0.0.0.0") or "0.0.0.0",
        node_port_addresses=_node_port_addresses(reader),
        healthz_bind_address=_host_and_port(reader, "healthzBindAddress", "0.0.0.0:10256", 10256),
        metrics_bind_address=_host_and_port(reader, "metricsBindAddress", "127.0.0.1:10249", 10249),
        config_sync_period_s=reader.period("configSyncPeriod", 900.0),
        iptables=_iptables_options(reader.section("iptables")),
        ipvs=_ipvs_options(reader.section("ipvs")),
        nftables=_nftables_options(reader.section("nftables")),
        conntrack=_conntrack_options(reader.section("conntrack")),
        feature_gates=_feature_gates(reader),
        port_range=_port_range(reader),
        udp_idle_timeout_s=_udp_idle_timeout_s(reader),
    )
    detect.finish()
    reader.finish()
    return config, tuple(problems)


def _cluster_cidr(reader: _Reader) -> str:
    """Return the IPv4 one of up to two comma-separated networks, or ''."""
    text = reader.text("clusterCIDR")
    cidrs = [cidr.strip() for cidr in text.split(",") if cidr.strip()]
    for cidr in cidrs:
        network = parse_network(cidr)
        if network is not None:
            return str(network)
        if ":" not in cidr:
            reader.complain("clusterCIDR", text, "must be a valid CIDR block, (e.g. 10.100.0.0/16 or fde4:8dd8::/64)")
    return ""


def _node_port_addresses(reader: _Reader) -> tuple[str, ...]:
    entries = reader.texts("nodePortAddresses")
    for index, entry in enumerate(entries):
        if entry != PRIMARY and ":" not in entry and parse_network(entry) is None:
            reader.complain(f"nodePortAddresses[{index}]", entry, "must be a valid CIDR")
    return entries


def _host_and_port(reader: _Reader, name: str, default: str, port: int) -> str:
    text = reader.text(name) or default
    host, colon, number = text.rpartition(":")
    if not colon:
        host, number = text, str(port)
    if parse_address(host) is None or not number.isdigit() or int(number) > 65535:
        reader.complain(name, text, "must be IP:port")
        return default
    return f"{host}:{number}"


def parse_port_range(text: str) -> tuple[int, int] | None:
    """Return first and last port of ``LOW-HIGH``, ``LOW+COUNT_ABOVE`` or one port, or None when it is no such range.

    Source: kubernetes apimachinery pkg/util/net/port_range.go.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:([-+])\s*(\d+)\s*)?", text, re.ASCII)
    if match is None:
        return None
    first = int(match[1])
    last = first if match[2] is None else int(match[3]) if match[2] == "-" else first + int(match[3])
    if match[2] == "+":
        last = min(last, 65535)
    return (first, last) if 0 < first <= last <= 65535 else None


def _port_range(reader: _Reader) -> tuple[int, int] | None:
    text = reader.text("portRange")
    if text.strip() in ("", "0", "0-0"):
        return None
    found = parse_port_range(text)
    if found is None:
        reader.complain("portRange", text, "must be a valid port range (e.g. 300-2000)")
    return found


def _udp_idle_timeout_s(reader: _Reader) -> float:
    idle_s = reader.seconds("udpIdleTimeout", 0.25)
    if idle_s < 0:
        reader.complain("udpIdleTimeout", f"{idle_s:g}s", "must be greater than 0")
    return idle_s if idle_s > 0 else 0.25  # 0 means the default, and is what kubeadm writes


def _feature_gates(reader: _Reader) -> dict[str, bool]:
    reader.known.add("featureGates")
    gates = reader.left.pop("featureGates", None) or {}
    if not isinstance(gates, Mapping) or not all(isinstance(value, bool) for value in gates.values()):
        reader.complain("featureGates", gates, "must map names to true or false")
        return {}
    return dict(gates)


def _check_periods(reader: _Reader, period_s: float, minimum_s: float) -> None:
    if period_s <= 0:
        reader.complain("syncPeriod", f"{period_s:g}s", "must be greater than 0")
    if minimum_s < 0:
        reader.complain("minSyncPeriod", f"{minimum_s:g}s", "must be greater than or equal to 0")
    elif minimum_s > period_s > 0:
        reader.complain(
            "syncPeriod", f"{period_s:g}s", f"must be greater than or equal to minSyncPeriod ({minimum_s:g}s)"
        )


def _masquerade_bit(reader: _Reader) -> int:
    bit = reader.number("masqueradeBit", 14)
    if not 0 <= bit <= 31:
        reader.complain("masqueradeBit", bit, "must be within the range [0, 31]")
        return 14
    return bit


def _iptables_options(reader: _Reader) -> IptablesOptions:
    options = IptablesOptions(
        masquerade_all=reader.flag("masqueradeAll"),
        masquerade_bit=_masquerade_bit(reader),
        localhost_node_ports=reader.flag("localhostNodePorts", True),
        sync_period_s=reader.period("syncPeriod", 30.0),
        min_sync_period_s=reader.seconds("minSyncPeriod", 1.0),
    )
    _check_periods(reader, options.sync_period_s, options.min_sync_period_s)
    reader.finish()
    return options


def _ipvs_options(reader: _Reader) -> IpvsOptions:
    excluded = []
    for cidr in reader.texts("excludeCIDRs"):
        network = parse_network(cidr)
        if network is not None:
            excluded.append(network)
        elif ":" not in cidr:
            reader.complain("excludeCIDRs", cidr, "must be a valid CIDR")
    scheduler = reader.text("scheduler") or "rr"
    if not _SCHEDULER.fullmatch(scheduler):
        reader.complain("scheduler", scheduler, "must be the name of an IPVS scheduler, such as rr")
        scheduler = "rr"
    options = IpvsOptions(
        scheduler=scheduler,
        strict_arp=reader.flag("strictARP"),
        exclude_cidrs=tuple(excluded),
        sync_period_s=reader.period("syncPeriod", 30.0),
        min_sync_period_s=reader.seconds("minSyncPeriod", 0.0),
        tcp_timeout_s=reader.seconds("tcpTimeout", 0.0),
        tcp_fin_timeout_s=reader.seconds("tcpFinTimeout", 0.0),
        udp_timeout_s=reader.seconds("udpTimeout", 0.0),
    )
    _check_periods(reader, options.sync_period_s, options.min_sync_period_s)
    reader.finish()
    return options


def _nftables_options(reader: _Reader) -> NftablesOptions:
    options = NftablesOptions(
        masquerade_all=reader.flag("masqueradeAll"),
        masquerade_bit=_masquerade_bit(reader),
        sync_period_s=reader.period("syncPeriod", 30.0),
        min_sync_period_s=reader.seconds("minSyncPeriod", 1.0),
    )
    _check_periods(reader, options.sync_period_s, options.min_sync_period_s)
    reader.finish()
    return options


def _conntrack_options(reader: _Reader) -> ConntrackOptions:
    options = ConntrackOptions(
        max_per_core=reader.number("maxPerCore", 32768),
        minimum=reader.number("min", 131072),
        tcp_established_timeout_s=reader.seconds("tcpEstablishedTimeout", 86400.0),
        tcp_close_wait_timeout_s=reader.seconds("tcpCloseWaitTimeout", 3600.0),
        tcp_be_liberal=reader.flag("tcpBeLiberal"),
        udp_timeout_s=reader.seconds("udpTimeout", 0.0),
        udp_stream_timeout_s=reader.seconds("udpStreamTimeout", 0.0),
    )
    reader.finish()
    return options


def local_detector(config: KubeProxyConfig, node: NodeView) -> LocalDetector | None:
    """Return how to tell a local pod's packet, or None when the configuration gives no way to tell."""
    mode = config.detect_local_mode
    if mode is DetectLocalMode.BRIDGE_INTERFACE:
        return LocalDetector(Origin.INTERFACE, config.bridge_interface) if config.bridge_interface else None
    if mode is DetectLocalMode.INTERFACE_NAME_PREFIX:
        prefix = config.interface_name_prefix
        return LocalDetector(Origin.INTERFACE_PREFIX, prefix) if prefix else None
    cidr = node.pod_cidr if mode is DetectLocalMode.NODE_CIDR else config.cluster_cidr
    return LocalDetector(Origin.ADDRESS, cidr) if cidr else None


def node_address(config: KubeProxyConfig, node: NodeView) -> IPv4Address:
    """Return the node's own address: bindAddress if it names one, the Node's, else 127.0.0.1 as upstream does."""
    bind = parse_address(config.bind_address)
    if bind is not None and not bind.is_unspecified:
        return bind
    return node.internal_ip or IPv4Address("127.0.0.1")
