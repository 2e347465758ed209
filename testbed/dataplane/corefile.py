"""The Corefile of ConfigMap kube-system/coredns, as far as it means something here, and dnsmasq's configuration from it. Pure.

::

    .:53 {
        errors
        health {
           lameduck 5s
        }
        kubernetes cluster.local in-addr.arpa ip6.arpa {     zone, TTL, pod records
           pods insecure
           ttl 30
        }
        forward . /etc/resolv.conf                           who is asked for everything else
    }
    example.com:53 {                                         and for one zone
        forward . 192.168.93.53
    }

Source: CoreDNS manual (Configuration), plugin/{kubernetes,forward,health}/README.md of v1.11; the Corefile of kubeadm v1.30.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import AddressValueError, IPv4Address
from typing import Final

from testbed.dataplane.dns import domain_key, is_within
from testbed.errors import InputError
from testbed.model.dns import REVERSE_ZONE, REVERSE_ZONE_6, PodMode, ZoneSettings

DNS_PORT: Final = 53
#: Where the responder behind dnsmasq listens, on loopback.
RESPONDER_PORT: Final = 5355
#: Names N.SERIAL_ZONE are in the hosts file to tell which of its versions dnsmasq has read.
SERIAL_ZONE: Final = "serial.testbed"

MAX_TTL_S: Final = 3600
_WITHOUT_EFFECT: Final = frozenset(
    {"errors", "ready", "prometheus", "cache", "loop", "reload", "loadbalance", "bufsize", "debug", "nsid", "any"}
)
"""Plugins that are accepted and change nothing: what they do is done always, or there is nothing to do."""
_UNSUPPORTED: Final = frozenset(
    {"acl", "auto", "autopath", "bind", "dns64", "dnssec", "dnstap", "erratic", "etcd", "file", "grpc", "header", "hosts",
     "import", "k8s_external", "local", "metadata", "minimal", "multicluster", "pprof", "rewrite", "root", "route53",
     "secondary", "sign", "template", "timeouts", "tls", "trace", "transfer", "tsig", "view", "whoami"}
)  # fmt: skip
_NAME: Final = re.compile(r"(?!.{254})[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?(\.[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?)*")
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_UNITS_S: Final[Mapping[str, float]] = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_FORWARD_OPTIONS: Final = frozenset(
    {"except", "force_tcp", "prefer_udp", "expire", "max_fails", "max_concurrent", "tls", "tls_servername", "policy",
     "health_check", "next", "failfast_all_unhealthy_upstreams"}
)  # fmt: skip
_KUBERNETES_OPTIONS: Final = frozenset(
    {"endpoint", "tls", "kubeconfig", "apiserver_qps", "apiserver_burst", "apiserver_max_inflight", "namespaces", "labels",
     "namespace_labels", "endpoint_pod_names", "noendpoints", "ignore", "startup_timeout", "multicluster"}
)  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Upstream:
    """A DNS server to ask."""

    address: str
    port: int = DNS_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsConfig:
    """What a Corefile asks for. ``forwards``: zone ('' for all names) -> servers; the longest zone that fits a name counts."""

    zone: ZoneSettings = field(default_factory=ZoneSettings)
    forwards: Mapping[str, tuple[Upstream, ...]] = field(default_factory=dict)
    lameduck_s: float = 0.0
    logs_queries: bool = False

    def upstreams(self, name: str) -> tuple[Upstream, ...]:
        """Return whom to ask for a name that is not the cluster's; nobody, when there is nobody to ask."""
        zones = [zone for zone in self.forwards if is_within(domain_key(name), zone)]
        return self.forwards[max(zones, key=len)] if zones else ()


class CorefileError(InputError):
    """Everything that is wrong with a Corefile, one problem a line, in CoreDNS' form: ``Corefile:LINE - Error …``."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One directive: its words, and the lines of the block behind it."""

    number: int
    words: tuple[str, ...]
    block: tuple[_Line, ...] = ()


_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|#[^\n]*|(\n)|([^\s"]+)|(")')


def parse_corefile(text: str, *, server: str = "", read_file: Callable[[str], str] = lambda path: "") -> DnsConfig:
    """Return what a Corefile asks for.

    Args:
        server: address of this DNS server.
        read_file: returns the text of a file that ``forward`` names (resolv.conf); OSError when it cannot be read.

    Raises:
        CorefileError: every problem.
    """
    reader = _Reader(server, read_file)
    reader.read(text)
    if reader.problems:
        raise CorefileError(
            "\n".join(f"Corefile:{line} - Error during parsing: {what}" for line, what in reader.problems)
        )
    return reader.config


class _Reader:
    def __init__(self, server: str, read_file: Callable[[str], str]) -> None:
        self.config = DnsConfig()
        self.problems: list[tuple[int, str]] = []
        self._server = server
        self._read_file = read_file
        self._has_kubernetes = False

    def _refuse(self, line: _Line, what: str) -> None:
        self.problems.append((line.number, what))

    def read(self, text: str) -> None:
        try:
            blocks = list(_lines(_tokens(text)))
        except CorefileError as error:
            number, _, what = str(error).partition(":")
            self.problems.append((int(number), what))
            return
        for block in blocks:
            zones = [zone for word in block.words if (zone := self._server_zone(block, word)) is not None]
            for line in block.block:
                self._directive(line, zones)
        if not self._has_kubernetes and not self.problems:
            self.problems.append((1, "no server block has the plugin kubernetes, so there would be no cluster names"))

    def _server_zone(self, block: _Line, word: str) -> str | None:
        key = word.removeprefix("dns://").rstrip(",")
        name, _, port = key.partition(":")
        if port not in ("", str(DNS_PORT)):
            self._refuse(block, f"{word!r}: only port {DNS_PORT} is served here")
            return None
        return self._zone_name(block, name)

    def _zone_name(self, line: _Line, text: str) -> str | None:
        """Return a zone as it is compared, '' for the root; report what is none."""
        name = domain_key(text)
        if name and not _NAME.fullmatch(name):
            self._refuse(line, f"{text!r} is not a domain name")
            return None
        return name

    def _directive(self, line: _Line, zones: list[str]) -> None:
        name, *arguments = line.words
        if name == "kubernetes":
            self._kubernetes(line, arguments, zones)
        elif name == "forward":
            self._forward(line, arguments, zones)
        elif name == "health":
            for option in line.block:
                if option.words[0] == "lameduck" and len(option.words) == 2:
                    self.config = replace(self.config, lameduck_s=self._duration_s(option, option.words[1]))
                else:
                    self._refuse(option, f"plugin/health: unknown property {option.words[0]!r}")
        elif name == "log":
            self.config = replace(self.config, logs_queries=True)
        elif name in _UNSUPPORTED:
            self._refuse(line, f"plugin/{name}: is not available here")
        elif name not in _WITHOUT_EFFECT:
            self._refuse(line, f"Unknown directive {name!r}")

    def _duration_s(self, line: _Line, text: str) -> float:
        match = _DURATION.fullmatch(text)
        if match is None:
            self._refuse(line, f"{text!r} is not a duration (500ms, 5s)")
            return 0.0
        return float(match[1]) * _UNITS_S[match[2]]

    def _kubernetes(self, line: _Line, arguments: list[str], zones: list[str]) -> None:
        if self._has_kubernetes:
            self._refuse(line, "plugin/kubernetes: one is enough here")
            return
        self._has_kubernetes = True
        named = [zone for word in arguments if (zone := self._zone_name(line, word)) is not None] or zones
        own = [zone for zone in named if not (is_within(zone, REVERSE_ZONE) or is_within(zone, REVERSE_ZONE_6))]
        if len(own) != 1 or not own[0]:
            self._refuse(line, f"plugin/kubernetes: wants one zone for Services, got {', '.join(own) or 'none'}")
            return
        settings = ZoneSettings(domain=own[0], server=self._server)
        for option in line.block:
            word, *values = option.words
            if word == "pods":
                modes = {mode.value: mode for mode in PodMode}
                if len(values) == 1 and values[0] in modes:
                    settings = replace(settings, pods=modes[values[0]])
                else:
                    self._refuse(option, f"plugin/kubernetes: wrong value for pods: {' '.join(values)},  must be one of: "
                                         f"{', '.join(modes)}")  # fmt: skip
            elif word == "ttl":
                if len(values) == 1 and re.fullmatch("[0-9]{1,5}", values[0]) and int(values[0]) <= MAX_TTL_S:
                    settings = replace(settings, ttl=int(values[0]))
                else:
                    self._refuse(
                        option, f"plugin/kubernetes: ttl must be in range [0, {MAX_TTL_S}]: {' '.join(values)}"
                    )
            elif word == "fallthrough":
                through = [zone for text in values if (zone := self._zone_name(option, text)) is not None]
                settings = replace(settings, fallthrough=tuple(through or named))
            elif word in _KUBERNETES_OPTIONS:
                self._refuse(option, f"plugin/kubernetes: {word} is not available here")
            else:
                self._refuse(option, f"plugin/kubernetes: unknown property {word!r}")
        self.config = replace(self.config, zone=settings)

    def _forward(self, line: _Line, arguments: list[str], zones: list[str]) -> None:
        for option in line.block:
            if option.words[0] not in _FORWARD_OPTIONS:
                self._refuse(option, f"plugin/forward: unknown property {option.words[0]!r}")
        if len(arguments) < 2:
            self._refuse(line, "plugin/forward: wants a zone and at least one server")
            return
        base = self._zone_name(line, arguments[0])
        servers = tuple(dict.fromkeys(server for word in arguments[1:] for server in self._servers(line, word)))
        if base is None:
            return
        forwards = dict(self.config.forwards)
        for zone in zones:
            if not (is_within(base, zone) or is_within(zone, base)):
                self._refuse(
                    line, f"plugin/forward: {arguments[0]!r} is not in the server block's zone {zone or '.'!r}"
                )
                continue
            forwards[max(base, zone, key=len)] = servers
        self.config = replace(self.config, forwards=forwards)

    def _servers(self, line: _Line, word: str) -> list[Upstream]:
        """Return the servers that a word of ``forward`` names: an address, or a file like resolv.conf."""
        if word.startswith("/"):
            try:
                text = self._read_file(word)
            except OSError as error:
                self._refuse(line, f"plugin/forward: {word}: {error.strerror}")
                return []
            return [Upstream(address) for address in resolv_conf_servers(text)]
        host, _, port = word.removeprefix("dns://").partition(":")
        try:
            address = IPv4Address(host)
        except AddressValueError:
            self._refuse(line, f"plugin/forward: not an IPv4 address or file: {word!r}")
            return []
        if port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
            self._refuse(line, f"plugin/forward: {word!r}: ports go from 1 to 65535")
            return []
        if address.is_loopback:
            self._refuse(line, f"plugin/loop: Loop ({word}) detected: this server would ask itself")
            return []
        return [Upstream(str(address), int(port or DNS_PORT))]


def resolv_conf_servers(text: str) -> list[str]:
    """Return the IPv4 servers of a resolv.conf."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(str(IPv4Address(words[1])))
            except AddressValueError:
                continue
    return found


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Give each word with its line; '\\n' for the end of a line. Quotes keep blanks together."""
    number = 1
    for match in _TOKEN.finditer(text):
        if match[2]:
            yield number, "\n"
            number += 1
        elif match[4]:
            raise CorefileError(f"{number}:a quote is not closed")
        elif match[1] is not None or match[3]:
            word = match[1].replace('\\"', '"') if match[1] is not None else match[3]
            yield number, word
            number += word.count("\n")


def _lines(tokens: Iterator[tuple[int, str]], opened: int = 0) -> Iterator[_Line]:
    """Give the directives up to the end of the block; ``opened`` is the line of its brace, 0 for the whole file.

    Raises:
        CorefileError: ``LINE:what``, for braces that do not match.
    """
    words: list[str] = []
    began = number = 0
    for number, word in tokens:
        if word == "{":
            if not words:
                raise CorefileError(f"{number}:a block without a name before it")
            yield _Line(began, tuple(words), tuple(_lines(tokens, number)))
            words = []
        elif word == "}":
            if not opened:
                raise CorefileError(f"{number}:Unexpected '}}'")
            if words:
                yield _Line(began, tuple(words))
            return
        elif word != "\n":
            began = began if words else number
            words.append(word)
        elif words:
            if not opened:
                raise CorefileError(f"{number}:a server block wants '{{' behind its zones, got {' '.join(words)!r}")
            yield _Line(began, tuple(words))
            words = []
    if opened:
        raise CorefileError(f"{opened}:this block is not closed: '}}' is missing")
    if words:
        raise CorefileError(f"{number}:a server block wants '{{' behind its zones, got {' '.join(words)!r}")


def render_dnsmasq(config: DnsConfig, *, addresses: tuple[str, ...], hosts_file: str) -> str:
    """Return dnsmasq's configuration: Services from a hosts file, everything else of the cluster from the responder.

    Without anybody to ask for names outside the cluster these go to the responder as well, which fails them at once.
    """
    responder = f"127.0.0.1#{RESPONDER_PORT}"
    lines = [
        f"port={DNS_PORT}",
        *(f"listen-address={address}" for address in addresses),
        "bind-interfaces",
        # It stays who it is: the pod has no capability to become somebody else.
        "user=root",
        "group=",
        "log-facility=-",
        "pid-file=",
        "no-resolv",
        "no-hosts",
        "no-poll",
        f"addn-hosts={hosts_file}",
        f"local-ttl={config.zone.ttl}",
        # An answer that is kept would be served after what it says has changed.
        "cache-size=0",
        "dns-forward-max=2000",
        "edns-packet-max=1232",  # flag day 2020; dnsmasq before 2.90 has 4096
        f"local=/{SERIAL_ZONE}/",
        *(f"server=/{zone}/{responder}" for zone in (config.zone.domain, REVERSE_ZONE, REVERSE_ZONE_6)),
    ]
    for zone, servers in sorted(config.forwards.items()):
        if zone:
            where = [f"{server.address}#{server.port}" for server in servers] or [responder]
            lines += [f"server=/{zone}/{server}" for server in where]
    servers = config.forwards.get("", ())
    lines += [f"server={server.address}#{server.port}" for server in servers] or [f"server={responder}"]
    if config.logs_queries:
        lines.append("log-queries")
    return "\n".join(lines) + "\n"
