"""The iptables mode of kube-proxy: renders what is wanted, applies it, and remembers what is in the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.dataplane.iptables import (
    IptablesRenderer,
    IptablesSettings,
    RestorePayload,
    missing_parts,
    parse_installed,
)
from testbed.dataplane.state import ProxyState
from testbed.kernel.iptables import Iptables
from testbed.model.service import ServicePortName


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync did."""

    full: bool
    payload: RestorePayload


class IptablesProxier:
    """Makes the rules of one node equal to a state, with as little as that takes.

    A full sync reads what is there, restores missing jumps and canaries, rewrites every chain and deletes those of ours
    that are not wanted. A partial one leaves the chains of unchanged service ports alone. A full sync is due at the
    start, after a failure, when the settings changed, and when `require_full` was called.
    """

    def __init__(self, iptables: Iptables) -> None:
        self._iptables = iptables
        self._renderer: IptablesRenderer | None = None
        self._payload: RestorePayload | None = None  # the last one that was accepted
        self._full_due = True

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
        full, self._full_due = self._full_due, True
        if full or self._payload is None:
            payload = self._renderer.full(state, parse_installed(self._iptables.save()))
        else:
            payload = self._renderer.partial(state, changed, self._payload.chains)
        self._iptables.apply(payload.text)
        self._payload = payload
        self._full_due = False
        return SyncReport(full, payload)

    def find_damage(self) -> str:
        """Return in a few words what of the last sync is no longer in the kernel, or ''."""
        if self._payload is None:
            return ""
        return missing_parts(parse_installed(self._iptables.save()), self._payload)
