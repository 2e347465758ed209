"""Walks a packet through iptables rules, rendered or saved, and says where it comes out.

::

    from outside or a pod:  nat PREROUTING ─┬─ filter INPUT     (to the node itself)
                                            └─ filter FORWARD ─ nat POSTROUTING
    from the node:          nat OUTPUT ─ filter OUTPUT ─ nat POSTROUTING, or filter INPUT

The packet is the first of its connection. A rule that matches by chance (or by a recorded client) is followed both ways,
so the fate names every endpoint the packet could reach.

Source: kubernetes pkg/proxy/iptables/proxier_test.go, iptablesTracer (v1.30).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from ipaddress import IPv4Address, IPv4Network

_LOOPBACK = IPv4Network("127.0.0.0/8")


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection. ``interface`` is the one it came in by, '' when that does not matter."""

    source: str
    destination: str
    port: int
    protocol: str = "tcp"
    interface: str = ""
    is_bridged: bool = False  # came in by a port of a bridge, as a pod's packets do


class Verdict(Enum):
    """How a packet ends."""

    ENDPOINT = "endpoint"
    DROP = "DROP"
    REJECT = "REJECT"
    ACCEPT = "ACCEPT"  # a rule lets it in, its destination unchanged
    CLOSED = "closed"  # userspace mode: accepted, and closed at once
    NONE = "none"  # no rule is about it


@dataclass(frozen=True, slots=True)
class Fate:
    """Where a packet comes out: ``endpoints`` (``address:port``, sorted) it may reach, and whether its source is hidden.

    ``rules`` are those it met, as ``table: rule``, each once, in the order of the walk; they do not count in comparisons.
    """

    verdict: Verdict
    endpoints: tuple[str, ...] = ()
    masquerade: bool = False
    rules: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        text = ", ".join(self.endpoints) if self.endpoints else self.verdict.value
        return f"{text} (masqueraded)" if self.masquerade else text


def to_endpoints(*endpoints: str, masquerade: bool = False) -> Fate:
    """Return the fate of a packet that may reach each of these endpoints."""
    return Fate(Verdict.ENDPOINT, tuple(sorted(endpoints)), masquerade)


@dataclass(frozen=True, slots=True)
class State:
    """One possible packet at one moment."""

    packet: Packet
    source: IPv4Address
    destination: IPv4Address
    port: int
    mark: int = 0
    endpoint: str = ""
    masquerade: bool = False
    #: The virtual server that IPVS has taken it to: protocol, address, port.
    virtual: tuple[str, str, int] | None = None


class _Maybe(Enum):
    """What a match says: chance decides `PERHAPS`."""

    NO = 0
    YES = 1
    PERHAPS = 2


_Match = Callable[[State, "Node"], _Maybe]


@dataclass(frozen=True, slots=True)
class Node:
    """The node that the packet meets: its own addresses, loopback always among them, and the members of its ipsets.

    A member is the set's name and the text that ``ipset save`` prints.
    """

    addresses: frozenset[IPv4Address]
    members: Set[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, *addresses: str) -> Node:
        return cls(frozenset(IPv4Address(address) for address in addresses))

    @property
    def redirect_address(self) -> IPv4Address:
        """An address that REDIRECT may lead to: of all, the link decides which that a packet came in by."""
        own = sorted(address for address in self.addresses if address not in _LOOPBACK)
        return own[0] if own else IPv4Address("127.0.0.1")

    def owns(self, address: IPv4Address) -> bool:
        return address in self.addresses or address in _LOOPBACK


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, read: all matches must hold, then ``target`` applies; '' is a rule that only counts."""

    text: str
    matches: tuple[_Match, ...]
    target: str
    argument: str


Ruleset = dict[str, dict[str, list[Rule]]]


def parse_rules(text: str) -> Ruleset:
    """Read ``iptables-save`` output, or a payload as if restored with ``--noflush`` on an empty node.

    Raises:
        ValueError: a line that this interpreter does not know; names it.
    """
    tables: Ruleset = {}
    table: dict[str, list[Rule]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            table = tables.setdefault(line[1:].strip(), {})
        elif line.startswith(":"):
            table[line[1:].split(" ", 1)[0]] = []
        else:
            verb, chain, *rest = _words(line)
            if verb == "-A":
                table.setdefault(chain, []).append(_parse_rule(line, rest))
            elif verb == "-I":
                table.setdefault(chain, []).insert(0, _parse_rule(line, rest))
            elif verb == "-X":
                table.pop(chain, None)
            else:
                raise ValueError(f"cannot read rule {line!r}")
    return tables


def _words(line: str) -> list[str]:
    if line.startswith("["):  # counters of iptables-save -c
        line = line.partition("] ")[2]
    return shlex.split(line)


def _parse_rule(line: str, words: list[str]) -> Rule:
    matches: list[_Match] = []
    target = argument = ""
    queue = list(words)
    negated = False
    while queue:
        word = queue.pop(0)
        if word == "!":
            negated = True
            continue
        if word in _FLAGS:
            if word == "--physdev-is-in":
                matches.append(_bridged(negated))
            negated = False
            continue
        if word == "--match-set":
            matches.append(_in_set(queue.pop(0), queue.pop(0), negated))
            negated = False
            continue
        if word in ("--rcheck", "--set"):
            if word == "--rcheck":
                matches.append(_perhaps)
            continue
        if not queue:
            raise ValueError(f"{line!r} ends after {word}")
        value = queue.pop(0)
        if word in ("-j", "-g"):
            target = value
        elif word in _TARGET_OPTIONS:
            argument = f"{word} {value}"
        elif word in _MATCHES:
            matches.append(_MATCHES[word](value, negated))
        elif word not in _IGNORED:
            raise ValueError(f"no idea what {word} means in {line!r}")
        negated = False
    return Rule(line, tuple(matches), target, argument)


_FLAGS = frozenset({"--physdev-is-in", "--random-fully", "--reap", "--rsource", "--rdest"})
_IGNORED = frozenset({"-m", "--comment", "--mode", "--name", "--mask", "--seconds", "--reject-with", "-c"})
_TARGET_OPTIONS = frozenset({"--to-destination", "--to-ports", "--set-xmark", "--or-mark", "--xor-mark", "--set-mark"})


def _sure(holds: bool) -> _Maybe:
    return _Maybe.YES if holds else _Maybe.NO


def _perhaps(state: State, node: Node) -> _Maybe:
    return _Maybe.PERHAPS


def _source(value: str, negated: bool) -> _Match:
    network = IPv4Network(value)
    return lambda state, node: _sure((state.source in network) != negated)


def _destination(value: str, negated: bool) -> _Match:
    network = IPv4Network(value)
    return lambda state, node: _sure((state.destination in network) != negated)


def _protocol(value: str, negated: bool) -> _Match:
    return lambda state, node: _sure((state.packet.protocol == value) != negated)


def _port(value: str, negated: bool) -> _Match:
    return lambda state, node: _sure((state.port == int(value)) != negated)


def _interface(value: str, negated: bool) -> _Match:
    def matches(state: State, node: Node) -> _Maybe:
        name = state.packet.interface
        return _sure((name.startswith(value[:-1]) if value.endswith("+") else name == value) != negated)

    return matches


def _destination_type(value: str, negated: bool) -> _Match:
    if value != "LOCAL":
        raise ValueError(f"no idea what address type {value} is")
    return lambda state, node: _sure(node.owns(state.destination) != negated)


def _source_type(value: str, negated: bool) -> _Match:
    if value != "LOCAL":
        raise ValueError(f"no idea what address type {value} is")
    return lambda state, node: _sure(node.owns(state.source) != negated)


def _connection(value: str, negated: bool) -> _Match:
    wanted = value.split(",")

    def matches(state: State, node: Node) -> _Maybe:
        return _sure(("NEW" in wanted or ("DNAT" in wanted and bool(state.endpoint))) != negated)

    return matches


def _mark(value: str, negated: bool) -> _Match:
    wanted, _, mask = value.partition("/")
    want, bits = int(wanted, 0), int(mask or "0xffffffff", 0)
    return lambda state, node: _sure((state.mark & bits == want) != negated)


def _bridged(negated: bool) -> _Match:
    """The packet came in by a port of a bridge: it does when it comes from a pod, which has a port on cni0."""
    return lambda state, node: _sure(state.packet.is_bridged != negated)


def _in_set(name: str, sides: str, negated: bool) -> _Match:
    """A set has what these sides of the packet are; of ports there is one, the destination's."""

    def matches(state: State, node: Node) -> _Maybe:
        return _sure(any((name, entry) in node.members for entry in _entries(state, sides)) != negated)

    return matches


def _entries(state: State, sides: str) -> tuple[str, ...]:
    """Return the member that the packet would be, as the types of set print it."""
    first, _, rest = sides.partition(",")
    address = str(state.source if first == "src" else state.destination)
    if not rest:
        return address, str(state.port)
    where = f"{address},{state.packet.protocol}:{state.port}"
    if "," not in rest:
        return (where,)
    last = state.source if rest.endswith("src") else state.destination
    return f"{where},{last}", *(f"{where},{IPv4Network((last, n), strict=False)}" for n in range(1, 32))


def _virtual(position: int) -> Callable[[str, bool], _Match]:
    """The ipvs match: the packet has come by a virtual server, and this is its protocol (0), address (1) or port (2)."""

    def factory(value: str, negated: bool) -> _Match:
        def matches(state: State, node: Node) -> _Maybe:
            return _sure((state.virtual is not None and str(state.virtual[position]) == value) != negated)

        return matches

    return factory


def _chance(value: str, negated: bool) -> _Match:
    return _perhaps


_MATCHES: dict[str, Callable[[str, bool], _Match]] = {
    "-s": _source,
    "-d": _destination,
    "-p": _protocol,
    "-i": _interface,
    "--dport": _port,
    "--dst-type": _destination_type,
    "--src-type": _source_type,
    "--ctstate": _connection,
    "--state": _connection,
    "--mark": _mark,
    "--probability": _chance,
    "--vproto": _virtual(0),
    "--vaddr": _virtual(1),
    "--vport": _virtual(2),
}

_FALL_THROUGH, _ACCEPTED, _DROPPED, _REJECTED = "", "ACCEPT", "DROP", "REJECT"


class Walker:
    """Follows one packet through one ruleset and notes the rules it meets."""

    def __init__(self, rules: Ruleset, node: Node) -> None:
        self._rules = rules
        self._node = node
        self.met: dict[str, None] = {}

    def hook(self, table: str, chain: str, state: State) -> Iterator[tuple[str, State]]:
        """Yield each way out of a built-in chain: a verdict ('' is the chain's policy, to accept) and the packet then."""
        yield from self._chain(table, chain, 0, state)

    def _chain(self, table: str, chain: str, start: int, state: State) -> Iterator[tuple[str, State]]:
        rules = self._rules.get(table, {}).get(chain, [])
        for index in range(start, len(rules)):
            rule = rules[index]
            answer = self._match(rule, state)
            if answer is _Maybe.NO:
                continue
            if answer is _Maybe.PERHAPS:
                yield from self._chain(table, chain, index + 1, state)  # the other way
            self.met.setdefault(f"{table}: {rule.text}")
            if rule.target == "RETURN":
                break
            if rule.target in (_ACCEPTED, _DROPPED, _REJECTED):
                yield rule.target, state
                return
            if rule.target == "DNAT":
                endpoint = rule.argument.split(" ", 1)[1]
                address, _, port = endpoint.rpartition(":")
                moved = replace(state, endpoint=endpoint, destination=IPv4Address(address), port=int(port))
                yield _ACCEPTED, moved
                return
            if rule.target == "REDIRECT":
                port = rule.argument.split(" ", 1)[1]
                own = self._node.redirect_address
                yield _ACCEPTED, replace(state, endpoint=f"{own}:{port}", destination=own, port=int(port))
                return
            if rule.target == "MASQUERADE":
                yield _ACCEPTED, replace(state, masquerade=True)
                return
            if rule.target == "MARK":
                state = replace(state, mark=_marked(state.mark, rule.argument))
            elif rule.target:
                for verdict, after in self._chain(table, rule.target, 0, state):
                    if verdict:
                        yield verdict, after
                    else:
                        yield from self._chain(table, chain, index + 1, after)
                return
        yield _FALL_THROUGH, state

    def _match(self, rule: Rule, state: State) -> _Maybe:
        answer = _Maybe.YES
        for match in rule.matches:
            one = match(state, self._node)
            if one is _Maybe.NO:
                return one
            if one is _Maybe.PERHAPS:
                answer = one
        return answer


def _marked(mark: int, argument: str) -> int:
    option, _, value = argument.partition(" ")
    number, _, mask = value.partition("/")
    bits = int(number, 0)
    if option == "--or-mark":
        return mark | bits
    if option == "--xor-mark":
        return mark ^ bits
    cleared = mark & ~int(mask or "0xffffffff", 0)
    return cleared ^ bits if option == "--set-xmark" else cleared | bits


def trace(rules: Ruleset, packet: Packet, node: Node) -> Fate:
    """Return the fate of a packet that meets this node's rules.

    Raises:
        ValueError: the ways out disagree in kind, for example one endpoint accepts and another way drops.
    """
    walker = Walker(rules, node)
    source = IPv4Address(packet.source)
    state = State(packet, source, IPv4Address(packet.destination), packet.port)
    return fate_of(packet, set(_ends(walker, state, node)), walker.met)


def fate_of(packet: Packet, ends: Collection[tuple[Verdict, str, bool]], met: Iterable[str]) -> Fate:
    """Return the fate that sums up every way out: verdict, endpoint ('' unless translated), masqueraded or not.

    Raises:
        ValueError: the ways out disagree in kind.
    """
    verdicts = {end[0] for end in ends}
    if len(verdicts) > 1:
        raise ValueError(f"{packet} may end as {', '.join(sorted(v.value for v in verdicts))}")
    endpoints = tuple(sorted({end[1] for end in ends} - {""}))
    return Fate(verdicts.pop(), endpoints, any(end[2] for end in ends), tuple(met))


def _ends(walker: Walker, state: State, node: Node) -> Iterator[tuple[Verdict, str, bool]]:
    from_node = node.owns(state.source)
    for _, routed in walker.hook("nat", "OUTPUT" if from_node else "PREROUTING", state):
        to_node = node.owns(routed.destination)
        hooks = [hook for hook, passed in (("OUTPUT", from_node), ("INPUT", to_node)) if passed] or ["FORWARD"]
        yield from _filtered(walker, hooks, routed, accepted=False, leaves=not to_node)


def _filtered(
    walker: Walker, hooks: Collection[str], state: State, *, accepted: bool, leaves: bool
) -> Iterator[tuple[Verdict, str, bool]]:
    if hooks:
        first, *rest = hooks
        for verdict, after in walker.hook("filter", first, state):
            if verdict in (_DROPPED, _REJECTED):
                yield Verdict(verdict), "", False
            else:
                yield from _filtered(walker, rest, after, accepted=accepted or bool(verdict), leaves=leaves)
        return
    ways = walker.hook("nat", "POSTROUTING", state) if leaves else iter([(_FALL_THROUGH, state)])
    for _, sent in ways:
        if sent.endpoint:
            yield Verdict.ENDPOINT, sent.endpoint, sent.masquerade
        else:
            yield (Verdict.ACCEPT if accepted else Verdict.NONE), "", sent.masquerade
