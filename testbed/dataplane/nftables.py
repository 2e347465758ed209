"""What kube-proxy writes in nftables mode: pure text for one ``nft -f -``.

::

    prerouting, output  -110  filter-*-pre-dnat   firewall-check: loadBalancerSourceRanges, before the address is changed
                        -100  nat-prerouting,     services ─ ClusterIP, external and load balancer IPs ─ @service-ips
                              nat-output                   └ NodePorts ─ @service-nodeports
                                                  external-… ─ service-… or local-… ─ DNAT (or endpoint-… ─ DNAT)
    input, forward, output 0  filter-*            @no-endpoint-…: refuse what nobody serves; refuse unknown ports of
                                                  ClusterIPs, drop what is sent to ClusterIPs nobody has
    postrouting          100  nat-postrouting     masquerading: the mark, and pods that reach themselves

One service port is rendered into one `ServiceObjects`, kept while its input stays the same. A sync writes the difference
between the objects of before and of now, so a Service that did not change costs nothing, however many there are.

Source: kubernetes pkg/proxy/nftables/proxier.go (v1.36); docs/proxy-modes.md says what of it could not be checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from testbed.dataplane.nft_names import FAMILY, TABLE
from testbed.dataplane.nft_table import Chain, Element, ElementKey, NftTable, SetSpec, same_chain
from testbed.dataplane.nftables_rules import (
    NO_OBJECTS,
    NftablesSettings,
    ServiceObjects,
    make_nftables_settings,
    render_base,
    render_service,
)
from testbed.dataplane.state import ProxyState
from testbed.dataplane.topology import choose_endpoints
from testbed.model.service import Endpoint, ServicePort, ServicePortName

__all__ = [
    "NftablesRenderer", "NftablesSettings", "Transaction", "make_nftables_settings", "render_base", "render_service",
    "render_table",
]  # fmt: skip

_TARGET = f"{FAMILY} {TABLE}"


class Transaction:
    """Commands for one ``nft -f -``, brought into an order in which each can be carried out.

    What is referred to is made first and deleted last; a chain is emptied before what it refers to goes.
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, ServicePortName | None]] = []
        self._flushed: list[tuple[str, ServicePortName | None]] = []
        self._removed: list[tuple[str, ServicePortName | None]] = []
        self._filled: list[tuple[str, ServicePortName | None]] = []
        self._deleted: list[tuple[str, ServicePortName | None]] = []
        self.stale_chains: list[str] = []
        self.added_chains: set[str] = set()

    def _commands(self) -> list[tuple[str, ServicePortName | None]]:
        return [*self._made, *self._flushed, *self._removed, *self._filled, *self._deleted]

    @property
    def text(self) -> str:
        """The commands, one a line; '' when there is nothing to do."""
        return "".join(f"{command}\n" for command, _ in self._commands())

    def __len__(self) -> int:
        """How many commands."""
        return sum(map(len, (self._made, self._flushed, self._removed, self._filled, self._deleted)))

    def owner_of(self, line: int) -> ServicePortName | None:
        """Return the service port that the command in a line (from 1) is for, None when it is for all."""
        commands = self._commands()
        return commands[line - 1][1] if 0 < line <= len(commands) else None

    def start_over(self) -> None:
        """Delete the whole table, should there be one, before anything else."""
        self._made.append((f"add table {_TARGET}", None))
        self._made.append((f"delete table {_TARGET}", None))

    def add_table(self, comment: str) -> None:
        self._made.append((f'add table {_TARGET} {{ comment "{comment}" ; }}', None))

    def add_set(self, name: str, spec: SetSpec, owner: ServicePortName | None = None) -> None:
        self._made.append((f"add {spec.kind} {_TARGET} {name} {{ {spec.written} }}", owner))

    def add_chain(
        self, name: str, chain: Chain, owner: ServicePortName | None = None, *, empty_first: bool = False
    ) -> None:
        self.added_chains.add(name)
        written = chain.written
        self._made.append((f"add chain {_TARGET} {name}" + (f" {{ {written} }}" if written else ""), owner))
        if empty_first:
            self._flushed.append((f"flush chain {_TARGET} {name}", owner))
        self._add_rules(name, chain, owner)

    def change_chain(self, name: str, chain: Chain, owner: ServicePortName | None = None) -> None:
        self._flushed.append((f"flush chain {_TARGET} {name}", owner))
        self._add_rules(name, chain, owner)

    def _add_rules(self, name: str, chain: Chain, owner: ServicePortName | None) -> None:
        self._filled += [(f"add rule {_TARGET} {name} {rule}", owner) for rule in chain.rules]

    def remove_chain(self, name: str, *, at_once: bool = True) -> None:
        """Empty a chain, and delete it unless the kernel is to be given time to see that nothing leads there."""
        self._flushed.append((f"flush chain {_TARGET} {name}", None))
        if at_once:
            self.delete_chain(name)
        else:
            self.stale_chains.append(name)

    def delete_chain(self, name: str) -> None:
        self._deleted.append((f"delete chain {_TARGET} {name}", None))

    def remove_set(self, name: str, spec: SetSpec) -> None:
        self._removed.append((f"delete {spec.kind} {_TARGET} {name}", None))

    def add_element(self, element: Element, owner: ServicePortName | None = None) -> None:
        self._filled.append((f"add element {_TARGET} {element.set_name} {{ {element.written} }}", owner))

    def remove_element(self, element: Element) -> None:
        self._removed.append((f"delete element {_TARGET} {element.set_name} {{ {element.key} }}", None))


_Claims = tuple[tuple[ServicePortName, Element], ...]


class NftablesRenderer:
    """Remembers the objects of every service port and renders what changes. Holds no kernel state.

    Where two Services claim one address and port, the first by name has it, as in iptables mode, where its rule is met
    first; upstream lets the order of a Go map decide.
    """

    def __init__(self, settings: NftablesSettings) -> None:
        self.settings = settings
        self._base = render_base(settings)
        self._inputs: dict[ServicePortName, tuple[ServicePort, tuple[Endpoint, ...]]] = {}
        self._objects: dict[ServicePortName, ServiceObjects] = {}
        self._claims: dict[ElementKey, _Claims] = {}
        self._without_local = [0, 0]

    @property
    def no_local_endpoints(self) -> tuple[int, int]:
        """Service ports with endpoints but none here, for traffic of internal and of external policy Local."""
        return self._without_local[0], self._without_local[1]

    def wanted(self) -> NftTable:
        """Return the whole table for the state last rendered."""
        table = NftTable(self._base.comment, dict(self._base.sets), dict(self._base.chains), dict(self._base.elements))
        for objects in self._objects.values():
            table.sets.update(objects.affinity_sets)
            table.chains.update(objects.chains)
        table.elements.update((key, claims[0][1]) for key, claims in self._claims.items())
        return table

    def partial(
        self, state: ProxyState, changed: Iterable[ServicePortName], *, delete_at_once: bool = True
    ) -> Transaction:
        """Return what must be written after the service ports ``changed`` changed."""
        transaction = Transaction()
        touched: dict[ElementKey, Element | None] = {}
        sets_gone: dict[str, SetSpec] = {}
        for name in sorted(changed):
            before, after = self._replace(name, state, touched)
            for set_name, spec in after.affinity_sets.items():
                if before.affinity_sets.get(set_name) != spec:
                    transaction.add_set(set_name, spec, name)
            sets_gone |= {s: spec for s, spec in before.affinity_sets.items() if s not in after.affinity_sets}
            for chain_name, chain in after.chains.items():
                if chain_name not in before.chains:
                    transaction.add_chain(chain_name, chain, name, empty_first=True)  # it may be a stale one
                elif before.chains[chain_name] != chain:
                    transaction.change_chain(chain_name, chain, name)
            for chain_name in sorted(before.chains.keys() - after.chains.keys()):
                transaction.remove_chain(chain_name, at_once=delete_at_once)
        for key, old in touched.items():
            claims = self._claims.get(key)
            new = claims[0][1] if claims else None
            if old == new:
                continue
            if old is not None:
                transaction.remove_element(old)
            if new is not None and claims:
                transaction.add_element(new, claims[0][0])
        for set_name, spec in sets_gone.items():
            transaction.remove_set(set_name, spec)
        return transaction

    def full(
        self,
        state: ProxyState,
        listed: NftTable | None,
        *,
        delete_at_once: bool = True,
        without: Collection[ServicePortName] = (),
    ) -> Transaction:
        """Return what makes a table that is listed so (None: there is none) equal to what ``state`` asks for.

        Args:
            state: Services and endpoints.
            listed: The kernel's table.
            delete_at_once: See `Transaction.remove_chain`.
            without: Service ports to leave out.
        """
        touched: dict[ElementKey, Element | None] = {}
        names_now = [name for name in sorted(state.services) if name not in without]
        for name in self._objects.keys() - set(names_now):
            self._forget(name, touched)
        for name in names_now:
            self._replace(name, state, touched)
        wanted, owners = self.wanted(), self._owners()
        transaction = Transaction()
        if listed is not None and not _can_become(listed, wanted):
            transaction.start_over()
            listed = None
        listed = listed or NftTable()
        if listed.comment != wanted.comment:
            transaction.add_table(wanted.comment)
        for set_name, spec in wanted.sets.items():
            if listed.sets.get(set_name) != spec:
                transaction.add_set(set_name, spec, owners.get(set_name))
        for chain_name, chain in wanted.chains.items():
            if chain_name not in listed.chains:
                transaction.add_chain(chain_name, chain, owners.get(chain_name))
            elif not same_chain(chain, listed.chains[chain_name]):
                transaction.change_chain(chain_name, chain, owners.get(chain_name))
        for chain_name in sorted(listed.chains.keys() - wanted.chains.keys()):
            was_emptied = not listed.chains[chain_name].rules
            transaction.remove_chain(chain_name, at_once=delete_at_once or was_emptied)
        for key, element in listed.elements.items():
            if wanted.elements.get(key) != element and element.set_name in wanted.sets:
                transaction.remove_element(element)
        for set_name in sorted(listed.sets.keys() - wanted.sets.keys()):
            transaction.remove_set(set_name, listed.sets[set_name])
        for key, element in wanted.elements.items():
            if listed.elements.get(key) != element:
                claims = self._claims.get(key)
                transaction.add_element(element, claims[0][0] if claims else None)
        return transaction

    def _owners(self) -> dict[str, ServicePortName]:
        return {
            object_name: name
            for name, objects in self._objects.items()
            for object_name in (*objects.chains, *objects.affinity_sets)
        }

    def _replace(
        self, name: ServicePortName, state: ProxyState, touched: dict[ElementKey, Element | None]
    ) -> tuple[ServiceObjects, ServiceObjects]:
        """Take in one service port; return its objects of before and of now, and note elements as they were before."""
        before = self._objects.get(name, NO_OBJECTS)
        service, endpoints = state.services.get(name), state.endpoints.get(name, ())
        if service is None:
            self._forget(name, touched)
            return before, NO_OBJECTS
        known = self._inputs.get(name)
        if known and known[0] is service and known[1] is endpoints:
            return before, before
        settings = self.settings
        choice = choose_endpoints(service, endpoints, settings.node_labels, settings.node, settings.hints)
        after = render_service(service, choice, settings)
        self._inputs[name], self._objects[name] = (service, endpoints), after
        self._claim(name, before, after, touched)
        return before, after

    def _forget(self, name: ServicePortName, touched: dict[ElementKey, Element | None]) -> None:
        self._inputs.pop(name, None)
        before = self._objects.pop(name, None)
        if before is not None:
            self._claim(name, before, NO_OBJECTS, touched)

    def _claim(
        self,
        name: ServicePortName,
        before: ServiceObjects,
        after: ServiceObjects,
        touched: dict[ElementKey, Element | None],
    ) -> None:
        for kind in (0, 1):
            self._without_local[kind] += after.no_local_endpoints[kind] - before.no_local_endpoints[kind]
        old = {element[:2]: element for element in before.elements}
        new: dict[ElementKey, Element] = {}
        for element in after.elements:
            new.setdefault(element[:2], element)
        for key in dict.fromkeys((*old, *new)):
            claims = self._claims.get(key, ())
            touched.setdefault(key, claims[0][1] if claims else None)
            left = tuple(claim for claim in claims if claim[0] != name)
            if key in new:
                left = ((name, new[key]),) if not left else tuple(sorted((*left, (name, new[key]))))
            if left:
                self._claims[key] = left
            else:
                del self._claims[key]


def _can_become(listed: NftTable, wanted: NftTable) -> bool:
    """Say whether a table can be changed into the wanted one: types of sets, hooks and comments are for ever."""
    for set_name, spec in wanted.sets.items():
        known = listed.sets.get(set_name)
        if known is not None and known._replace(timeout_s=0) != spec._replace(timeout_s=0):
            return False
        if known is not None and bool(known.timeout_s) != bool(spec.timeout_s):
            return False
    for chain_name, chain in wanted.chains.items():
        have = listed.chains.get(chain_name)
        if have is not None and (have.hook, have.comment) != (chain.hook, chain.comment):
            return False
    return listed.comment == wanted.comment


def render_table(state: ProxyState, settings: NftablesSettings) -> str:
    """Return the commands that make the whole table on a node that has none."""
    return NftablesRenderer(settings).full(state, None).text
