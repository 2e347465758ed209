"""The iptables mode of kube-proxy: applies what is rendered, with as little as that takes, and isolates what is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane.iptables import (
    IptablesRenderer,
    IptablesSettings,
    RestorePayload,
    make_settings,
    parse_installed,
    render_cleanup,
)
from testbed.dataplane.state import ProxyState
from testbed.errors import CommandError, RulesRejected
from testbed.kernel.iptables import Backend, Iptables
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView, ServicePortName

#: iptables-nft 1.8.9 takes quadratic time for the chains of one transaction (docs/adr/0005-iptables-restore.md).
_PER_TRANSACTION: Mapping[Backend, int] = {Backend.NFT: 100, Backend.LEGACY: 0}
#: With more changed service ports than this many transactions take, a full sync is cheaper than one large transaction.
_MOST_AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync did: whether it was a full one, its last payload, and the service ports whose rules were refused."""

    full: bool
    payload: RestorePayload
    refused: Mapping[ServicePortName, str] = field(default_factory=dict)
    #: The change alone could not be written, and a full sync had to follow.
    partial_failed: bool = False


class IptablesProxier:
    """Makes the rules of one node equal to a state, with as little as that takes.

    A full sync reads what is there and writes all that differs; it is due at the start, after a failure, when the settings
    changed, and when `require_full` was called. A partial one writes what changed.

    A rule that the kernel refuses takes its service port out of the sync, and no other one: `SyncReport.refused`.

    Args:
        iptables: The tools, in the node's network namespace.
        clean_every_s: How often, in a large cluster, unused chains are deleted, and how often what was refused is tried
            again; iptables.syncPeriod.
        clock: Any clock that goes on.
    """

    def __init__(
        self, iptables: Iptables, *, clean_every_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._iptables = iptables
        self._clean_every_s = clean_every_s
        self._clock = clock
        self._cleaned_s = self._tried_s = clock()
        self._renderer: IptablesRenderer | None = None
        self._full_due = True
        self._is_repair = False
        self._refused: dict[ServicePortName, str] = {}

    def make_settings(
        self,
        config: KubeProxyConfig,
        node: NodeView,
        local_addresses: Collection[IPv4Address],
        service_cidrs: Collection[IPv4Network] = (),
    ) -> IptablesSettings:
        """Return what `sync` takes for a node; ServiceCIDRs have no part in this mode."""
        return make_settings(config, node, local_addresses)

    @property
    def is_full_due(self) -> bool:
        return self._full_due

    def require_full(self) -> None:
        self._full_due = True

    def sync(self, state: ProxyState, changed: frozenset[ServicePortName], settings: IptablesSettings) -> SyncReport:
        """Bring the kernel to ``state``; ``changed`` names what differs from the previous call.

        Raises:
            KernelError: nothing is lost: the next call makes a full sync.
        """
        if self._renderer is None or self._renderer.settings != settings:
            self._renderer = IptablesRenderer(settings)
            self._full_due = True
        renderer = self._renderer
        full, self._full_due = self._full_due, True
        renderer.update(state, None if full else changed)
        refused_before = {name for name in self._refused if name not in changed}
        is_retry = not changed or self._clock() - self._tried_s >= self._clean_every_s
        partial_failed = False
        per_transaction = _PER_TRANSACTION[self._iptables.backend]
        full = full or (bool(per_transaction) and len(renderer.pending) > _MOST_AT_ONCE * per_transaction)
        if not full:
            try:
                payload = self._apply_change(renderer, renderer.pending - refused_before)
                if is_retry and refused_before:
                    self._refused = self._isolate(renderer, refused_before & renderer.pending)
                else:
                    self._refused = {name: self._refused[name] for name in refused_before & renderer.pending}
            except (RulesRejected, CommandError):
                full = partial_failed = True
        if full:
            payload = self._apply_all(renderer)
        self._full_due = False
        return SyncReport(full, payload, dict(self._refused), partial_failed)

    def _apply_change(self, renderer: IptablesRenderer, names: Collection[ServicePortName]) -> RestorePayload:
        clean = not renderer.is_large or self._clock() - self._cleaned_s >= self._clean_every_s
        payload = renderer.partial(names, clean_stale=clean)
        self._iptables.apply(payload.text)
        renderer.accept(payload)
        if clean:
            self._cleaned_s = self._clock()
        return payload

    def _apply_all(self, renderer: IptablesRenderer) -> RestorePayload:
        per_transaction = _PER_TRANSACTION[self._iptables.backend]
        payload = renderer.full(parse_installed(self._iptables.save()), per_transaction=per_transaction)
        try:
            self._iptables.apply(payload.text)
            renderer.accept(payload)
            self._refused = {}
        except (RulesRejected, CommandError):
            # Some service port's rules are not taken. First all that is no service port's, then those, group by group.
            installed = parse_installed(self._iptables.save())
            base = renderer.full(installed, per_transaction=per_transaction, without=renderer.pending)
            self._iptables.apply(base.text)
            renderer.accept(base)
            self._refused = self._isolate(renderer, renderer.pending)
        self._cleaned_s = self._clock()
        if self._is_repair:
            renderer.learn_spelling(parse_installed(self._iptables.save()))
            self._is_repair = False
        return payload

    def _isolate(self, renderer: IptablesRenderer, names: Collection[ServicePortName]) -> dict[ServicePortName, str]:
        """Write what can be written of these service ports' rules, and return the others with the kernel's reason."""
        refused: dict[ServicePortName, str] = {}
        self._tried_s = self._clock()
        ordered = sorted(names)
        size = _PER_TRANSACTION[self._iptables.backend] or max(1, len(ordered))
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        while groups:
            group = groups.pop()
            payload = renderer.partial(group)
            try:
                self._iptables.apply(payload.text)
                renderer.accept(payload)
                continue
            except RulesRejected as error:
                reason, guilty = error.reason, payload.owners_of(error.line_numbers)
            except CommandError as error:
                reason, guilty = error.stderr.strip(), set()
            if not guilty and len(group) == 1:
                guilty = set(group)
            refused |= dict.fromkeys(guilty, reason)
            rest = [name for name in group if name not in guilty]
            if guilty:
                groups += [rest] if rest else []
            else:  # the tool does not say which line it was
                groups += [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
        return refused

    def tend(self) -> float:
        return math.inf  # nothing here ends by itself

    def find_damage(self) -> str:
        """Return in a few words what of the last sync is no longer in the kernel, or ''."""
        if self._renderer is None or self._full_due:
            return ""
        damage = self._renderer.find_damage(parse_installed(self._iptables.save()))
        self._is_repair = bool(damage)
        return damage


def clean_up(iptables: Iptables) -> None:
    """Remove kube-proxy's rules, as ``kube-proxy --cleanup`` does.

    Raises:
        KernelError: the tools are missing or refused.
    """
    iptables.apply(render_cleanup(parse_installed(iptables.save())))
