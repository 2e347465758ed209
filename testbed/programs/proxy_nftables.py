"""The nftables mode of kube-proxy: renders what is wanted, applies it, and remembers what is in the kernel."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from testbed.dataplane import nft_names
from testbed.dataplane.nft_table import differences, parse_listing
from testbed.dataplane.nftables import (
    NftablesRenderer,
    NftablesSettings,
    Transaction,
    make_nftables_settings,
)
from testbed.dataplane.state import ProxyState
from testbed.errors import MissingFeature, RulesRejected
from testbed.kernel.nftables import Nftables, kernel_version
from testbed.kernel.runner import Runner
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView, ServicePortName

#: Kernels before 6.2 see only a moment later that no map leads to a chain any more, and refuse to delete it until then.
_STALE_CHAIN_S: Final = 1.0
#: After so many service ports were refused, the fault is not theirs.
_MOST_REFUSED: Final = 20
#: Damage that so many repairs in a row did not cure is something that a tool or the kernel prints in another way.
MOST_REPAIRS: Final = 3


@dataclass(frozen=True, slots=True)
class NftablesPayload:
    """What was sent, and what holds now that it is accepted."""

    text: str  # '' when nothing had to be written
    commands: int
    no_local_endpoints: tuple[int, int]  # service ports without local endpoints: internal, external policy
    rules: Mapping[str, int] = field(default_factory=dict)  # of iptables' tables: none
    written: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NftablesSyncReport:
    """What one sync did: whether it was a full one, what it sent, and the service ports that were refused, with the reason."""

    full: bool
    payload: NftablesPayload
    refused: Mapping[ServicePortName, str] = field(default_factory=dict)
    #: The change alone could not be written, and a full sync had to follow.
    partial_failed: bool = False


class NftablesProxier:
    """Makes the table of one node equal to a state, with as little as that takes.

    A full sync lists the table and writes what differs; a partial one knows what it wrote, and writes what the changed
    service ports change. A full sync is due at the start, after a failure, when the settings changed, and when
    `require_full` was called. What packets recorded (session affinity) outlives both.

    Args:
        nftables: The node's table ``ip kube-proxy``.
        deletes_at_once: The kernel is 6.2 or newer: see `_STALE_CHAIN_S`.
        clock: Seconds that only grow.
    """

    def __init__(
        self, nftables: Nftables, *, deletes_at_once: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nftables = nftables
        self._deletes_at_once = deletes_at_once
        self._clock = clock
        self._renderer: NftablesRenderer | None = None
        self._full_due = True
        self._refused: dict[ServicePortName, str] = {}
        self._stale: dict[str, float] = {}  # emptied chains, and when
        self._generation: int | None = None  # of the kernel, when its table was as wanted
        self._repaired = ("", 0)  # damage that a full sync was to repair, and how many looks in a row found it
        self._incurable = ""

    @property
    def is_full_due(self) -> bool:
        return self._full_due

    def require_full(self) -> None:
        self._full_due = True

    def make_settings(
        self,
        config: KubeProxyConfig,
        node: NodeView,
        local_addresses: Collection[IPv4Address],
        service_cidrs: Collection[IPv4Network] = (),
    ) -> NftablesSettings:
        """Return what `sync` takes for a node."""
        return make_nftables_settings(config, node, local_addresses, service_cidrs)

    def sync(
        self, state: ProxyState, changed: frozenset[ServicePortName], settings: NftablesSettings
    ) -> NftablesSyncReport:
        """Bring the kernel to ``state``; ``changed`` names what differs from the previous call.

        A service port whose objects the kernel refuses is left out, and reported; the others are programmed.

        Raises:
            KernelError: nothing is lost: the next call makes a full sync.
        """
        if self._renderer is None or self._renderer.settings != settings:
            self._renderer = NftablesRenderer(settings)
            self._full_due = True
        if not self._full_due and not self._refused:
            self._full_due = True  # until this one has succeeded
            transaction = self._renderer.partial(state, changed, delete_at_once=self._deletes_at_once)
            try:
                self._apply(transaction, self._generation)
            except RulesRejected:  # somebody else changed the table, or one service port is at fault: look
                return replace(self._sync_full(self._renderer, state), partial_failed=True)
            self._full_due = False
            return self._report(False, transaction, {})
        return self._sync_full(self._renderer, state)

    def _sync_full(self, renderer: NftablesRenderer, state: ProxyState) -> NftablesSyncReport:
        self._full_due = True
        refused: dict[ServicePortName, str] = {}
        generation, listing = self._nftables.generation(), self._nftables.list()
        listed = parse_listing(listing) if listing is not None else None
        if listed is None:
            self._stale.clear()
        else:
            for name in self._stale:
                listed.chains.pop(name, None)  # their time will come
        while True:
            transaction = renderer.full(state, listed, delete_at_once=self._deletes_at_once, without=refused)
            try:
                self._apply(transaction, generation)
            except RulesRejected as error:
                owners = {transaction.owner_of(number) for number in error.line_numbers} - {None}
                if not owners or len(refused) >= _MOST_REFUSED:
                    raise
                refused |= {owner: error.reason for owner in owners if owner is not None}
            else:
                break
        self._refused, self._full_due = refused, False
        return self._report(True, transaction, refused)

    def _apply(self, transaction: Transaction, known: int | None) -> None:
        """Send a transaction, if there is anything in it.

        Args:
            transaction: What to do. The deletion of chains that were emptied long enough ago is added.
            known: The kernel's count of transactions for which we know what is in the table.
        """
        now_s = self._clock()
        for name in transaction.added_chains & self._stale.keys():
            del self._stale[name]
        ripe = [name for name, since_s in self._stale.items() if now_s - since_s >= _STALE_CHAIN_S]
        for name in ripe:
            transaction.delete_chain(name)
        if transaction:
            self._nftables.apply(transaction.text)
            after = self._nftables.generation()
            # One more than known is our own. Otherwise the next check looks at all of the table.
            known = after if known is not None and after == known + 1 else None
        self._generation = known
        for name in ripe:
            del self._stale[name]
        self._stale |= dict.fromkeys(transaction.stale_chains, now_s)

    def _report(
        self, full: bool, transaction: Transaction, refused: Mapping[ServicePortName, str]
    ) -> NftablesSyncReport:
        assert self._renderer is not None
        payload = NftablesPayload(transaction.text, len(transaction), self._renderer.no_local_endpoints)
        return NftablesSyncReport(full, payload, refused)

    def tend(self) -> float:
        return math.inf  # nothing here ends by itself

    def find_damage(self) -> str:
        """Return in a few words what of the last sync is no longer in the kernel, or ''.

        The table is only looked at when the kernel has counted a transaction that was not ours, and once after a repair.
        """
        if self._renderer is None or self._full_due:
            return ""
        generation = self._nftables.generation()
        is_ours = generation is not None and generation == self._generation
        if is_ours and not self._repaired[0]:
            return ""
        listing = self._nftables.list()
        if listing is None:
            return f"the table {nft_names.FAMILY} {nft_names.TABLE} is gone"
        found = differences(self._renderer.wanted(), parse_listing(listing), ignored_chains=self._stale)
        if not found:
            self._generation, self._repaired = generation, ("", 0)
            return ""
        damage = found[0] if len(found) == 1 else f"{found[0]}, and {len(found) - 1} more"
        seen = self._repaired[1] + 1 if damage == self._repaired[0] else 1
        if seen > (1 if is_ours else MOST_REPAIRS):
            # Written anew, and it still reads so: this release of nft prints it in a way we do not know.
            self._incurable = damage
        if damage == self._incurable:
            self._generation, self._repaired = generation, ("", 0)
            return ""
        self._repaired = (damage, seen)
        return damage


def remove_tables(runner: Runner) -> None:
    """Delete the tables of nftables mode. Without nft there are none.

    Raises:
        KernelError: nft refused.
    """
    ours = {f"table {family} {nft_names.TABLE}" for family in ("ip", "ip6")}
    with contextlib.suppress(MissingFeature):
        # Not `add` and `delete` of both, which needs no look: a kernel can have nf_tables without these families.
        there = ours.intersection(runner.run(["nft", "list", "tables"]).splitlines())
        if there:
            runner.run(["nft", "-f", "-"], stdin="".join(f"delete {table}\n" for table in sorted(there)))


def deletes_at_once(release: str) -> bool:
    """Say whether a kernel (``os.uname().release``) lets go of a chain in the transaction that removes what leads there."""
    return kernel_version(release) >= (6, 2)
