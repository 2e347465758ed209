"""The ipvs mode of kube-proxy: plans what is wanted, applies it, and lets real servers go when their connections have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Final, Protocol

from testbed.dataplane import ipvs_rules
from testbed.dataplane.iptables import Jump
from testbed.dataplane.ipvs import (
    Change,
    IpvsObjects,
    IpvsRenderer,
    IpvsSettings,
    RealServer,
    describe,
    make_ipvs_settings,
    plan,
    render_sysctls,
    retire,
)
from testbed.dataplane.state import ProxyState
from testbed.errors import KernelError
from testbed.kernel.ipvs_node import Listing, Refused
from testbed.model.proxyconfig import IpvsOptions, KubeProxyConfig
from testbed.model.service import NodeView, ServicePortName

#: How often real servers that are to go are looked at. Source: kubernetes graceful_termination.go, rsCheckDeleteInterval.
CHECK_INTERVAL_S: Final = 60.0
#: After so many service ports were refused, the fault is not theirs.
_MOST_REFUSED: Final = 20
#: Damage that so many repairs in a row did not cure is something that this kernel or a tool prints in another way.
_MOST_REPAIRS: Final = 3


class Node(Protocol):
    """What is changed in the kernel; `testbed.kernel.ipvs_node.IpvsNode` is the real one."""

    def list(self) -> Listing: ...

    def local_addresses(self) -> frozenset[IPv4Address]: ...

    def ensure(self, sysctls: Mapping[str, str], listing: Listing) -> None: ...

    def find_wrong_setting(self, sysctls: Mapping[str, str]) -> str: ...

    def set_timeouts(self, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None: ...

    def count_connections(self, servers: Collection[RealServer]) -> dict[RealServer, int]: ...

    def add(self, change: Change) -> Refused: ...

    def remove(self, change: Change) -> Refused: ...

    def close(self) -> None: ...


class Rules(Protocol):
    """iptables; `testbed.kernel.iptables.Iptables` is the real one."""

    def save(self, table: str = "") -> str: ...

    def apply(self, payload: str) -> None: ...


@dataclass(frozen=True, slots=True)
class IpvsPayload:
    """What was changed, and the rules that hold now."""

    text: str  # iptables rules that were written; '' when none had to be
    changes: int
    no_local_endpoints: tuple[int, int]  # service ports without local endpoints: internal, external policy
    rules: Mapping[str, int] = field(default_factory=dict)  # table -> number of rules
    written: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IpvsSyncReport:
    """What one sync did: whether it was a full one, what it changed, and the service ports that were refused, and why."""

    full: bool
    payload: IpvsPayload
    refused: Mapping[ServicePortName, str] = field(default_factory=dict)
    #: The change alone could not be made, and a full sync had to follow.
    partial_failed: bool = False


class IpvsProxier:
    """Makes IPVS, kube-ipvs0, the sets and the rules of one node equal to a state, with as little as that takes.

    A full sync lists what is there and changes what differs; a partial one changes what the changed service ports change,
    without a process and without a list (but of the connections of real servers that go). A full sync is due at the start,
    after a failure, when settings or addresses of the node changed, and when `require_full` was called.

    Args:
        node: The node's kernel.
        iptables: Its rules.
        options: Timeouts are set with the first sync.
        kernel: Major and minor version.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        node: Node,
        iptables: Rules,
        options: IpvsOptions | None = None,
        *,
        kernel: tuple[int, int] = (6, 1),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._iptables = iptables
        self._options = options or IpvsOptions()
        self._kernel = kernel
        self._clock = clock
        self._renderer: IpvsRenderer | None = None
        self._addresses: frozenset[IPv4Address] | None = None
        self._rules_key: object = None
        self._rules: dict[str, dict[str, list[str]]] = {}
        self._full_due = True
        self._timeouts_due = True
        self._refused: dict[ServicePortName, str] = {}
        self._retiring: dict[RealServer, None] = {}
        self._next_look_s = math.inf
        self._same_damage = ("", 0)  # and how many looks in a row found it

    @property
    def is_full_due(self) -> bool:
        return self._full_due

    @property
    def retiring(self) -> tuple[RealServer, ...]:
        """Real servers with weight 0 whose connections have not ended yet."""
        return tuple(self._retiring)

    def require_full(self) -> None:
        self._full_due = True

    def close(self) -> None:
        """Let go of the kernel; what is programmed stays."""
        self._node.close()

    def make_settings(
        self,
        config: KubeProxyConfig,
        node: NodeView,
        local_addresses: Collection[IPv4Address] = (),
        service_cidrs: Collection[IPv4Network] = (),
    ) -> IpvsSettings:
        """Return what `sync` takes for a node. Its addresses are looked at with each full sync, those of kube-ipvs0 aside."""
        if self._addresses is None or self._full_due:
            self._addresses = self._node.local_addresses()
        return make_ipvs_settings(config, node, self._addresses)

    def sync(self, state: ProxyState, changed: frozenset[ServicePortName], settings: IpvsSettings) -> IpvsSyncReport:
        """Bring the kernel to ``state``; ``changed`` names what differs from the previous call.

        Raises:
            KernelError: nothing is lost: the next call makes a full sync.
        """
        if self._renderer is None or self._renderer.settings != settings:
            self._renderer = IpvsRenderer(settings)
            self._full_due = True
        full, self._full_due = self._full_due or bool(self._refused), True  # until this one has succeeded
        change = self._renderer.update(state, None if full else changed)
        if full:
            return self._sync_full(self._renderer)
        refused, payload = self._apply(self._renderer, self._retire(change))
        if refused:  # somebody else changed something, or one service port is at fault: look
            return replace(self._sync_full(self._renderer), partial_failed=True)
        self._full_due = False
        return IpvsSyncReport(False, payload)

    def _sync_full(self, renderer: IpvsRenderer) -> IpvsSyncReport:
        settings = renderer.settings
        listing = self._node.list()
        self._node.ensure(render_sysctls(settings, self._kernel), listing)
        if self._timeouts_due:
            options = self._options
            self._node.set_timeouts(
                int(options.tcp_timeout_s), int(options.tcp_fin_timeout_s), int(options.udp_timeout_s)
            )
            self._timeouts_due = False
        there = listing.objects
        self._retiring = {one: None for one in self._retiring if _weight(there, one) == 0}
        installed = ipvs_rules.parse_installed_rules(self._iptables.save())
        change = self._retire(plan(there, renderer.wanted(), settings, self._retiring))
        refused, payload = self._apply(renderer, change, installed)
        self._refused = {}
        if refused:
            owners = renderer.owners_of(thing for thing, _ in refused)
            if len(owners) < len({thing for thing, _ in refused}) or len(owners) > _MOST_REFUSED:
                raise KernelError(refused[0][1])
            self._refused = {owners[thing]: reason for thing, reason in reversed(refused)}
        self._full_due = False
        return IpvsSyncReport(True, payload, dict(self._refused))

    def _retire(self, change: Change) -> Change:
        """Decide how real servers go and come back; keep those in mind that wait for their connections to end."""
        tcp = [one for one in change.retire_real if one[0].protocol == "tcp"]
        connections = self._node.count_connections(tcp) if tcp else {}
        decided = retire(change, connections, self._retiring)
        gone = set(change.delete_servers)
        for one in (*decided.renew_real, *decided.delete_real):
            self._retiring.pop(one, None)
        for one in [one for one in self._retiring if one[0] in gone]:
            del self._retiring[one]
        waiting = [(key, real) for key, real, weight in decided.set_real if weight == 0]
        if waiting and not self._retiring:
            self._next_look_s = self._clock() + CHECK_INTERVAL_S
        self._retiring |= dict.fromkeys(waiting)
        return decided

    def _apply(
        self, renderer: IpvsRenderer, change: Change, installed: ipvs_rules.InstalledRules | None = None
    ) -> tuple[Refused, IpvsPayload]:
        """Carry out a change: what it adds, then rules (about sets that exist), then what it removes."""
        refused = self._node.add(change)
        text = self._write_rules(renderer, installed)
        refused += self._node.remove(change)
        count = {table: sum(map(len, own.values())) for table, own in self._rules.items()}
        written = count if text else {}
        return refused, IpvsPayload(text, len(change), renderer.no_local_endpoints, count, written)

    def _write_rules(self, renderer: IpvsRenderer, installed: ipvs_rules.InstalledRules | None) -> str:
        """Write the rules if they changed or, where it is known what is installed, if they are not as they should be."""
        key = renderer.rules_key()
        if key != self._rules_key:
            self._rules = renderer.rules()
        elif installed is None:
            return ""
        self._rules_key = None
        jumps: Sequence[Jump] = ()
        if installed is not None:
            if not ipvs_rules.find_rule_damage(self._rules, installed):
                self._rules_key = key
                return ""
            jumps = ipvs_rules.missing_jumps(installed)
        text = ipvs_rules.render_payload(self._rules, jumps)
        self._iptables.apply(text)
        self._rules_key = key
        return text

    def tend(self) -> float:
        """Delete real servers whose connections have ended; return in how many seconds to look again.

        Raises:
            KernelError: the kernel refused; the next look tries again.
        """
        now_s = self._clock()
        if now_s < self._next_look_s:
            return self._next_look_s - now_s
        self._next_look_s = now_s + CHECK_INTERVAL_S if self._retiring else math.inf
        connections = self._node.count_connections(tuple(self._retiring))
        ended = tuple(one for one in self._retiring if not connections.get(one))
        refused = self._node.add(Change(delete_real=ended)) if ended else []
        for one in ended:
            del self._retiring[one]
        if refused:
            raise KernelError(refused[0][1])
        if not self._retiring:
            self._next_look_s = math.inf
        return self._next_look_s - now_s

    def find_damage(self) -> str:
        """Return in a few words what of the last sync is no longer in the kernel, or ''.

        A changed address of the node counts: NodePorts answer on all of them.
        """
        if self._renderer is None or self._full_due:
            return ""
        settings = self._renderer.settings
        listing = self._node.list()
        if self._addresses is not None and listing.local_addresses != self._addresses:
            self._full_due = True
            other = sorted(map(str, listing.local_addresses ^ self._addresses))
            return f"the node's addresses changed ({', '.join(other[:3])})"
        damage = (
            listing.missing
            or describe(plan(listing.objects, self._renderer.wanted(), settings, self._retiring))
            or ipvs_rules.find_rule_damage(self._rules, ipvs_rules.parse_installed_rules(self._iptables.save()))
            or self._node.find_wrong_setting(render_sysctls(settings, self._kernel))
        )
        seen = self._same_damage[1] + 1 if damage == self._same_damage[0] else 1
        self._same_damage = (damage, seen)
        return damage if seen <= _MOST_REPAIRS else ""


def _weight(objects: IpvsObjects, one: RealServer) -> int | None:
    key, real = one
    return objects.servers[key].real.get(real) if key in objects.servers else None
