"""Walks a packet through kube-proxy's nftables table, rendered or listed, and says where it comes out.

::

    from outside or a pod:  prerouting ─┬─ input                    (to the node itself)
                                        └─ forward ─ postrouting
    from the node:          output ─ postrouting, or input

On each hook the base chains are met in the order of their priorities. The packet is the first of its connection. What
happens by chance (or because a client was recorded) is followed each way, so the fate names every endpoint the packet
could reach.

Source: kubernetes pkg/proxy/nftables/helpers_test.go, nftablesTracer (v1.36).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane.nft_table import Element, NftTable, as_listed
from testbed.dataplane.trace import Fate, Node, Packet, Verdict, fate_of


@dataclass(frozen=True, slots=True)
class _State:
    """One possible packet at one moment."""

    packet: Packet
    source: IPv4Address
    destination: IPv4Address
    port: int
    mark: int = 0
    endpoint: str = ""
    masquerade: bool = False

    def field(self, name: str) -> str:
        match name:
            case "ip saddr":
                return str(self.source)
            case "ip daddr":
                return str(self.destination)
            case "meta l4proto":
                return self.packet.protocol
            case "th dport":
                return str(self.port)
        raise ValueError(f"no idea what the field {name!r} is")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What ends the walk of a rule: a verdict of netfilter, or another chain to go on in."""

    kind: str  # accept, drop, reject, return, jump, goto
    chain: str = ""


_ACCEPT = _Verdict("accept")
#: One way on: what the packet is now, and a verdict; None goes on to the next statement.
_Way = tuple[_State, _Verdict | None]
_Statement = Callable[[_State, "_Walker"], Iterator[_Way]]


def _verdict(text: str) -> _Verdict:
    kind, _, chain = text.strip().partition(" ")
    if kind not in ("accept", "drop", "reject", "return", "jump", "goto"):
        raise ValueError(f"no idea what the verdict {text!r} is")
    return _Verdict(kind, chain)


def _when(holds: Callable[[_State, _Walker], bool]) -> _Statement:
    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        if holds(state, walker):
            yield state, None

    return statement


def _become(change: Callable[[_State], _State], verdict: _Verdict | None = None) -> _Statement:
    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        yield change(state), verdict

    return statement


def _verdict_statement(match: re.Match[str]) -> _Statement:
    verdict = _verdict(match[0])
    return _become(lambda state: state, verdict)


def _address(match: re.Match[str]) -> _Statement:
    which, negated, literal = match.groups()
    networks = [IPv4Network(part.strip()) for part in literal.strip("{}").split(",")]

    def holds(state: _State, walker: _Walker) -> bool:
        address = state.source if which == "saddr" else state.destination
        return any(address in network for network in networks) != bool(negated)

    return _when(holds)


def _in_set(match: re.Match[str]) -> _Statement:
    fields, set_name = match[1].split(" . "), match[2]

    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        if walker.is_filled_by_packets(set_name):
            yield state, None  # a client that was recorded
        elif walker.find(set_name, fields, state) is not None:
            yield state, None

    return statement


def _in_verdict_map(match: re.Match[str]) -> _Statement:
    fields, map_name = match[1].split(" . "), match[2]

    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        element = walker.find(map_name, fields, state)
        if element is not None:
            walker.chosen(element)
            yield state, _verdict(element.value)

    return statement


def _local(match: re.Match[str]) -> _Statement:
    which = match[1]
    return _when(lambda state, walker: walker.node.owns(state.source if which == "saddr" else state.destination))


def _interface(match: re.Match[str]) -> _Statement:
    negated, pattern = match.groups()

    def holds(state: _State, walker: _Walker) -> bool:
        name = state.packet.interface
        return (name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern) != bool(negated)

    return _when(holds)


def _mark_is(match: re.Match[str]) -> _Statement:
    mask, operator, value = int(match[1], 0), match[2], int(match[3], 0)
    return _when(lambda state, walker: (state.mark & mask == value) == (operator == "=="))


def _set_mark(match: re.Match[str]) -> _Statement:
    operator, bits = match[1], int(match[2], 0)
    if operator == "|":
        return _become(lambda state: replace(state, mark=state.mark | bits))
    return _become(lambda state: replace(state, mark=state.mark ^ bits))


def _protocol(match: re.Match[str]) -> _Statement:
    protocol = match[1]
    return _when(lambda state, walker: state.packet.protocol == protocol)


def _port(match: re.Match[str]) -> _Statement:
    protocol, port = match[1], int(match[2])
    return _when(lambda state, walker: (state.packet.protocol, state.port) == (protocol, port))


def _translated(state: _State, address: str, port: str) -> _State:
    return replace(state, endpoint=f"{address}:{port}", destination=IPv4Address(address), port=int(port))


def _dnat(match: re.Match[str]) -> _Statement:
    address, port = match.groups()
    return _become(lambda state: _translated(state, address, port), _ACCEPT)


def _choices(text: str) -> list[str]:
    """Return the right sides of ``0 : a, 1 : b``."""
    return [part.partition(" : ")[2].strip() for part in text.split(",")]


def _dnat_to_one_of(match: re.Match[str]) -> _Statement:
    targets = [choice.split(" . ") for choice in _choices(match[1])]

    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        for address, port in targets:
            yield _translated(state, address, port), _ACCEPT

    return statement


def _one_of(match: re.Match[str]) -> _Statement:
    verdicts = [_verdict(choice) for choice in _choices(match[1])]

    def statement(state: _State, walker: _Walker) -> Iterator[_Way]:
        for verdict in verdicts:
            yield state, verdict

    return statement


def _masquerade(match: re.Match[str]) -> _Statement:
    return _become(lambda state: replace(state, masquerade=True), _ACCEPT)


def _always(match: re.Match[str]) -> _Statement:
    return _become(lambda state: state)


_FIELDS = r"((?:(?:ip [sd]addr|meta l4proto|th dport)(?: \. )?)+)"

#: Statements as nft lists them, in the order in which they are tried: those with more words first.
_STATEMENTS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], _Statement]], ...] = tuple(
    (re.compile(pattern), build)
    for pattern, build in (
        (r'comment "[^"]*"', _always),
        (r"ct state new", _always),
        (r"ct status dnat", lambda match: _when(lambda state, walker: bool(state.endpoint))),
        (_FIELDS + r" vmap @(\S+)", _in_verdict_map),
        (_FIELDS + r" @(\S+)", _in_set),
        (r"ip ([sd]addr) (!= )?(\{[^}]*\}|\d[\d./]*)", _address),
        (r"fib ([sd]addr) type local", _local),
        (r'iifname (!= )?"([^"]+)"', _interface),
        (r"meta mark set meta mark ([|^]) (0x[0-9a-f]+)", _set_mark),
        (r"meta mark & (0x[0-9a-f]+) (==|!=) (0x[0-9a-f]+)", _mark_is),
        (r"meta l4proto (tcp|udp|sctp)", _protocol),
        (r"(tcp|udp|sctp) dport (\d+)", _port),
        (r"dnat ip to numgen random mod \d+ map \{([^}]*)\}", _dnat_to_one_of),
        (r"dnat to ([\d.]+):(\d+)", _dnat),
        (r"numgen random mod \d+ vmap \{([^}]*)\}", _one_of),
        (r"update @\S+ \{ ip saddr \}", _always),
        (r"masquerade(?: fully-random)?", _masquerade),
        (r"(?:jump|goto) \S+|accept|drop|reject|return", _verdict_statement),
    )
)


def _parse_rule(rule: str) -> tuple[_Statement, ...]:
    statements: list[_Statement] = []
    rest = as_listed(rule).strip()
    while rest:
        for pattern, build in _STATEMENTS:
            match = pattern.match(rest)
            if match and rest[match.end() : match.end() + 1] in ("", " "):
                statements.append(build(match))
                rest = rest[match.end() :].lstrip()
                break
        else:
            raise ValueError(f"no idea what {rest!r} means in {rule!r}")
    return tuple(statements)


class _Walker:
    """Follows one packet through one table and notes the rules and elements it meets."""

    def __init__(self, table: NftTable, node: Node) -> None:
        self._table = table
        self.node = node
        self.met: dict[str, None] = {}
        self._chosen = ""
        self._parsed: dict[str, tuple[_Statement, ...]] = {}
        hooked = [(name, chain.hook) for name, chain in table.chains.items() if chain.hook is not None]
        self._base = sorted((hook.priority, name, hook.hook) for name, hook in hooked)

    def is_filled_by_packets(self, set_name: str) -> bool:
        spec = self._table.sets.get(set_name)
        return spec is not None and spec.timeout_s > 0

    def find(self, set_name: str, fields: Sequence[str], state: _State) -> Element | None:
        key = " . ".join(state.field(name) for name in fields)
        return self._table.elements.get((set_name, key))

    def chosen(self, element: Element) -> None:
        """Note that this element of a map said what comes next."""
        self._chosen = f"@{element.set_name}: {element.written}"

    def hook(self, hook: str, state: _State) -> Iterator[tuple[str, _State]]:
        """Yield each way out of a hook: accept, drop or reject, and the packet then."""
        yield from self._base_chains([name for _, name, at in self._base if at == hook], state)

    def _base_chains(self, chains: Sequence[str], state: _State) -> Iterator[tuple[str, _State]]:
        if not chains:
            yield "accept", state
            return
        for verdict, after in self._chain(chains[0], state):
            if verdict in ("drop", "reject"):
                yield verdict, after
            else:  # accepting is a matter of this base chain: the next one is met all the same
                yield from self._base_chains(chains[1:], after)

    def _chain(self, name: str, state: _State, start: int = 0) -> Iterator[tuple[str, _State]]:
        """Yield each way out of a chain; 'return' is its end."""
        chain = self._table.chains.get(name)
        if chain is None:
            raise ValueError(f"a rule leads to the chain {name}, which is not there")
        for index in range(start, len(chain.rules)):
            rule = chain.rules[index]
            self._chosen = ""
            ways = list(self._rule(rule, state))
            if not ways:
                continue
            self._note(f"{name}: {rule}")
            if self._depends_on_clients(rule):
                yield from self._chain(name, state, index + 1)  # the other way: the client was not recorded
            goes_on = []
            for after, verdict in ways:
                if verdict is None:
                    goes_on.append(after)
                elif verdict.kind == "return":
                    yield "return", after
                elif verdict.chain:
                    yield from self._branch(verdict, after, name, index)
                else:
                    yield verdict.kind, after
            if not goes_on:
                return
            state = goes_on[0]  # statements that change nothing but the packet have one way on
        yield "return", state

    def _note(self, rule: str) -> None:
        self.met.setdefault(rule)
        if self._chosen:
            self.met.setdefault(self._chosen)

    def _branch(self, verdict: _Verdict, state: _State, name: str, index: int) -> Iterator[tuple[str, _State]]:
        for end, after in self._chain(verdict.chain, state):
            if end == "return" and verdict.kind == "jump":
                yield from self._chain(name, after, index + 1)
            else:
                yield end, after

    def _depends_on_clients(self, rule: str) -> bool:
        return any(self.is_filled_by_packets(name) for name in re.findall(r"(?<!update )@(\S+)", rule))

    def _rule(self, rule: str, state: _State) -> Iterator[_Way]:
        if rule not in self._parsed:
            self._parsed[rule] = _parse_rule(rule)
        yield from self._statements(self._parsed[rule], state)

    def _statements(self, statements: Sequence[_Statement], state: _State) -> Iterator[_Way]:
        if not statements:
            yield state, None
            return
        for after, verdict in statements[0](state, self):
            if verdict is None:
                yield from self._statements(statements[1:], after)
            else:
                yield after, verdict


def trace_nftables(table: NftTable, packet: Packet, node: Node) -> Fate:
    """Return the fate of a packet that meets this table.

    Raises:
        ValueError: the ways out disagree in kind, or a rule is not one of kube-proxy's.
    """
    walker = _Walker(table, node)
    state = _State(packet, IPv4Address(packet.source), IPv4Address(packet.destination), packet.port)
    return fate_of(packet, set(_ends(walker, state)), walker.met)


def _ends(walker: _Walker, state: _State) -> Iterator[tuple[Verdict, str, bool]]:
    from_node = walker.node.owns(state.source)
    for verdict, routed in walker.hook("output" if from_node else "prerouting", state):
        if verdict != "accept":
            yield _refused(verdict)
        elif walker.node.owns(routed.destination):
            yield from _passes(walker, ["input"], routed)
        else:
            yield from _passes(walker, ["postrouting"] if from_node else ["forward", "postrouting"], routed)


def _passes(walker: _Walker, hooks: Sequence[str], state: _State) -> Iterator[tuple[Verdict, str, bool]]:
    if not hooks:
        yield (Verdict.ENDPOINT if state.endpoint else Verdict.NONE), state.endpoint, state.masquerade
        return
    for verdict, after in walker.hook(hooks[0], state):
        if verdict == "accept":
            yield from _passes(walker, hooks[1:], after)
        else:
            yield _refused(verdict)


def _refused(verdict: str) -> tuple[Verdict, str, bool]:
    return (Verdict.DROP if verdict == "drop" else Verdict.REJECT), "", False
