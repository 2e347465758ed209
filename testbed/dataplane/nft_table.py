"""One nftables table as values: what is wanted, what ``nft list table`` shows, and how the two are compared.

nft does not print a rule as it was written (``mark set mark or 0x4000`` becomes ``meta mark set meta mark | 0x00004000``).
`as_listed` gives the printed form of everything that kube-proxy writes, so that a listing can be compared with what is
wanted, on any machine. The forms are those of nft 1.0.6 to 1.1.

Source: nft(8); kubernetes pkg/proxy/nftables/proxier_test.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, collapse_addresses
from typing import Final, NamedTuple

#: Bytes of a comment that nft accepts.
LONGEST_COMMENT: Final = 128


class Hook(NamedTuple):
    """Where a base chain stands: ``type filter hook input priority 0``."""

    type: str
    hook: str
    priority: int

    @property
    def written(self) -> str:
        return f"type {self.type} hook {self.hook} priority {self.priority} ;"


class SetSpec(NamedTuple):
    """A set, or with ``kind`` 'map' a verdict map. ``timeout_s`` above 0: filled by packets, and forgetful."""

    kind: str
    type: str
    comment: str = ""
    timeout_s: int = 0

    @property
    def written(self) -> str:
        parts = [f"type {self.type} ;"]
        if self.timeout_s:
            # nft adds "dynamic" by itself once a rule updates the set, and would then refuse to see it without
            parts.append(f"flags dynamic,timeout ; timeout {self.timeout_s}s ;")
        if self.comment:
            parts.append(f'comment "{self.comment}" ;')
        return " ".join(parts)


class Element(NamedTuple):
    """One element of a set, or of a map when ``value`` is a verdict. ``set_name`` and ``key`` identify it."""

    set_name: str
    key: str
    value: str = ""
    comment: str = ""

    @property
    def written(self) -> str:
        comment = f' comment "{self.comment}"' if self.comment else ""
        return f"{self.key}{comment} : {self.value}" if self.value else f"{self.key}{comment}"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain: rules in order, as written by us or as listed by nft."""

    rules: tuple[str, ...] = ()
    hook: Hook | None = None
    comment: str = ""

    @property
    def written(self) -> str:
        parts = [self.hook.written] if self.hook else []
        parts += [f'comment "{self.comment}" ;'] if self.comment else []
        return " ".join(parts)


ElementKey = tuple[str, str]


@dataclass(slots=True)
class NftTable:
    """Everything in one table, by name. Elements of sets that packets fill are not part of it."""

    comment: str = ""
    sets: dict[str, SetSpec] = field(default_factory=dict)
    chains: dict[str, Chain] = field(default_factory=dict)
    elements: dict[ElementKey, Element] = field(default_factory=dict)


def cut_comment(text: str) -> str:
    """Return a comment that nft accepts: a Service with long names must not spoil the transaction (kubernetes 139515)."""
    return text.encode()[:LONGEST_COMMENT].decode(errors="ignore")


# What nft prints -----------------------------------------------------------------------------------------------------

_MARK = re.compile(r"(?<!\S)mark (set mark )?(or|xor|and) (0x[0-9a-f]+)(?: (==|!=) 0(?!x))?")
_OPERATORS = {"or": "|", "xor": "^", "and": "&"}
_INTERFACE = re.compile(r'\b(iifname (?:!= )?)([^"\s=!]+)')
_ADDRESSES = re.compile(r"\b(ip [sd]addr (?:!= )?)\{([^}@]*)\}")


@lru_cache(maxsize=65536)
def as_listed(rule: str) -> str:
    """Return a rule of ours as nft prints it; a rule that is printed already stays as it is."""
    if "mark " in rule:
        rule = _MARK.sub(_listed_mark, rule)
    if "addr . port to" in rule:
        rule = rule.replace("dnat ip addr . port to", "dnat ip to", 1)
    if "iifname" in rule:
        rule = _INTERFACE.sub(r'\1"\2"', rule)
    if "addr" in rule and "{" in rule:
        rule = _ADDRESSES.sub(_listed_addresses, rule)
    return rule.replace(" , ", ", ")


def _listed_mark(match: re.Match[str]) -> str:
    is_set, operator, number, comparison = match.groups()
    value = f"0x{int(number, 16):08x}"
    text = (
        f"meta mark set meta mark {_OPERATORS[operator]} {value}"
        if is_set
        else f"meta mark {_OPERATORS[operator]} {value}"
    )
    return f"{text} {comparison} 0x00000000" if comparison else text


def _listed_addresses(match: re.Match[str]) -> str:
    """Merge, sort and print networks: neighbours become one, /32 is left out, a single one stands without braces."""
    written = [IPv4Network(part.strip()) for part in match[2].split(",")]
    networks = sorted(collapse_addresses(written))
    texts = [str(n.network_address) if n.prefixlen == 32 else str(n) for n in networks]
    return match[1] + (texts[0] if len(written) == 1 else "{ " + ", ".join(texts) + " }")


_PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
_HOOK = re.compile(r"type (\w+) hook (\w+) (?:device \S+ )?priority (.+?);")
_TIME = re.compile(r"(\d+)([dhms]+)")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def _priority(text: str) -> int:
    """Read ``-110``, ``dstnat`` and ``dstnat - 10``."""
    name, *rest = text.split()
    if name not in _PRIORITIES:
        return int("".join(text.split()))
    return _PRIORITIES[name] + (int("".join(rest)) if rest else 0)


def _quoted(line: str) -> str:
    return line.split('"', 2)[1] if line.count('"') >= 2 else ""


def parse_listing(text: str) -> NftTable:
    """Read what ``nft list table ip kube-proxy`` prints. Kinds of objects that kube-proxy does not use are passed over.

    Sample::

        table ip kube-proxy {
                comment "rules for kube-proxy"
                set cluster-ips {
                        type ipv4_addr
                        elements = { 10.96.0.1, 10.96.0.10,
                                     10.96.1.10 }
                }
                chain nat-prerouting {
                        type nat hook prerouting priority dstnat; policy accept;
                        jump services
                }
        }
    """
    table = NftTable()
    lines = iter(text.splitlines())
    next(lines, None)  # the table's own line
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "{":
            body = _block(lines)
            if words[0] in ("set", "map"):
                _read_set(table, words[0], words[1], body)
            elif words[0] == "chain":
                table.chains[words[1]] = _read_chain(body)
        elif words[:1] == ["comment"]:
            table.comment = _quoted(line)
    return table


def _block(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        stripped = line.strip()
        if stripped == "}":
            return
        if stripped:
            yield stripped


def _read_set(table: NftTable, kind: str, name: str, body: Iterable[str]) -> None:
    type_, comment, timeout_s = "", "", 0
    elements: list[str] = []
    in_elements = False
    for line in body:
        if in_elements or line.startswith("elements = {"):
            part = line if in_elements else line.removeprefix("elements = {")
            in_elements = not part.endswith("}")
            elements += part.removesuffix("}").split(",")
        elif line.startswith("type "):
            type_ = line.removeprefix("type ")
        elif line.startswith("comment "):
            comment = _quoted(line)
        elif line.startswith("timeout "):
            timeout_s = round(sum(int(n) * _SECONDS[u] for n, u in _TIME.findall(line)))
    table.sets[name] = SetSpec(kind, type_, comment, timeout_s)
    if timeout_s:
        return
    for text in filter(None, map(str.strip, elements)):
        key, _, value = text.partition(" : ")
        comment = _quoted(key) if '"' in key else ""
        key = key.partition(' comment "')[0]
        table.elements[name, key] = Element(name, key, value, comment)


def _read_chain(body: Iterable[str]) -> Chain:
    rules: list[str] = []
    hook: Hook | None = None
    comment = ""
    for line in body:
        match = _HOOK.match(line) if line.startswith("type ") else None
        if match:
            hook = Hook(match[1], match[2], _priority(match[3]))
        elif line.startswith('comment "'):
            comment = _quoted(line)
        else:
            rules.append(line)
    return Chain(tuple(rules), hook, comment)


def differences(wanted: NftTable, listed: NftTable, *, ignored_chains: Mapping[str, object] | None = None) -> list[str]:
    """Return in a few words each what a listing lacks, has too much or has otherwise; no text when it is as wanted."""
    found: list[str] = []
    if listed.comment != wanted.comment:
        found.append(f"the table's comment is {listed.comment!r}")
    for name, spec in wanted.sets.items():
        if listed.sets.get(name) != spec:
            found.append(f"{spec.kind} {name} {'is changed' if name in listed.sets else 'is gone'}")
    found += [
        f"{listed.sets[name].kind} {name} is not ours" for name in sorted(listed.sets.keys() - wanted.sets.keys())
    ]
    for name, chain in wanted.chains.items():
        if name not in listed.chains:
            found.append(f"chain {name} is gone")
        elif not same_chain(chain, listed.chains[name]):
            found.append(f"chain {name} is changed")
    extra = listed.chains.keys() - wanted.chains.keys() - (ignored_chains or {}).keys()
    found += [f"chain {name} is not ours" for name in sorted(extra)]
    for key, element in wanted.elements.items():
        if listed.elements.get(key) != element:
            found.append(
                f"element {element.key} of {element.set_name} {'is changed' if key in listed.elements else 'is gone'}"
            )
    found += [
        f"element {key} of {name} is not ours" for name, key in sorted(listed.elements.keys() - wanted.elements.keys())
    ]
    return found


def same_chain(wanted: Chain, listed: Chain) -> bool:
    """Say whether a listed chain is what writing the wanted one gives."""
    return (
        wanted.hook == listed.hook
        and wanted.comment == listed.comment
        and tuple(map(as_listed, wanted.rules)) == listed.rules
    )
