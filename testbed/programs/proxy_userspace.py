"""The userspace mode of kube-proxy: a proxy port for each service port, rules that lead there, a process that copies.

Order matters: a port is served before a rule leads to it, and a rule is gone before its port is closed.
"""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple, Protocol

from testbed.dataplane.balancer import PortPool, balanced_endpoints
from testbed.dataplane.iptables import RestorePayload
from testbed.dataplane.state import ProxyState
from testbed.dataplane.userspace import (
    CHAINS,
    HOOKS,
    Rule,
    UserspaceSettings,
    answering_state,
    find_damage,
    is_supported,
    keeps_proxy_port,
    make_userspace_settings,
    parse_installed,
    plan_repair,
    portals_of,
    render_changes,
    render_cleanup,
    render_node_port,
    render_portal,
    render_start,
)
from testbed.errors import CommandError, RulesRejected
from testbed.kernel.addresses import list_local_addresses
from testbed.kernel.iptables import Iptables
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView, ServicePort, ServicePortName
from testbed.model.service import Protocol as Transport
from testbed.programs.userspace_loop import Notice
from testbed.programs.userspace_process import CopyProcess
from testbed.programs.userspace_udp import IP_PKTINFO

_BACKLOG: Final = 4096  # net.core.somaxconn, which is what Go listens with
_RECEIVE_BYTES: Final = 4 << 20  # of a UDP port: a burst of thousands of clients
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
#: How long a port of portRange is waited for (port_allocator.go).
_ALLOCATION_S: Final = 1.0
_BIND_TRIES: Final = 16


class Unserved(NamedTuple):
    """Why a service port is not reached, or not everywhere: the reason of an event, and words."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class UserspaceSyncReport:
    """What one sync did: whether it was a full one, what it wrote, and which service ports lack something."""

    full: bool
    payload: RestorePayload
    refused: Mapping[ServicePortName, str] = field(default_factory=dict)
    unserved: Mapping[ServicePortName, Unserved] = field(default_factory=dict)
    partial_failed: bool = False


class Sockets(Protocol):
    """Opens sockets in the node's network namespace; `NodeSockets` is the real one."""

    def listen(self, protocol: Transport, address: IPv4Address, port: int) -> socket.socket:
        """Return a listening (TCP) or bound (UDP) socket; port 0: the kernel chooses."""
        ...

    def claim(self, protocol: Transport, address: IPv4Address, port: int) -> socket.socket:
        """Return a socket that keeps others from using an address and port."""
        ...


class NodeSockets:
    """Sockets of the network namespace this process is in."""

    def listen(self, protocol: Transport, address: IPv4Address, port: int) -> socket.socket:
        opened = self._open(protocol)
        try:
            if protocol is Transport.UDP:
                opened.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
                try:
                    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
                except OSError:
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            else:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # established copies go on at this port
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit both
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.bind((str(address), port))
            if protocol is not Transport.UDP:
                opened.listen(_BACKLOG)
        except BaseException:
            opened.close()
            raise
        return opened

    def claim(self, protocol: Transport, address: IPv4Address, port: int) -> socket.socket:
        opened = self._open(protocol)
        try:
            # Bound, not listening: what comes past the rules is refused instead of waiting for nobody.
            opened.bind((str(address), port))
        except BaseException:
            opened.close()
            raise
        return opened

    @staticmethod
    def _open(protocol: Transport) -> socket.socket:
        kind = socket.SOCK_DGRAM if protocol is Transport.UDP else socket.SOCK_STREAM
        return socket.socket(socket.AF_INET, kind)


class _ClaimKey(NamedTuple):
    """What two Services cannot both have; an unspecified address: a NodePort."""

    protocol: Transport
    address: IPv4Address
    port: int

    def __str__(self) -> str:
        if self.address.is_unspecified:
            return f"NodePort {self.port}/{self.protocol}"
        return f"{self.address}:{self.port}/{self.protocol}, an address of this node,"


@dataclass(slots=True)
class _Claim:
    owner: ServicePortName
    socket: socket.socket


@dataclass(slots=True)
class _Served:
    """A service port with a proxy port. ``rules`` are wanted, ``installed`` those that the kernel has taken."""

    service: ServicePort
    listener: socket.socket
    port: int
    rules: tuple[Rule, ...] = ()
    installed: tuple[Rule, ...] = ()


_NODE_PORT_ADDRESS: Final = IPv4Address("0.0.0.0")


class UserspaceProxier:
    """Makes the proxy ports and rules of one node equal to a state.

    A full sync reads what rules are there and writes what differs; it is due at the start, after a failure, when the
    settings changed, and when `require_full` was called. A partial one deletes and appends the rules of what changed.

    Args:
        iptables: The tools, in the node's network namespace.
        config: The node's configuration: portRange, udpIdleTimeout.
        sockets: Opens sockets there.
        process: Carries the traffic.
        local_addresses: Returns the node's addresses: those are claimed.
        clock, sleep: Seconds that only grow.
        choose: Picks proxy ports out of portRange.
    """

    def __init__(
        self,
        iptables: Iptables,
        config: KubeProxyConfig,
        *,
        sockets: Sockets | None = None,
        process: CopyProcess | None = None,
        local_addresses: Callable[[], Iterable[IPv4Address]] = list_local_addresses,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        choose: Callable[[Sequence[int]], int] = secrets.choice,
    ) -> None:
        #: Told what the copying process has to say, from a thread; set by whoever has a log and events.
        self.on_notice: Callable[[Notice], None] = lambda notice: None
        self._iptables = iptables
        self._sockets = sockets or NodeSockets()
        self._process = process or CopyProcess(
            udp_idle_s=config.udp_idle_timeout_s, on_notice=lambda notice: self.on_notice(notice)
        )
        self._local_addresses = local_addresses
        self._clock = clock
        self._sleep = sleep
        self._pool = PortPool(*config.port_range, choose) if config.port_range else None
        self._served: dict[ServicePortName, _Served] = {}
        self._leaving: list[tuple[ServicePortName, _Served]] = []  # whose rules are to go, and then their ports
        self._claims: dict[_ClaimKey, _Claim] = {}
        self._claimed_by: dict[ServicePortName, set[_ClaimKey]] = {}
        self._unserved: dict[ServicePortName, Unserved] = {}
        self._settings: UserspaceSettings | None = None
        self._full_due = True
        self._has_started = False

    def start(self) -> None:
        """Empty our chains, whose rules lead to the ports of a kube-proxy that is no more, and start the copying process.

        Raises:
            KernelError: a tool refused.
            LabError: the process does not start.
        """
        if not self._has_started:
            self._iptables.apply(render_start(parse_installed(self._iptables.save())))
            self._process.start()
            self._has_started = True

    def stop(self) -> None:
        """End the copying process and close all ports. Rules stay, as upstream leaves them."""
        self._process.stop()
        for claim in self._claims.values():
            claim.socket.close()
        for served in self._served.values():
            served.listener.close()

    def make_settings(
        self,
        config: KubeProxyConfig,
        node: NodeView,
        local_addresses: Collection[IPv4Address],
        service_cidrs: Collection[IPv4Network] = (),
    ) -> UserspaceSettings:
        """Return what `sync` takes for a node; ServiceCIDRs have no part in this mode."""
        return make_userspace_settings(config, node)

    def require_full(self) -> None:
        self._full_due = True

    @property
    def pid(self) -> int:
        """The process that copies, 0 while there is none."""
        return self._process.pid

    @property
    def ports(self) -> dict[ServicePortName, int]:
        """The proxy port of each service port."""
        return {name: served.port for name, served in self._served.items()}

    def answering(self, state: ProxyState) -> ProxyState:
        """Return a state with proxy ports as endpoints: who answers UDP clients, as connection tracking has it."""
        return answering_state(state, self.ports, tuple(self._local_addresses()))

    def sync(
        self, state: ProxyState, changed: frozenset[ServicePortName], settings: UserspaceSettings
    ) -> UserspaceSyncReport:
        """Bring the node to ``state``; ``changed`` names what differs from the previous call.

        Raises:
            KernelError: nothing is lost: the next call makes a full sync.
        """
        self.start()
        if settings != self._settings:
            self._full_due = True
        full, self._full_due = self._full_due, True  # until this one has succeeded
        names = {*state.services, *self._served} if full else changed | self._unserved.keys()
        self._settings = settings
        wanted = sorted(name for name in names if name in state.services)
        for name in names:
            self._unserved.pop(name, None)
        for name in sorted(names & self._served.keys()):
            service = state.services.get(name)
            if service is None:
                self._release(name, ())
            if service is None or not keeps_proxy_port(self._served[name].service, service):
                self._leaving.append((name, self._served.pop(name)))
        if self._pool is not None and self._leaving:  # it may have no port to spare
            self._write((), self._leaving_rules(), full=False)
            self._leave()
        self._want_all(wanted, state, settings)
        text, added, refused, partial_failed = self._write(wanted, self._leaving_rules(), full)
        self._leave()
        self._process.purge()
        self._full_due = bool(refused)
        payload = self._payload(text, added)
        return UserspaceSyncReport(full or partial_failed, payload, refused, dict(self._unserved), partial_failed)

    # -- ports and claims ----------------------------------------------------------------------------------------------

    def _want_all(self, names: Sequence[ServicePortName], state: ProxyState, settings: UserspaceSettings) -> None:
        """Open ports, and make up the rules of these service ports."""
        local = frozenset(self._local_addresses())
        claims = {name: self._claims_of(state.services[name], local) for name in names}
        for name in names:
            self._release(name, claims[name])  # first, so that another one can have it
        for name in names:
            service = state.services[name]
            served = self._served.get(name) or self._listen(service, settings)
            if served is None:
                continue
            served.service = service
            endpoints = balanced_endpoints(state.endpoints.get(name, ()))
            self._process.set(name, endpoints, service.affinity_timeout_s)
            served.rules = tuple(self._rules(served, claims[name], settings))

    def _listen(self, service: ServicePort, settings: UserspaceSettings) -> _Served | None:
        name = service.name
        if not is_supported(service):
            message = "userspace mode copies TCP and UDP only; SCTP needs iptables, ipvs or nftables mode"
            self._unserved[name] = Unserved("ProtocolNotSupported", message)
            return None
        try:
            listener = self._open(service.protocol, settings.listen_ip)
        except OSError as error:
            message = f"no proxy port can be opened on {settings.listen_ip}: {error.strerror or error}"
            self._unserved[name] = Unserved("NoProxyPort", message)
            return None
        self._process.open(name, listener)
        served = self._served[name] = _Served(service, listener, int(listener.getsockname()[1]))
        return served

    def _open(self, protocol: Transport, address: IPv4Address) -> socket.socket:
        if self._pool is None:
            return self._sockets.listen(protocol, address, 0)
        problem = OSError(0, f"every port of portRange {self._pool} is in use")
        deadline_s = self._clock() + _ALLOCATION_S
        for _ in range(_BIND_TRIES):
            while (port := self._pool.take(self._clock())) is None:
                free_s = self._pool.free_at_s
                if free_s is None or free_s > deadline_s:
                    raise problem
                self._sleep(max(0.0, free_s - self._clock()))
            try:
                return self._sockets.listen(protocol, address, port)
            except OSError as error:
                self._pool.give_back(port, self._clock())
                problem = OSError(error.errno, f"port {port} of portRange {self._pool}: {error.strerror}")
        raise problem

    def _leaving_rules(self) -> list[Rule]:
        return [rule for _, served in self._leaving for rule in served.installed]

    def _leave(self) -> None:
        """Close proxy ports that no rule leads to any more: of service ports that are gone, or have another one now."""
        while self._leaving:
            name, served = self._leaving.pop()
            if name in self._served:
                self._process.leave(name)
            else:
                self._process.close(name)
            served.listener.close()
            if self._pool is not None:
                self._pool.give_back(served.port, self._clock())

    @staticmethod
    def _claims_of(service: ServicePort, local: Collection[IPv4Address]) -> tuple[_ClaimKey, ...]:
        if not is_supported(service):
            return ()
        found = [_ClaimKey(service.protocol, p.address, p.port) for p in portals_of(service) if p.address in local]
        if service.node_port:
            found.append(_ClaimKey(service.protocol, _NODE_PORT_ADDRESS, service.node_port))
        return tuple(found)

    def _release(self, name: ServicePortName, keep: Collection[_ClaimKey]) -> None:
        claimed = self._claimed_by.pop(name, set())
        for key in claimed.difference(keep):
            self._claims.pop(key).socket.close()
        if kept := claimed.intersection(keep):
            self._claimed_by[name] = kept

    def _claim(self, name: ServicePortName, key: _ClaimKey) -> str:
        """Make an address and port this service port's; return who else has it, '' when that worked."""
        claim = self._claims.get(key)
        if claim is None:
            try:
                self._claims[key] = _Claim(name, self._sockets.claim(*key))
            except OSError as error:
                return f"{key} cannot be claimed on this node: {error.strerror}"
            self._claimed_by.setdefault(name, set()).add(key)
            return ""
        return "" if claim.owner == name else f"{key} is claimed by Service {claim.owner} already"

    def _rules(self, served: _Served, claims: Collection[_ClaimKey], settings: UserspaceSettings) -> Iterable[Rule]:
        service, problems = served.service, []
        for portal in portals_of(service):
            key = _ClaimKey(service.protocol, portal.address, portal.port)
            if key in claims and (problem := self._claim(service.name, key)):
                problems.append(problem)
                continue
            yield from render_portal(service, portal, served.port, settings)
        if service.node_port:
            key = _ClaimKey(service.protocol, _NODE_PORT_ADDRESS, service.node_port)
            if problem := self._claim(service.name, key):
                problems.append(problem)
            else:
                yield from render_node_port(service, served.port, settings)
        if problems:
            self._unserved[service.name] = Unserved("PortConflict", "; ".join(problems))

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _write(
        self, names: Iterable[ServicePortName], remove: Sequence[Rule], full: bool
    ) -> tuple[str, list[Rule], dict[ServicePortName, str], bool]:
        """Write what changed, or all; return the text, the rules it adds, what was refused, and whether a change failed."""
        if not full:
            remove, add = list(remove), []
            for served in (self._served[name] for name in names if name in self._served):
                remove += [rule for rule in served.installed if rule not in served.rules]
                add += [rule for rule in served.rules if rule not in served.installed]
            try:
                text = render_changes(remove, add)
                self._iptables.apply(text)
                for name in names:
                    if name in self._served:
                        self._served[name].installed = self._served[name].rules
                return text, add, {}, False
            except (RulesRejected, CommandError):
                pass  # somebody else changed our chains, or one service port is at fault: look
        text, added, refused = self._write_all()
        return text, added, refused, not full

    def _write_all(self) -> tuple[str, list[Rule], dict[ServicePortName, str]]:
        installed = parse_installed(self._iptables.save())
        if len(installed.hooks) < len(HOOKS) or len(installed.chains) < sum(map(len, CHAINS.values())):
            self._iptables.apply(render_start(installed))
            installed = parse_installed(self._iptables.save())
        remove, add = plan_repair(self._wanted(), installed)
        text = render_changes(remove, add)
        refused: dict[ServicePortName, str] = {}
        try:
            self._iptables.apply(text)
        except (RulesRejected, CommandError):
            # Is it the tool or a rule? An empty transaction is refused by the tool only.
            self._iptables.apply(render_changes(remove, ()) or "*nat\nCOMMIT\n")
            refused = self._add_each(set(add))
        for name, served in self._served.items():
            served.installed = () if name in refused else served.rules
        return text, add, refused

    def _add_each(self, missing: Collection[Rule]) -> dict[ServicePortName, str]:
        """Add the missing rules of one service port after the other; return those that are refused, and why."""
        refused: dict[ServicePortName, str] = {}
        for name, served in sorted(self._served.items()):
            add = [rule for rule in served.rules if rule in missing]
            try:
                self._iptables.apply(render_changes((), add))
            except RulesRejected as error:
                refused[name] = error.reason
            except CommandError as error:
                refused[name] = error.stderr.strip()
        return refused

    def _wanted(self) -> list[Rule]:
        return [rule for _, served in sorted(self._served.items()) for rule in served.rules]

    def _payload(self, text: str, added: Iterable[Rule]) -> RestorePayload:
        rules, written = dict.fromkeys(CHAINS, 0), dict.fromkeys(CHAINS, 0)
        for served in self._served.values():
            for rule in served.installed:
                rules[rule.table] += 1
        for rule in added:
            written[rule.table] += 1
        return RestorePayload(text, rules, written, (0, 0))

    def tend(self) -> float:
        """Return in how many seconds time alone makes something due: the copying process sees to that itself."""
        return math.inf

    def find_damage(self) -> str:
        """Return in a few words what of the last sync is no longer in the kernel, or ''."""
        if self._full_due:
            return ""
        wanted = [rule for served in self._served.values() for rule in served.installed]
        return find_damage(wanted, parse_installed(self._iptables.save()))


def clean_up_userspace(iptables: Iptables) -> None:
    """Remove the rules of userspace mode.

    Raises:
        KernelError: the tools are missing or refused.
    """
    iptables.apply(render_cleanup(parse_installed(iptables.save())))
