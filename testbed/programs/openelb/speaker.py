"""openelb-speaker: on each node, answers ARP for the addresses that the node announces.

::

    watchers (eips, services, endpoints, nodes, pods, configmap) ┐                    ┌─▶ ArpResponder per link (threads)
    gossip (heartbeats of the other speakers) ───────────────────┼─ queue ─ main loop ┼─▶ heartbeats
    responders (who else answers) ───────────────────────────────┘                    └─▶ events

The main loop alone decides, with `testbed.dataplane.openelb` and `testbed.dataplane.membership`. Differences from upstream,
all of them taken back by ``strictUpstream``: `testbed.programs.openelb.flags`; docs/openelb.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from typing import Final, Protocol

from testbed.controllers.openelb.names import EIPS, LAYER2, SYSTEM_NAMESPACE
from testbed.controllers.openelb.pools import Pool, parse_pool
from testbed.dataplane.arp import AddressFrames
from testbed.dataplane.membership import Change, Heartbeat, Membership
from testbed.dataplane.openelb import (
    EVERYTHING,
    Announcement,
    ClusterView,
    Elections,
    interface_problem,
    parse_interface,
)
from testbed.errors import InputError
from testbed.model.objects import Object, name_of, namespace_of
from testbed.programs.kube_proxy import Changed, Listed
from testbed.programs.openelb.flags import SETTINGS_CONFIGMAP, Settings, SpeakerFlags, read_settings
from testbed.programs.openelb.gossip import Heard
from testbed.programs.openelb.rivals import Rivals

SERVICES: Final = "services"
ENDPOINTS: Final = "endpoints"
NODES: Final = "nodes"
PODS: Final = "pods"
CONFIGMAPS: Final = "configmaps"
RESOURCES: Final = (EIPS, SERVICES, ENDPOINTS, NODES, PODS, CONFIGMAPS)
SPEAKER_LABELS: Final = "app=openelb,component=speaker"

_KINDS: Final = {
    EIPS: ("network.kubesphere.io/v1alpha2", "Eip"),
    SERVICES: ("v1", "Service"),
    ENDPOINTS: ("v1", "Endpoints"),
    NODES: ("v1", "Node"),
    PODS: ("v1", "Pod"),
    CONFIGMAPS: ("v1", "ConfigMap"),
}
_IDLE_S: Final = 5.0
_JOIN_WITHIN_S: Final = 1.0
_PREPARED: Final = 256  # addresses of a pool whose frames are built before anybody has them
_LINKS_EVERY_S: Final = 2.0
_LAYER2_OFF: Final = (
    "the speakers run with --enable-layer2=false and answer ARP all the same: those of OpenELB 0.6 would not, and nobody "
    "outside could reach {eip}'s addresses. Set --enable-layer2=true in DaemonSet openelb-speaker for both, or "
    'strictUpstream: "true" in ConfigMap {namespace}/{configmap} to see what 0.6 does'
)
_FOREIGN: Final = (
    "ARP requests for {address}, which {node} ({mac}) announces, are answered by {others} too: clients reach one node or "
    "the other. In proxy mode ipvs every node answers for every address unless ipvs.strictARP is true in ConfigMap "
    "kube-system/kube-proxy; restart kube-proxy's pods after the edit"
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Somebody else has an address that is announced here."""

    address: IPv4Address
    mac: str


@dataclass(frozen=True, slots=True)
class Built:
    """Frames that were asked for; () when that failed."""

    interface: str
    frames: Mapping[bytes, AddressFrames]


Message = Listed | Changed | Heard | Foreign | Built


class Responder(Protocol):
    """One link's `testbed.programs.openelb.responder.ArpResponder`."""

    @property
    def mac(self) -> str: ...

    @property
    def announced(self) -> frozenset[IPv4Address]: ...

    def announce(self, address: IPv4Address, frames: AddressFrames) -> None: ...

    def tell_everybody(self, address: IPv4Address) -> None: ...

    def withdraw(self, address: IPv4Address) -> None: ...

    def probe(self, address: IPv4Address) -> None: ...

    def close(self) -> None: ...


class NodeLinks(Protocol):
    """The node's links, and what is done on them. `programs.openelb.speaker_main.KernelNode` is the real one."""

    def addresses(self, link: str) -> tuple[IPv4Interface, ...]: ...

    def towards(self, destination: IPv4Address) -> str: ...

    def respond(self, link: str) -> Responder:
        """Open a responder; OSError when that cannot be."""

    def build(self, link: str, mac: str, addresses: tuple[IPv4Address, ...]) -> None:
        """Have frames built; a `Built` comes when they are."""


class Telling(Protocol):
    def __call__(self, obj: Object, kind: str, reason: str, message: str) -> None: ...


@dataclass(slots=True)
class _Link:
    """A link that some Eip is announced on."""

    responder: Responder
    pools: set[str] = field(default_factory=set)
    frames: dict[bytes, AddressFrames] = field(default_factory=dict)
    asked: set[IPv4Address] = field(default_factory=set)
    rivals: Rivals = field(default_factory=Rivals)


class SpeakerLoop:
    """Takes messages in and makes this node announce what it should. Reads no clock; only one thread uses it.

    Args:
        boot: grows from one start of the speaker to the next.
        send: sends a heartbeat to addresses.
    """

    def __init__(
        self, flags: SpeakerFlags, links: NodeLinks, *, boot: int, send: Callable[[Heartbeat, Iterable[str]], None],
        tell: Telling, log: Callable[[str], None], namespace: str = SYSTEM_NAMESPACE, now_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._flags = flags
        self._node = flags.node
        self._links = links
        self._boot = boot
        self._send = send
        self._tell = tell
        self._log = log
        self._namespace = namespace
        self.settings: Settings = flags.settings
        self.membership = Membership(flags.node, self.settings.timings_for(1))
        self._elections = Elections(is_strict=self.settings.is_strict)
        self._objects: dict[str, dict[str, Object]] = {resource: {} for resource in RESOURCES}
        self._not_listed = set(RESOURCES)
        self._pools: dict[str, Pool] = {}
        self._link_of: dict[str, str] = {}  # of Eips that can be announced here
        self._problems: dict[str, str] = {}  # of Eips that cannot
        self._by_link: dict[str, _Link] = {}
        self._outcome: dict[str, Announcement] = {}
        self._told_order: dict[str, tuple[str, ...]] = {}
        self._heard_from: dict[str, str] = {}  # node -> address
        self._beat = 0
        self._beat_at_s = now_s
        self._join_until_s = now_s + _JOIN_WITHIN_S
        self._links_at_s = now_s + _LINKS_EVERY_S
        self._is_due = False
        self._is_ready = False
        self._announce_again = False
        self._stepped_s = now_s

    # -- messages --------------------------------------------------------------------------------------------------

    def accept(self, message: Message, now_s: float) -> None:
        """Take one message in; nothing is announced or withdrawn before `step`."""
        match message:
            case Heard(heartbeat, address):
                self._hear(heartbeat, address, now_s)
            case Foreign(address, mac):
                for state in self._by_link.values():
                    state.rivals.saw(address, mac, now_s)
            case Built(interface, frames):
                if interface in self._by_link:
                    self._by_link[interface].frames.update(frames)
                    self._by_link[interface].asked.clear()
                    self._is_due = True
            case Listed(resource, objects):
                self._objects[resource] = {_key(obj): _with_kind(resource, obj) for obj in objects}
                self._not_listed.discard(resource)
                self._changed(resource, now_s)
            case Changed(resource, deleted, obj):
                if deleted:
                    self._objects[resource].pop(_key(obj), None)
                else:
                    self._objects[resource][_key(obj)] = _with_kind(resource, obj)
                self._changed(resource, now_s)

    def _changed(self, resource: str, now_s: float) -> None:
        if resource == CONFIGMAPS:
            self._read_settings()
        elif resource == EIPS:
            parsed = (parse_pool(eip) for eip in self._objects[EIPS].values())
            self._pools = {pool.name: pool for pool in parsed if pool is not None}
            self._register_pools()
        elif resource == PODS:
            self._beat_at_s = min(self._beat_at_s, now_s)  # a new peer is told at once
        self._is_due = True

    def _read_settings(self) -> None:
        found = self._objects[CONFIGMAPS].get(f"{self._namespace}/{SETTINGS_CONFIGMAP}")
        values = {key: str(value) for key, value in ((found or {}).get("data") or {}).items()}
        try:
            settings = read_settings(values, self._flags.settings)
        except InputError as error:
            self._log(f"ConfigMap {self._namespace}/{SETTINGS_CONFIGMAP}: {error}; everything stays as it was")
            if found is not None:
                self._tell(found, "Warning", "InvalidSettings", f"{error}; everything stays as it was")
            return
        if settings != self.settings:
            self._log(f"settings: {settings}")
            self.settings = settings
            self._elections = Elections(is_strict=settings.is_strict)

    # -- membership ------------------------------------------------------------------------------------------------

    def _hear(self, heartbeat: Heartbeat, address: str, now_s: float) -> None:
        change = self.membership.hear(heartbeat, now_s)
        if change is None:
            return
        self._heard_from[heartbeat.node] = address
        if heartbeat.wants_answer:
            self._beat += 1
            self._send(self._heartbeat(wants_answer=False), [address])
        self._members_changed(change, now_s)

    def _members_changed(self, change: Change, now_s: float) -> None:
        if not change:
            return
        self._probe_later(now_s)
        for names, what in ((change.came, "joined"), (change.went, "failed")):
            for name in sorted(names):
                self._log(f"member {name} {what}; alive: {', '.join(sorted(self.membership.alive()))}")
        self._is_due = True
        self._announce_again = self._announce_again or bool(change.back)

    def _heartbeat(self, *, wants_answer: bool) -> Heartbeat:
        return Heartbeat(
            node=self._node,
            boot=self._boot,
            beat=self._beat,
            cannot=self.membership.cannot,
            wants_answer=wants_answer,
        )

    def _peers(self) -> list[str]:
        """Return where to send heartbeats: the speakers' pods as the API has them, and who has been heard lately."""
        pods = self._objects[PODS].values()
        known = {
            str((pod.get("status") or {}).get("podIP") or "")
            for pod in pods
            if (pod.get("spec") or {}).get("nodeName") != self._node
        }
        alive = self.membership.alive()
        heard = {address for node, address in self._heard_from.items() if node in alive}
        return sorted((known | heard) - {""})

    def _is_joining(self, now_s: float) -> bool:
        """Say whether the others must still be waited for: who has just started knows nobody, and would win everything."""
        if now_s >= self._join_until_s:
            return False
        if PODS in self._not_listed:
            return True
        expected = {
            str(pod["spec"]["nodeName"])
            for pod in self._objects[PODS].values()
            if (pod.get("spec") or {}).get("nodeName") and (pod.get("status") or {}).get("phase") == "Running"
        }
        return not expected <= self.membership.alive().keys() | {self._node}

    # -- links -----------------------------------------------------------------------------------------------------

    def _register_pools(self) -> None:
        """Find out for each layer-2 Eip whether it can be announced here, and on which link."""
        wanted = {
            name: pool for name, pool in self._pools.items() if pool.protocol == LAYER2 and not pool.is_deleting
        }  # fmt: skip
        problems = {}
        for name in self._link_of.keys() - wanted.keys():
            self._unregister(name)
        for name, pool in wanted.items():
            try:
                link = self._find_link(pool)
            except (ValueError, OSError) as error:
                problems[name] = str(error)
                self._unregister(name)
                if self._problems.get(name) != problems[name]:
                    self._log(f"eip {name}: {error}")
                    self._tell(self._eip(name), "Warning", "ConfigSpeakerFailed", f"{self._node}: {error}")
                continue
            if self._link_of.get(name) != link:
                self._register(pool, link)
        self._problems = problems

    def _find_link(self, pool: Pool) -> str:
        link, destination = parse_interface(pool.interface)
        if destination:
            link = self._links.towards(IPv4Address(destination))
            if not link:
                raise ValueError(f"no route to {destination}")
        if link == "lo":
            raise ValueError("invalid interface lo")
        if pool.range.first.version != 4:
            raise ValueError("this speaker announces IPv4 addresses only, by ARP; NDP is not there yet")
        addresses = self._links.addresses(link)
        if not addresses and link not in self._by_link:
            raise ValueError(f"route ip+net: no such network interface: {link}")
        if problem := interface_problem(link, pool.range, addresses):
            raise ValueError(problem)
        if link not in self._by_link:
            self._by_link[link] = _Link(self._links.respond(link))
        return link

    def _register(self, pool: Pool, link: str) -> None:
        self._unregister(pool.name)
        self._link_of[pool.name] = link
        state = self._by_link[link]
        state.pools.add(pool.name)
        self._want_frames(link, [IPv4Address(pool.range.at(n).packed) for n in range(min(pool.range.size, _PREPARED))])
        eip = self._eip(pool.name)
        self._log(f"eip {pool.name} ({pool.address}) is announced on {link} ({state.responder.mac})")
        self._tell(eip, "Normal", "ConfigSpeaker", "config openelb layer2 speaker successfully")
        if not self._flags.layer2_enabled and not self.settings.is_strict:
            text = _LAYER2_OFF.format(eip=pool.name, namespace=self._namespace, configmap=SETTINGS_CONFIGMAP)
            self._tell(eip, "Warning", "Layer2Disabled", text)

    def _unregister(self, name: str) -> None:
        link = self._link_of.pop(name, None)
        if link is not None:
            self._by_link[link].pools.discard(name)

    def _want_frames(self, link: str, addresses: Iterable[IPv4Address]) -> None:
        state = self._by_link[link]
        missing = {one for one in addresses if one.packed not in state.frames} - state.asked
        if missing:
            state.asked |= missing
            self._links.build(link, state.responder.mac, tuple(sorted(missing)))

    def _eip(self, name: str) -> Object:
        return self._objects[EIPS][name]

    # -- announcing ------------------------------------------------------------------------------------------------

    def wait_s(self, now_s: float) -> float:
        """Return how long nothing needs to be done if no message comes."""
        due = [self._beat_at_s, self.membership.next_expiry_s(), self._links_at_s, now_s + _IDLE_S]
        due += [state.rivals.due_s() for state in self._by_link.values()]
        if not self._not_listed and (self._is_due or not self._is_ready):
            due.append(self._join_until_s if self._is_joining(now_s) else now_s if self._is_due else math.inf)
        return max(0.0, min(due) - now_s)

    def step(self, now_s: float) -> None:
        """Do what is due: heartbeats, deaths, elections, probes."""
        timings = self.settings.timings_for(len(self.membership.alive()))
        self.membership.timings = timings
        if now_s - self._stepped_s > timings.dead_after_s:  # stopped and continued: to the others we were dead
            self._announce_again = self._is_due = True
            self._probe_later(now_s)
        self._stepped_s = now_s
        if now_s >= self._links_at_s:
            self._links_at_s = now_s + _LINKS_EVERY_S
            before = dict(self._link_of)
            self._register_pools()
            self._is_due = self._is_due or before != self._link_of
        self._members_changed(self.membership.expire(now_s), now_s)
        self._note_what_we_cannot(now_s)
        if now_s >= self._beat_at_s:
            self._beat_at_s = now_s + timings.heartbeat_s
            self._beat += 1
            self._send(self._heartbeat(wants_answer=self._is_joining(now_s)), self._peers())
        if self._is_due and not self._not_listed and not self._is_joining(now_s):
            self._is_due = False
            self._elect(now_s)
        self._probe(now_s)

    def _note_what_we_cannot(self, now_s: float) -> None:
        """Keep what the others are told in step; they are told at once. A speaker that has just started can nothing yet."""
        if not self._is_ready:
            self._is_ready = not self._not_listed and not self._is_joining(now_s) and not self._lacks_frames()
        cannot = frozenset(self._problems) | (frozenset() if self._is_ready else {EVERYTHING})
        if cannot != self.membership.cannot:
            self.membership.cannot = cannot
            self._beat_at_s = now_s
            self._is_due = True

    def _lacks_frames(self) -> bool:
        return any(
            IPv4Address(address).packed not in self._by_link[link].frames
            for name, link in self._link_of.items()
            for address in self._pools[name].used
        )

    def _elect(self, now_s: float) -> None:
        before, view = self._outcome, self._view()
        self._outcome = self._elections.hold(view, self.membership.alive())
        wanted = self._wanted()
        for link, state in self._by_link.items():
            mine = {address for address, at in wanted.items() if at == link}
            for address in sorted(state.responder.announced - mine):
                self._withdraw(state, address, before)
            already = state.responder.announced
            for address in sorted(mine - already):
                self._take_over(link, state, address, now_s)
            if self._announce_again and not self.settings.is_strict:
                # Who comes back from the dead has announced everything to whomever it reached meanwhile.
                for address in sorted(mine & already):
                    state.responder.tell_everybody(address)
            self._want_frames(
                link, (IPv4Address(a) for a, o in self._outcome.items() if self._link_of.get(o.pool) == link)
            )
        self._announce_again = False
        self._close_unused_links()
        self._tell_outcome(before)

    def _view(self) -> ClusterView:
        return ClusterView(
            pools=[self._pools[name] for name in sorted(self._pools)],
            services=self._objects[SERVICES],
            endpoints=self._objects[ENDPOINTS],
            nodes=frozenset(self._objects[NODES]),
        )

    def _wanted(self) -> dict[IPv4Address, str]:
        """Return what this node is to announce, each with its link."""
        if self.settings.is_strict and not self._flags.layer2_enabled:
            return {}
        wanted = {
            IPv4Address(address): self._link_of[one.pool]
            for address, one in self._outcome.items()
            if one.owner == self._node and one.pool in self._link_of
        }
        if self.settings.is_strict:  # upstream's loser never withdraws
            for link, state in self._by_link.items():
                kept = {address for address in state.responder.announced if str(address) in self._outcome}
                wanted.update(dict.fromkeys(kept, link))
        return wanted

    def _take_over(self, link: str, state: _Link, address: IPv4Address, now_s: float) -> None:
        frames = state.frames.get(address.packed)
        if frames is None:
            self._want_frames(link, [address])  # `Built` brings us back
            return
        state.responder.announce(address, frames)
        state.rivals.watch(address, now_s)
        outcome = self._outcome[str(address)]
        self._log(
            f"{address}: {self._node} announces (order {', '.join(outcome.order)}) for {', '.join(outcome.services)}"
        )

    def _withdraw(self, state: _Link, address: IPv4Address, before: Mapping[str, Announcement]) -> None:
        state.responder.withdraw(address)
        state.rivals.forget(address)
        now = self._outcome.get(str(address))
        why = "it is free" if now is None else f"{now.owner or 'nobody'} announces it"
        self._log(f"{address}: withdrawn ({why})")
        if now is None and str(address) in before:
            for service in self._services(before[str(address)].services):
                self._tell(service, "Normal", "DelBalancer", "success to withdraw announcement for service")

    def _close_unused_links(self) -> None:
        for link in [link for link, state in self._by_link.items() if not state.pools]:
            self._by_link.pop(link).responder.close()

    def _tell_outcome(self, before: Mapping[str, Announcement]) -> None:
        """Tell whom addresses can be reached through: the node that announces does, the first of all when none does."""
        alive = self.membership.alive()
        if self.settings.is_strict and not self._flags.layer2_enabled:
            for address, one in self._outcome.items():
                if address not in before:
                    self._log(f"no registered speaker:[layer2] eip:[{one.pool}]")
            return
        for address, one in self._outcome.items():
            old = self._told_order.get(address)
            self._told_order[address] = one.order
            if old == one.order:
                continue
            if one.owner == self._node:
                text = f"success to add nexthops [{', '.join(sorted(one.order))}]"
                for service in self._services(one.services):
                    self._tell(service, "Normal", "SetBalancer", text)
            elif not one.order and self._node == min(alive):
                for service in self._services(one.services):
                    name = f"{namespace_of(service)}/{name_of(service)}"
                    text = f"no available nodes for service ip {address}:{name}"
                    self._tell(service, "Warning", "SetBalancer", text)
        for address in self._told_order.keys() - self._outcome.keys():
            del self._told_order[address]

    def _services(self, keys: Iterable[str]) -> list[Object]:
        return [self._objects[SERVICES][key] for key in keys if key in self._objects[SERVICES]]

    # -- who else answers ------------------------------------------------------------------------------------------

    def _probe_later(self, now_s: float) -> None:
        """Addresses may change hands now: two that answer are no fault until that is over."""
        for state in self._by_link.values():
            state.rivals.wait(now_s)

    def _probe(self, now_s: float) -> None:
        if self.settings.is_strict:  # upstream asks nobody
            return
        for state in self._by_link.values():
            for address in state.rivals.to_probe(now_s):
                state.responder.probe(address)
            for address, macs in state.rivals.news(now_s):
                self._tell_rivals(state.responder.mac, address, macs)

    def _tell_rivals(self, own_mac: str, address: IPv4Address, macs: frozenset[str]) -> None:
        outcome = self._outcome.get(str(address))
        if not macs or outcome is None:
            self._log(f"{address}: nobody else answers any more")
            return
        text = _FOREIGN.format(address=address, node=self._node, mac=own_mac, others=" and ".join(sorted(macs)))
        self._log(text)
        for service in self._services(outcome.services):
            self._tell(service, "Warning", "ForeignARP", text)

    def close(self) -> None:
        """Stop answering. As upstream, nobody is told: the others notice that this one is silent."""
        for state in self._by_link.values():
            state.responder.close()


def _key(obj: Object) -> str:
    return f"{namespace_of(obj)}/{name_of(obj)}" if namespace_of(obj) else name_of(obj)


def _with_kind(resource: str, obj: Object) -> Object:
    api_version, kind = _KINDS[resource]
    return {"apiVersion": api_version, "kind": kind, **obj}
