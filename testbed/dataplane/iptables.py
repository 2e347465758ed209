"""What kube-proxy writes in iptables mode: pure text for ``iptables-restore --noflush --counters``.

A node's rules are the fixed ones, the shared chains (dispatch and refusals, a line or two for each service port) and the
chains of each service port (`testbed.dataplane.iptables_rules`).

::

    full payload      all that differs from what `iptables-save` printed: at the start that is everything
    partial payload   what differs from what the last accepted payload left: a chain that changed is written whole,
                      a line of a shared chain is inserted or deleted

Upstream writes all shared chains again in every partial sync. We do not, and so a sync costs what changed; changes from
outside are found by comparing everything (`IptablesRenderer.find_damage`) instead of by canary chains alone.
docs/adr/0005-iptables-restore.md has the measurements.

Source: kubernetes pkg/proxy/iptables/proxier.go (v1.30).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from testbed.dataplane import chains
from testbed.dataplane.iptables_rules import (
    IptablesSettings,
    ServiceRules,
    make_settings,
    needs_route_localnet,
    node_port_addresses,
    render_service,
    split_evenly,
)
from testbed.dataplane.state import ProxyState
from testbed.dataplane.topology import choose_endpoints
from testbed.model.service import Endpoint, ServicePort, ServicePortName

__all__ = [
    "CANARY_TABLES", "JUMPS", "LARGE_CLUSTER_ENDPOINTS", "Installed", "IptablesRenderer", "IptablesSettings", "Jump",
    "RestorePayload", "make_settings", "needs_route_localnet", "node_port_addresses",
    "parse_installed", "render_cleanup", "render_full",
    "render_service", "saved_form", "split_evenly",
]  # fmt: skip

#: Above this many endpoints over all service ports, comments are left out where there are most rules.
LARGE_CLUSTER_ENDPOINTS = 1000
#: A shared chain that loses more lines than this at once is written anew: iptables looks for each line in the whole chain.
_MOST_DELETIONS = 16
_LAST_COMMENT = '"kubernetes service nodeports; NOTE: this must be the last rule in this chain"'


@dataclass(frozen=True, slots=True)
class Jump:
    """A rule of a built-in chain that leads into ours; ``rule`` is what follows the chain's name, as it is saved."""

    table: str
    chain: str
    rule: str

    @property
    def saved(self) -> str:
        return f"-A {self.chain} {self.rule}"


def _jump(table: str, chain: str, target: str, comment: str, *, new: bool = False) -> Jump:
    match = "-m conntrack --ctstate NEW " if new else ""
    return Jump(table, chain, f'{match}-m comment --comment "{comment}" -j {target}')


_VISIBLE, _PORTALS = "kubernetes externally-visible service portals", "kubernetes service portals"
_BALANCER = "kubernetes load balancer firewall"

#: In the order in which they are inserted, each on top of its chain: the last one ends up first.
JUMPS: tuple[Jump, ...] = (
    _jump("filter", "INPUT", chains.EXTERNAL_SERVICES, _VISIBLE, new=True),
    _jump("filter", "FORWARD", chains.EXTERNAL_SERVICES, _VISIBLE, new=True),
    _jump("filter", "INPUT", chains.NODE_PORTS, "kubernetes health check service ports"),
    _jump("filter", "FORWARD", chains.SERVICES, _PORTALS, new=True),
    _jump("filter", "OUTPUT", chains.SERVICES, _PORTALS, new=True),
    _jump("filter", "FORWARD", chains.FORWARD, "kubernetes forwarding rules"),
    _jump("filter", "INPUT", chains.PROXY_FIREWALL, _BALANCER, new=True),
    _jump("filter", "OUTPUT", chains.PROXY_FIREWALL, _BALANCER, new=True),
    _jump("filter", "FORWARD", chains.PROXY_FIREWALL, _BALANCER, new=True),
    # kubelet ensures the same two, which is why they carry no comment
    Jump("filter", "INPUT", f"-j {chains.FIREWALL}"),
    Jump("filter", "OUTPUT", f"-j {chains.FIREWALL}"),
    _jump("nat", "OUTPUT", chains.SERVICES, _PORTALS),
    _jump("nat", "PREROUTING", chains.SERVICES, _PORTALS),
    _jump("nat", "POSTROUTING", chains.POSTROUTING, "kubernetes postrouting rules"),
)

CANARY_TABLES = ("mangle", "nat", "filter")

_FILTER_CHAINS = (
    chains.SERVICES, chains.EXTERNAL_SERVICES, chains.FORWARD, chains.NODE_PORTS, chains.PROXY_FIREWALL, chains.FIREWALL,
)  # fmt: skip
_NAT_CHAINS = (chains.SERVICES, chains.NODE_PORTS, chains.POSTROUTING, chains.MARK_MASQ)


_Place = tuple[str, str]  # table and chain


def _declare(chain: str) -> str:
    return f":{chain} - [0:0]"  # declaring a chain empties it


# --- what is there ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """What of ours a node has, as it is saved: chains with their rules, our jumps, and the tables with a canary."""

    chains: Mapping[_Place, tuple[str, ...]] = field(default_factory=dict)
    jumps: frozenset[tuple[str, str]] = frozenset()  # (table, saved line)
    canaries: frozenset[str] = frozenset()

    @property
    def service_chains(self) -> list[str]:
        return [chain for table, chain in self.chains if table == "nat" and chain.startswith(chains.SERVICE_PREFIXES)]


NOTHING_INSTALLED = Installed()
_SHARED: Mapping[str, tuple[str, ...]] = {"filter": _FILTER_CHAINS, "nat": _NAT_CHAINS}


def parse_installed(saved: str) -> Installed:
    """Read the output of ``iptables-save`` (all tables).

    Sample::

        *nat
        :KUBE-SVC-4SW47YFZTEDKD3PK - [0:0]
        -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
        COMMIT
    """
    found: dict[_Place, list[str]] = {}
    jumps: set[tuple[str, str]] = set()
    canaries: set[str] = set()
    wanted = {(jump.table, jump.saved) for jump in JUMPS}
    table = ""
    for line in saved.splitlines():
        if line.startswith("-A KUBE-"):
            place = (table, line.split(" ", 2)[1])
            if place in found:
                found[place].append(line)
        elif line.startswith(":KUBE-"):
            chain = line[1:].split(" ", 1)[0]
            if chain == chains.CANARY:
                canaries.add(table)
            elif chain in _SHARED.get(table, ()) or (table == "nat" and chain.startswith(chains.SERVICE_PREFIXES)):
                found[table, chain] = []
        elif line.startswith("-A "):
            if (table, line.rstrip()) in wanted:
                jumps.add((table, line.rstrip()))
        elif line.startswith("*"):
            table = line[1:].strip()
    return Installed({place: tuple(rules) for place, rules in found.items()}, frozenset(jumps), frozenset(canaries))


_WORD = re.compile(r'"[^"]*"|\S+')
_PLAIN = re.compile(r"[\w-]+", re.ASCII)


def saved_form(line: str) -> str:
    """Return a rule of ours as ``iptables-save`` prints it (1.8.9, both backends).

    Addresses, interface and protocol come first; marks, chances and refusals are spelled out; comments are quoted unless
    they are one plain word.
    """
    words = _WORD.findall(line)
    first: dict[str, str] = {}
    rest: list[str] = []
    index, negation = 2, ""
    while index < len(words):
        word = words[index]
        if word == "!":
            negation, index = "! ", index + 1
            continue
        value = words[index + 1] if index + 1 < len(words) else ""
        taken = 2
        if word in ("-s", "-d"):
            if value != "0.0.0.0/0":
                first[word] = f"{negation}{word} {value if '/' in value else f'{value}/32'}"
        elif word in ("-i", "-p"):
            first[word] = f"{negation}{word} {value}"
        elif word == "--comment":
            text = value.strip('"').replace("'", "\\'")
            rest.append(f"{word} {text}" if _PLAIN.fullmatch(text) else f'{word} "{text}"')
        elif word == "--mark":
            rest.append(f"{negation}{word} " + "/".join(hex(int(part, 16)) for part in value.split("/")))
        elif word in ("--or-mark", "--xor-mark"):
            mark = hex(int(value, 16))
            rest.append(f"--set-xmark {mark}/{mark if word == '--or-mark' else '0x0'}")
        elif word == "--probability":
            rest.append(f"{word} {round(float(value) * 0x80000000) / 0x80000000:.11f}")
        elif (word, value) == ("-j", "REJECT"):
            rest.append("-j REJECT --reject-with icmp-port-unreachable")
        elif (word, value) == ("-m", "recent"):
            # --name NAME --set, or --name NAME --rcheck --seconds N --reap
            end = words.index("-m", index + 2) if "-m" in words[index + 2 :] else words.index("-j", index)
            options = " ".join(words[index + 4 : end])
            rest.append(f"-m recent {options} --name {words[index + 3]} --mask 255.255.255.255 --rsource")
            taken = end - index
        elif word in ("-m", "-j", "--dport", "--to-destination", "--ctstate", "--dst-type", "--src-type", "--mode"):
            rest.append(f"{negation}{word} {value}")
        else:
            rest.append(f"{negation}{word}")
            taken = 1
        negation = ""
        index += taken
    ordered = [first[word] for word in ("-s", "-d", "-i", "-p") if word in first]
    return " ".join([*words[:2], *ordered, *rest])


# --- what is wanted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RestorePayload:
    """Text for one ``iptables-restore --noflush --counters``, and what holds once it is accepted; '' changes nothing."""

    text: str
    rules: Mapping[str, int]  # table -> number of rules that exist once it is accepted, ours only
    written: Mapping[str, int]  # table -> number of rules in the text
    no_local_endpoints: tuple[int, int]  # service ports without local endpoints: internal, external policy
    #: What the service ports that are written will have; None: nothing.
    after: Mapping[ServicePortName, ServiceRules | None] = field(default_factory=dict)
    #: Unused service chains that the text leaves to a later payload.
    kept_stale: frozenset[str] = frozenset()

    @cached_property
    def chains(self) -> frozenset[str]:
        """Chains of the service ports that are written."""
        return frozenset(chain for rules in self.after.values() if rules is not None for chain in rules.chains)

    def owners_of(self, numbers: Iterable[int]) -> set[ServicePortName]:
        """Return the service ports that these lines of the text (from 1) are about; none for lines of nobody."""
        lines = self.text.splitlines()
        wanted = {lines[n - 1].split(" ", 1)[-1] for n in numbers if n <= len(lines) and lines[n - 1].startswith("-")}
        return {
            name
            for name, rules in self.after.items()
            if rules is not None and any(line[3:] in wanted for line in _lines_of(rules))
        }


def _lines_of(rules: ServiceRules) -> Iterator[str]:
    yield from rules.filter_rules
    yield from rules.nat_dispatch
    for own in rules.chains.values():
        yield from own


class _Block:
    """One transaction on one table, being written."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.declared: list[str] = []
        self.rules: list[str] = []
        self.deleted: list[str] = []

    def lines(self) -> list[str]:
        if not (self.declared or self.rules or self.deleted):
            return []
        # A deleted chain is emptied by its declaration, so that it refers to nothing.
        heads = [*map(_declare, self.declared), *map(_declare, self.deleted)]
        return [f"*{self.table}", *heads, *self.rules, *(f"-X {chain}" for chain in self.deleted), "COMMIT"]


@dataclass(frozen=True, slots=True)
class _Known:
    """The rules of a service port, and what they were rendered from."""

    service: ServicePort
    endpoints: tuple[Endpoint, ...]
    rules: ServiceRules


class IptablesRenderer:
    """Renders payloads. It remembers the rules that are wanted, and those that accepted payloads have put in place.

    Use: `update` with a state, `full` or `partial` for a payload, and `accept` when the kernel has taken it.
    """

    def __init__(self, settings: IptablesSettings) -> None:
        self.settings = settings
        self._known: dict[ServicePortName, _Known] = {}
        self._installed: dict[ServicePortName, ServiceRules] = {}
        self._pending: set[ServicePortName] = set()
        self._stale: set[str] = set()  # chains that are to be deleted some time
        self._endpoints = 0
        self._prints: dict[_Place, int] = {}  # hashes of chains in their saved form
        self._spelled: dict[_Place, int] = {}  # of chains that this machine's tools print in another way
        self._rules = Counter({"filter": len(_flat(self._fixed("filter"))), "nat": len(_flat(self._fixed("nat")))})
        self._no_local = [0, 0]

    @property
    def is_large(self) -> bool:
        return self._endpoints > LARGE_CLUSTER_ENDPOINTS

    def update(self, state: ProxyState, changed: Collection[ServicePortName] | None = None) -> None:
        """Take in a state; ``changed`` names what differs from the one before, None: anything may."""
        names: Collection[ServicePortName] = {*state.services, *self._known} if changed is None else changed
        for name in names:
            known = self._known.get(name)
            before = len(known.endpoints) if known else 0
            after = len(state.endpoints.get(name, ())) if name in state.services else 0
            self._endpoints += after - before
        large, settings = self.is_large, self.settings
        for name in names:
            known, service = self._known.get(name), state.services.get(name)
            if service is None:
                self._know(name, None)
                continue
            endpoints = state.endpoints.get(name, ())
            if known and known.service is service and known.endpoints is endpoints:
                continue
            choice = choose_endpoints(service, endpoints, settings.node_labels, settings.node, settings.hints)
            self._know(name, _Known(service, endpoints, render_service(service, choice, settings, large=large)))

    def render_anew(self, names: Collection[ServicePortName], *, large: bool) -> None:
        """Have these service ports' rules as they are in a large cluster, or in a small one.

        Rules are not written again because a cluster has become large, or small again: those of service ports that have not
        changed since then stay as they were (upstream's partial syncs do the same).
        """
        for name in names:
            if known := self._known.get(name):
                service, endpoints, settings = known.service, known.endpoints, self.settings
                choice = choose_endpoints(service, endpoints, settings.node_labels, settings.node, settings.hints)
                self._know(name, _Known(service, endpoints, render_service(service, choice, settings, large=large)))

    def _know(self, name: ServicePortName, new: _Known | None) -> None:
        old = self._known.pop(name, None)
        for known, sign in ((old, -1), (new, 1)):
            if known is not None:
                rules = known.rules
                self._rules["filter"] += sign * len(rules.filter_rules)
                self._rules["nat"] += sign * (len(rules.nat_dispatch) + sum(map(len, rules.chains.values())))
                for index, without in enumerate(rules.no_local_endpoints):
                    self._no_local[index] += sign * without
        if new is not None:
            self._known[name] = new
        self._pending.add(name)

    @property
    def pending(self) -> frozenset[ServicePortName]:
        """Service ports whose rules are not in place."""
        return frozenset(self._pending)

    # -- payloads --------------------------------------------------------------------------------------------------

    def full(
        self, installed: Installed, *, per_transaction: int = 0, without: Collection[ServicePortName] = ()
    ) -> RestorePayload:
        """Return all that must change on a node that has ``installed``: jumps and canaries too.

        Args:
            installed: What is there now.
            per_transaction: If not 0, at most this many service ports' chains in one transaction, where upstream puts all
                of them in one: iptables-nft takes quadratic time for those. Then come the shared chains, in one
                transaction, and then the deletion of at most so many unused chains in one.
            without: Service ports to leave out, unless they are in place already.
        """
        wanted = {name: self._known[name].rules for name in sorted(self._known)}
        skipped = [name for name in without if name in wanted and not self._is_in_place(wanted[name], installed)]
        for name in skipped:
            del wanted[name]
        chunks: list[_Block] = [_Block("nat")]
        taken = 0
        there = frozenset(installed.service_chains)
        for rules in wanted.values():
            differing = rules.chains.items()
            if not there.isdisjoint(rules.chains):
                differing = {
                    chain: own
                    for chain, own in rules.chains.items()
                    if not self._is_equal("nat", chain, own, installed)
                }.items()
            if not differing:
                continue
            if per_transaction and taken == per_transaction:
                chunks.append(_Block("nat"))
                taken = 0
            taken += 1
            chunks[-1].declared += [chain for chain, _ in differing]
            for _, own in differing:
                chunks[-1].rules += own
        tables = {table: _Block(table) for table in ("mangle", "filter", "nat")}
        for table in ("filter", "nat"):
            self._add_shared(tables[table], wanted, installed)
        if len(chunks) > 1:
            if ("nat", chains.MARK_MASQ) not in installed.chains:
                chunks[0].declared.insert(0, chains.MARK_MASQ)  # a rule needs the chain that it leads to
        else:
            tables["nat"].declared += chunks[0].declared
            tables["nat"].rules += chunks[0].rules
            chunks = []
        unused = (
            sorted(there.difference(*(rules.chains for rules in wanted.values())), key=_leading_first) if there else []
        )
        last = []
        if per_transaction and len(unused) > per_transaction:
            for start in range(0, len(unused), per_transaction):
                last.append(_Block("nat"))
                last[-1].deleted = unused[start : start + per_transaction]
        else:
            tables["nat"].deleted = unused
        for table in CANARY_TABLES:
            if table not in installed.canaries:
                tables[table].declared.append(chains.CANARY)
        for jump in JUMPS:  # after the rules they lead to, and each on top of its chain
            if (jump.table, jump.saved) not in installed.jumps:
                tables[jump.table].rules.append(f"-I {jump.chain} {jump.rule}")
        after: dict[ServicePortName, ServiceRules | None] = dict.fromkeys((*self._installed, *skipped))
        blocks = [tables["mangle"], *chunks, tables["filter"], tables["nat"], *last]
        return self._payload(blocks, {**after, **wanted})

    def partial(self, names: Collection[ServicePortName] | None = None, *, clean_stale: bool = True) -> RestorePayload:
        """Return what must change for these service ports, given that all accepted payloads are in place.

        Args:
            names: By default every service port whose rules are not in place.
            clean_stale: Delete chains that are no longer used; if not, a later payload does.
        """
        tables = {"filter": _Block("filter"), "nat": _Block("nat")}
        nat = tables["nat"]
        after: dict[ServicePortName, ServiceRules | None] = {}
        stale = set(self._stale)
        lost: dict[str, list[str]] = {"filter": [], "nat": []}
        gained: dict[str, list[str]] = {"filter": [], "nat": []}
        for name in sorted(self._pending if names is None else names):
            old, known = self._installed.get(name), self._known.get(name)
            new = known.rules if known else None
            if old is new:
                continue
            after[name] = new
            old_chains, new_chains = (old.chains if old else {}), (new.chains if new else {})
            for chain, own in new_chains.items():
                if old_chains.get(chain) != own:
                    nat.declared.append(chain)
                    nat.rules += own
            stale |= old_chains.keys() - new_chains.keys()
            stale -= new_chains.keys()
            for table, old_lines, new_lines in (
                ("filter", old.filter_rules if old else (), new.filter_rules if new else ()),
                ("nat", old.nat_dispatch if old else (), new.nat_dispatch if new else ()),
            ):
                if old_lines != new_lines:
                    lost[table] += (Counter(old_lines) - Counter(new_lines)).elements()
                    gained[table] += (Counter(new_lines) - Counter(old_lines)).elements()
        for table, block in tables.items():
            self._change_shared(block, lost[table], gained[table], after)
        nat.deleted = sorted(stale) if clean_stale else []
        return self._payload(list(tables.values()), after, kept_stale=frozenset() if clean_stale else frozenset(stale))

    def accept(self, payload: RestorePayload) -> None:
        """Take note that a payload of this renderer is in the kernel now."""
        for name, rules in payload.after.items():
            known = self._known.get(name)
            (self._pending.discard if (known.rules if known else None) is rules else self._pending.add)(name)
            old = self._installed.pop(name, None)
            if rules is not None:
                self._installed[name] = rules
            if old is not rules:
                for chain in {*(old.chains if old else ()), *(rules.chains if rules else ())}:
                    self._prints.pop(("nat", chain), None)
                    self._spelled.pop(("nat", chain), None)
        self._stale = set(payload.kept_stale)

    def _payload(
        self,
        blocks: Sequence[_Block],
        after: Mapping[ServicePortName, ServiceRules | None],
        kept_stale: frozenset[str] = frozenset(),
    ) -> RestorePayload:
        lines = [line for block in blocks for line in block.lines()]
        written = {table: sum(len(b.rules) for b in blocks if b.table == table) for table in ("filter", "nat")}
        return RestorePayload(
            text="\n".join(lines) + "\n" if lines else "",
            rules=dict(self._rules),
            written=written,
            no_local_endpoints=(self._no_local[0], self._no_local[1]),
            after=after,
            kept_stale=kept_stale,
        )

    # -- shared chains ---------------------------------------------------------------------------------------------

    def _add_shared(self, block: _Block, wanted: Mapping[ServicePortName, ServiceRules], installed: Installed) -> None:
        """Write every shared chain that is not as it should be."""
        for chain, lines in self._shared(block.table, wanted).items():
            if not self._is_equal(block.table, chain, lines, installed):
                block.declared.append(chain)
                block.rules += lines

    def _change_shared(
        self,
        block: _Block,
        lost: Iterable[str],
        gained: Iterable[str],
        after: Mapping[ServicePortName, ServiceRules | None],
    ) -> None:
        """Take single lines out of shared chains and put others on top of them; their order is of no meaning."""
        per_chain: dict[str, tuple[list[str], list[str]]] = {}
        for index, lines in enumerate((lost, gained)):
            for line in lines:
                per_chain.setdefault(line.split(" ", 2)[1], ([], []))[index].append(line)
        whole = {chain for chain, (out, _) in per_chain.items() if len(out) > _MOST_DELETIONS}
        for chain, (out, into) in per_chain.items():
            if chain not in whole:
                block.rules += [f"-D{line[2:]}" for line in out]
                block.rules += [f"-I{line[2:]}" for line in into]
        if whole:
            there = {name: rules for name, rules in {**self._installed, **after}.items() if rules is not None}
            shared = self._shared(block.table, {name: there[name] for name in sorted(there)})
            for chain in sorted(whole):
                block.declared.append(chain)
                block.rules += shared[chain]

    def _shared(self, table: str, wanted: Mapping[ServicePortName, ServiceRules]) -> dict[str, list[str]]:
        """Return the shared chains of a table: the lines of all service ports, then the fixed ones."""
        found: dict[str, list[str]] = {chain: [] for chain in _SHARED[table]}
        for rules in wanted.values():
            for line in rules.filter_rules if table == "filter" else rules.nat_dispatch:
                found[line.split(" ", 2)[1]].append(line)
        for chain, lines in self._fixed(table).items():
            found[chain] += lines
        return found

    def _fixed(self, table: str) -> dict[str, list[str]]:
        return self._fixed_filter() if table == "filter" else self._fixed_nat()

    def _fixed_filter(self) -> dict[str, list[str]]:
        mark = self.settings.mark
        firewall, forward = [], []
        if self.settings.localhost_node_ports:
            # route_localnet lets packets from outside reach 127.0.0.1; this takes that back (CVE-2020-8558).
            firewall.append(
                f'-A {chains.FIREWALL} -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 '
                "! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
            )
        if self.settings.drops_invalid:
            # A packet conntrack cannot place would leave untranslated, with a pod's address (kubernetes issue 74839).
            forward.append(f"-A {chains.FORWARD} -m conntrack --ctstate INVALID -j DROP")
        forward.append(
            f'-A {chains.FORWARD} -m comment --comment "kubernetes forwarding rules" -m mark --mark {mark}/{mark} -j ACCEPT'
        )
        forward.append(
            f'-A {chains.FORWARD} -m comment --comment "kubernetes forwarding conntrack rule" '
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        )
        return {chains.FIREWALL: firewall, chains.FORWARD: forward}

    def _fixed_nat(self) -> dict[str, list[str]]:
        settings, mark = self.settings, self.settings.mark
        postrouting = [
            f"-A {chains.POSTROUTING} -m mark ! --mark {mark}/{mark} -j RETURN",
            # Cleared at once, so that a packet that passes here again (through a tunnel, say) is not translated twice.
            f"-A {chains.POSTROUTING} -j MARK --xor-mark {mark}",
            f'-A {chains.POSTROUTING} -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE'
            + (" --random-fully" if settings.random_fully else ""),
        ]
        comment = f"-A {chains.SERVICES} -m comment --comment {_LAST_COMMENT}"
        if settings.node_port_ips is not None:
            last = [f"{comment} -d {address} -j {chains.NODE_PORTS}" for address in settings.node_port_ips]
        else:
            loopback = "" if settings.localhost_node_ports else " ! -d 127.0.0.0/8"
            last = [f"{comment} -m addrtype --dst-type LOCAL{loopback} -j {chains.NODE_PORTS}"]
        return {
            chains.POSTROUTING: postrouting,
            chains.MARK_MASQ: [f"-A {chains.MARK_MASQ} -j MARK --or-mark {mark}"],
            chains.SERVICES: last,
        }

    # -- comparing -------------------------------------------------------------------------------------------------

    def find_damage(self, installed: Installed) -> str:
        """Return in a few words what of the accepted payloads is not in the kernel as it was put there, or ''.

        Upstream looks for its canary chain only, and so overlooks a flush that leaves chains in place (`iptables -F`).
        """
        tables = sorted(set(CANARY_TABLES) - installed.canaries)
        if tables:
            return f"the canary chain is gone from {', '.join(tables)}"
        for jump in JUMPS:
            if (jump.table, jump.saved) not in installed.jumps:
                return f"a jump is gone from {jump.table}: {jump.saved}"
        wanted: dict[_Place, Sequence[str]] = {}
        for table in _SHARED:
            wanted |= {(table, chain): lines for chain, lines in self._shared(table, self._installed).items()}
        for rules in self._installed.values():
            wanted |= {("nat", chain): own for chain, own in rules.chains.items()}
        gone = sorted(chain for table, chain in wanted if (table, chain) not in installed.chains)
        if gone:
            return f"{len(gone)} chains are gone, for example {gone[0]}"
        changed = sorted(place for place, lines in wanted.items() if not self._is_equal(*place, lines, installed))
        if changed:
            (table, chain), others = changed[0], len(changed) - 1
            have, want = len(installed.chains[table, chain]), len(wanted[table, chain])
            what = f"has {have} rules instead of {want}" if have != want else "has other rules"
            return f"{chain} of {table} {what}" + (f", and {others} more chains" if others else "")
        return ""

    def find_damaged(self, installed: Installed) -> list[ServicePortName]:
        """Return the service ports whose own chains are not as accepted payloads put them, or that no rule leads to."""
        return [name for name, rules in sorted(self._installed.items()) if not self._is_in_place(rules, installed)]

    def learn_spelling(self, installed: Installed) -> None:
        """Take chains that were just written, and are printed in another way than `saved_form` knows, as being right."""
        for table in _SHARED:
            for chain, lines in self._shared(table, self._installed).items():
                self._learn(table, chain, lines, installed)
        for rules in self._installed.values():
            for chain, own in rules.chains.items():
                self._learn("nat", chain, own, installed)

    def _learn(self, table: str, chain: str, lines: Sequence[str], installed: Installed) -> None:
        there = installed.chains.get((table, chain))
        if there is not None and len(there) == len(lines) and not self._is_equal(table, chain, lines, installed):
            self._spelled[table, chain] = _print_of(table, chain, there)

    def _is_equal(self, table: str, chain: str, lines: Sequence[str], installed: Installed) -> bool:
        there = installed.chains.get((table, chain))
        if there is None or len(there) != len(lines):
            return False
        place = (table, chain)
        is_shared = chain in _SHARED[table]
        wanted = self._prints.get(place) if not is_shared else None
        if wanted is None:
            wanted = _print_of(table, chain, [saved_form(line) for line in lines])
            if not is_shared:
                self._prints[place] = wanted
        return _print_of(table, chain, there) in (wanted, self._spelled.get(place))

    def _is_in_place(self, rules: ServiceRules, installed: Installed) -> bool:
        if not all(self._is_equal("nat", chain, own, installed) for chain, own in rules.chains.items()):
            return False
        shared = (("filter", rules.filter_rules), ("nat", rules.nat_dispatch))
        return all(
            saved_form(line) in installed.chains.get((table, line.split(" ", 2)[1]), ())
            for table, lines in shared
            for line in lines
        )


def _leading_first(chain: str) -> tuple[int, str]:
    """Sort chains so that each comes before those that its rules lead to: then it can be deleted first."""
    return next(rank for rank, prefix in enumerate(_LEADING) if chain.startswith(prefix)), chain


_LEADING = (
    chains.SOURCE_RANGES_PREFIX, chains.EXTERNAL_PREFIX, chains.CLUSTER_PREFIX, chains.LOCAL_PREFIX, chains.ENDPOINT_PREFIX,
)  # fmt: skip


def _print_of(table: str, chain: str, lines: Sequence[str]) -> int:
    """Return a hash of a chain's rules. Of those of different service ports in a shared chain the order does not count."""
    if chain not in _SHARED[table]:
        return hash(tuple(lines))
    last = [line for line in lines if _LAST_COMMENT in line]
    return hash((tuple(sorted(lines)), tuple(lines[len(lines) - len(last) :]) == tuple(last)))


def _flat(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [line for lines in groups.values() for line in lines]


def render_full(
    state: ProxyState, settings: IptablesSettings, installed: Installed = NOTHING_INSTALLED
) -> RestorePayload:
    """Return the whole of what ``settings`` and ``state`` ask for, given what the node has already."""
    renderer = IptablesRenderer(settings)
    renderer.update(state)
    return renderer.full(installed)


def render_cleanup(installed: Installed) -> str:
    """Return the payload of ``kube-proxy --cleanup``.

    As upstream's it leaves behind KUBE-MARK-MASQ, KUBE-PROXY-FIREWALL (to which nothing jumps any more), KUBE-FIREWALL
    with its jumps (the kubelet's as well), and the canaries.
    """
    left = {("nat", chains.MARK_MASQ), ("filter", chains.PROXY_FIREWALL), ("filter", chains.FIREWALL)}
    blocks = []
    for table in ("filter", "nat"):
        block = _Block(table)
        block.rules = [
            f"-D {jump.chain} {jump.rule}"
            for jump in JUMPS
            if jump.table == table
            and (table, jump.saved) in installed.jumps
            and chains.FIREWALL not in jump.rule.split()
        ]
        block.deleted = sorted(
            chain for where, chain in installed.chains if where == table and (table, chain) not in left
        )
        blocks.append(block)
    lines = [line for block in blocks for line in block.lines()]
    return "\n".join(lines) + "\n" if lines else ""
