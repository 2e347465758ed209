"""The kinds of text that our own documents hold: names, addresses, durations, rates. Each is checked as it is read.

A name that has passed is safe in a command, a link name and a path: it has no shell, path or control characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

LABEL_PATTERN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN_PATTERN = rf"{LABEL_PATTERN}(\.{LABEL_PATTERN})*"
LABEL_VALUE_PATTERN = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
QUALIFIED_NAME_PATTERN = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
GO_DURATION_PATTERN = r"0|([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+"

MAX_INTERFACE_NAME = 15  # IFNAMSIZ of the kernel, without the final zero byte
BRIDGE_PREFIX = "br-"
_MAX_NETWORK_NAME = MAX_INTERFACE_NAME - len(BRIDGE_PREFIX)
# Links that every node has already, and words that /proc/sys/net/ipv4/conf uses for something else.
_RESERVED_INTERFACES = frozenset({"lo", "cni0", "kube-ipvs0", "kube-dummy0", "all", "default"})

# Classes of text. A value of one of them was checked; the walker in `decode.py` makes them, nobody else needs to.


class Label(str):
    """A DNS-1123 label."""

    __slots__ = ()


class MachineName(str):
    """A node's or outside host's name: a DNS-1123 subdomain that fits in a hostname."""

    __slots__ = ()


class NetworkName(str):
    """A network's name: a DNS-1123 label whose bridge's name the kernel takes."""

    __slots__ = ()


class InterfaceName(str):
    """A link's name."""

    __slots__ = ()


class Domain(str):
    """A DNS domain."""

    __slots__ = ()


class LabelKey(str):
    """The key of a Kubernetes label or taint."""

    __slots__ = ()


class LabelValue(str):
    """The value of a Kubernetes label or taint."""

    __slots__ = ()


class Duration(float):
    """Seconds, written as ``500ms``, ``5s``, ``1m`` or ``1h``."""

    __slots__ = ()


class GoDuration(str):
    """A duration as Kubernetes' own configuration files have it, ``1m0s``; kept as text."""

    __slots__ = ()


class Delay(float):
    """Milliseconds, written as ``10ms``."""

    __slots__ = ()


class Rate(float):
    """Megabits a second, written as ``100mbit``."""

    __slots__ = ()


class Percent(float):
    """Hundredths, written as ``1%``."""

    __slots__ = ()


class DnsAddress(str):
    """An IPv4 address, or ``none`` for a cluster without DNS."""

    __slots__ = ()


class PortRange(tuple[int, int]):
    """First and last port, written as ``30000-32767``."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Scalar:
    """How a class of text is read; ``parse`` raises ValueError with the reason. ``noun`` follows 'wants'."""

    parse: Callable[[str], Any]
    noun: str
    schema: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return what the schema calls it: the noun without article and example."""
        return self.noun.partition(" such as ")[0].partition(" (")[0].removeprefix("an ").removeprefix("a ")


def _dns_reason(text: str, max_length: int, pattern: str) -> str:
    if len(text) > max_length:
        return f"{text!r} is longer than {max_length} characters"
    if any(len(label) > 63 for label in text.split(".")):
        return f"{text!r} has a part of more than 63 characters between dots"
    if not re.fullmatch(pattern, text):
        dots = " and '.'" if pattern == SUBDOMAIN_PATTERN else ""
        return (
            f"{text!r} is not a valid name: lower case letters, digits, '-'{dots}, with a letter or digit at both ends"
        )
    return ""


def parse_label(text: str) -> Label:
    """Return a DNS-1123 label."""
    if reason := _dns_reason(text, 63, LABEL_PATTERN):
        raise ValueError(reason)
    return Label(text)


def parse_machine_name(text: str) -> MachineName:
    """Return the name of a node or outside host."""
    if reason := _dns_reason(text, 63, SUBDOMAIN_PATTERN):  # HOST_NAME_MAX is 64
        raise ValueError(reason)
    if text in ("localhost", "localhost.localdomain"):
        raise ValueError(f"{text!r} already means the loopback address")
    return MachineName(text)


def parse_network_name(text: str) -> NetworkName:
    """Return the name of a network."""
    if reason := _dns_reason(text, 63, LABEL_PATTERN):
        raise ValueError(reason)
    if len(text) > _MAX_NETWORK_NAME:
        raise ValueError(
            f"{text!r} is longer than {_MAX_NETWORK_NAME} characters: its bridge {BRIDGE_PREFIX + text!r} would exceed "
            f"the kernel's {MAX_INTERFACE_NAME}"
        )
    return NetworkName(text)


def parse_interface_name(text: str) -> InterfaceName:
    """Return the name of a link."""
    if len(text) > MAX_INTERFACE_NAME:
        raise ValueError(
            f"{text!r} is longer than {MAX_INTERFACE_NAME} characters, the kernel's limit for interface names"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise ValueError(
            f"{text!r} is not a valid interface name: letters, digits, '_', '.' and '-', not starting with a sign"
        )
    if text in _RESERVED_INTERFACES:
        raise ValueError(f"{text!r} is a name that nodes use for something else")
    return InterfaceName(text)


def parse_domain(text: str) -> Domain:
    """Return a DNS domain, without a final dot."""
    if reason := _dns_reason(text, 253, SUBDOMAIN_PATTERN):
        raise ValueError(reason)
    return Domain(text)


def parse_label_key(text: str) -> LabelKey:
    """Return a label key: an optional DNS prefix and '/', then a name of at most 63 characters."""
    prefix, slash, name = text.rpartition("/")
    is_prefix_fine = not slash or (len(prefix) <= 253 and re.fullmatch(SUBDOMAIN_PATTERN, prefix))
    if not is_prefix_fine or len(name) > 63 or not re.fullmatch(QUALIFIED_NAME_PATTERN, name):
        raise ValueError(f"{text!r} is not a valid label key, such as 'app' or 'example.com/role'")
    return LabelKey(text)


def parse_label_value(text: str) -> LabelValue:
    """Return a label value."""
    if len(text) > 63 or not re.fullmatch(LABEL_VALUE_PATTERN, text):
        raise ValueError(
            f"{text!r} is not a valid label value: at most 63 letters, digits, '-', '_' and '.', "
            "with a letter or digit at both ends"
        )
    return LabelValue(text)


def parse_address(text: str) -> IPv4Address:
    """Return an IPv4 address."""
    try:
        return IPv4Address(text)
    except ValueError:
        pass
    try:
        IPv6Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 address") from None
    raise ValueError(f"{text!r} is an IPv6 address: IPv4 only so far")


def parse_dns_address(text: str) -> DnsAddress:
    """Return an address, or that there is to be none."""
    return DnsAddress(text if text == "none" else parse_address(text))


def parse_cidr(text: str) -> IPv4Network:
    """Return an IPv4 network, written as ``192.168.93.0/24``."""
    try:
        found = IPv4Network(text, strict=False)
    except ValueError:
        try:
            IPv6Network(text, strict=False)
        except ValueError:
            raise ValueError(f"{text!r} is not an IPv4 network such as 192.168.93.0/24") from None
        raise ValueError(f"{text!r} is an IPv6 network: IPv4 only so far") from None
    address, slash, length = text.partition("/")
    if not slash or not length.isdigit():
        raise ValueError(f"{text!r} has no prefix length, such as /24")
    if str(found.network_address) != address:
        raise ValueError(f"{text!r} has bits set beyond its prefix length (did you mean {found}?)")
    return found


_UNITS_OF_TIME = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNITS_OF_RATE = {"bit": 1e-6, "kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,6})?)"


def parse_duration(text: str) -> Duration:
    """Return seconds."""
    match = re.fullmatch(rf"{_NUMBER}(ms|s|m|h)", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 500ms, 5s or 1m")
    return Duration(float(match[1]) * _UNITS_OF_TIME[match[2]])


def parse_go_duration(text: str) -> GoDuration:
    """Return a Go duration, unchanged."""
    if not re.fullmatch(GO_DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is not a duration such as 30s or 1m0s")
    return GoDuration(text)


def parse_delay(text: str) -> Delay:
    """Return milliseconds."""
    match = re.fullmatch(rf"{_NUMBER}(us|ms|s)", text)
    if not match:
        raise ValueError(f"{text!r} is not a delay such as 10ms or 1s")
    return Delay(round(float(match[1]) * _UNITS_OF_TIME[match[2]] * 1000, 6))


def parse_rate(text: str) -> Rate:
    """Return megabits a second; tc's spelling."""
    match = re.fullmatch(rf"{_NUMBER}(bit|kbit|mbit|gbit)", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not a rate such as 100mbit or 1gbit")
    rate = Rate(round(float(match[1]) * _UNITS_OF_RATE[match[2]], 6))
    if not rate:
        raise ValueError(f"{text!r} lets nothing through: to cut a link, use a fault step")
    return rate


def parse_percent(text: str) -> Percent:
    """Return hundredths."""
    match = re.fullmatch(rf"{_NUMBER}%", text)
    if not match:
        raise ValueError(f"{text!r} is not a percentage such as 1%")
    if float(match[1]) > 100:
        raise ValueError(f"{text!r} is more than 100%")
    return Percent(match[1])


def parse_port_range(text: str) -> PortRange:
    """Return the first and the last port."""
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    if not match:
        raise ValueError(f"{text!r} is not a port range such as 30000-32767")
    first, last = int(match[1]), int(match[2])
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        raise ValueError(f"{text!r} is not a port range: ports go from 1 to 65535")
    if first > last:
        raise ValueError(f"{text!r} ends before it begins (did you mean {last}-{first}?)")
    return PortRange((first, last))


_ADDRESS_PATTERN = r"^([0-9]{1,3}\.){3}[0-9]{1,3}$"

_NUMBER_SCHEMA = r"^[0-9]+(\.[0-9]+)?"

SCALARS: dict[type, Scalar] = {
    Label: Scalar(parse_label, "a name", {"pattern": f"^{LABEL_PATTERN}$", "maxLength": 63}),
    MachineName: Scalar(parse_machine_name, "a name", {"pattern": f"^{SUBDOMAIN_PATTERN}$", "maxLength": 63}),
    NetworkName: Scalar(
        parse_network_name, "a name", {"pattern": f"^{LABEL_PATTERN}$", "maxLength": _MAX_NETWORK_NAME}
    ),
    InterfaceName: Scalar(
        parse_interface_name,
        "an interface name",
        {"pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$", "maxLength": MAX_INTERFACE_NAME},
    ),
    Domain: Scalar(parse_domain, "a domain", {"pattern": f"^{SUBDOMAIN_PATTERN}$", "maxLength": 253}),
    LabelKey: Scalar(parse_label_key, "a label key", {"minLength": 1}),
    LabelValue: Scalar(
        parse_label_value, "a label value (text)", {"pattern": f"^{LABEL_VALUE_PATTERN}$", "maxLength": 63}
    ),
    Duration: Scalar(
        parse_duration,
        "a duration such as 5s",
        {"pattern": f"{_NUMBER_SCHEMA}(ms|s|m|h)$", "examples": ["500ms", "5s", "1m", "1h"]},
    ),
    GoDuration: Scalar(
        parse_go_duration,
        "a duration such as 30s",
        {"pattern": f"^({GO_DURATION_PATTERN})$", "examples": ["30s", "1m0s"]},
    ),
    Delay: Scalar(
        parse_delay,
        "a delay such as 10ms",
        {"pattern": f"{_NUMBER_SCHEMA}(us|ms|s)$", "examples": ["500us", "10ms", "1s"]},
    ),
    Rate: Scalar(
        parse_rate,
        "a rate such as 100mbit",
        {"pattern": f"{_NUMBER_SCHEMA}([kmgKMG])?[bB][iI][tT]$", "examples": ["500kbit", "100mbit", "1gbit"]},
    ),
    Percent: Scalar(
        parse_percent, "a percentage such as 1%", {"pattern": f"{_NUMBER_SCHEMA}%$", "examples": ["1%", "0.5%"]}
    ),
    PortRange: Scalar(parse_port_range, "a port range such as 30000-32767", {"pattern": "^[0-9]{1,5}-[0-9]{1,5}$"}),
    IPv4Address: Scalar(parse_address, "an IPv4 address", {"pattern": _ADDRESS_PATTERN}),
    DnsAddress: Scalar(parse_dns_address, "an IPv4 address or none", {"pattern": f"{_ADDRESS_PATTERN}|^none$"}),
    IPv4Network: Scalar(
        parse_cidr, "an IPv4 network such as 192.168.93.0/24", {"pattern": _ADDRESS_PATTERN[:-1] + "/[0-9]{1,2}$"}
    ),
}
