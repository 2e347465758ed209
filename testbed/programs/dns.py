"""What runs in the pods of Deployment coredns: dnsmasq, and around it what keeps it equal to the API's objects.

::

    watcher threads (services, endpointslices, namespaces, pods) ── queue ── main loop ──▶ hosts file, SIGHUP ──▶ dnsmasq :53
                                                                       └─────▶ zone ◀── responder 127.0.0.1:5355 ◀── ┘

dnsmasq reads its hosts file as a whole, and answers nothing meanwhile (1,000 names: 8 ms; 20,000: 0.15 s). So changes that
come together are written together, and the next reading begins no sooner than it leaves dnsmasq time to answer.

Its configuration follows the Corefile, which is looked at twice a second: one that is wrong is refused in CoreDNS' words,
and the old one stays. SIGTERM ends the program after the Corefile's lameduck time, in which it still answers.

Source: CoreDNS v1.11 plugin/{health,ready,reload,metrics}; dnsmasq(8).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from dnslib import DNSRecord

from testbed.dataplane.corefile import (
    DNS_PORT,
    RESPONDER_PORT,
    SERIAL_ZONE,
    CorefileError,
    DnsConfig,
    parse_corefile,
    render_dnsmasq,
)
from testbed.dataplane.dns import NAMESPACES, PODS, SERVICES, SLICES, Zone
from testbed.errors import InputError, KernelError
from testbed.kernel.processes import reap_orphans
from testbed.model.dns import PodMode, Rcode
from testbed.programs.answers import Answer, Listener
from testbed.programs.dns_responder import MALFORMED, Responder
from testbed.programs.kube_proxy import Changed, Listed, Stop, Watcher

HEALTH_PORT: Final = 8080
READY_PORT: Final = 8181
METRICS_PORT: Final = 9153
FOLDER: Final = "/run/coredns"
_LOOPBACK: Final = "127.0.0.1"
_COREFILE_EVERY_S: Final = 0.5
_REST_SHARE: Final = 2.0  # after a reading of the hosts file, dnsmasq answers for at least so many times as long
_MOST_REST_S: Final = 0.4
_READ_WITHIN_S: Final = 5.0
_ASK_AGAIN_S: Final = 0.05
#: The warning is about addresses that are not private, as a pod network may have.
_EVERYDAY: Final = ("started, ", "compile time options: ", "using ", "read ", "LOUD WARNING: ")
_RESTART_PAUSE_S: Final = 0.5  # when dnsmasq ends as soon as it has started


@dataclass(frozen=True, slots=True)
class Ended:
    """dnsmasq has ended."""

    pid: int
    status: int


Message = Listed | Changed | Stop | Ended


class Dnsmasq:
    """The dnsmasq of this pod: its files, its process, and whether it has read them.

    Args:
        folder: where its files are written.
        ended: called with each `Ended`, on another thread.
    """

    def __init__(self, folder: Path, ended: Callable[[Ended], None]) -> None:
        self._folder = folder
        self._ended = ended
        self._serial = 0
        self._hosts = ""
        self.pid = 0
        self.is_alive = False
        self.reloads = 0
        self.last_reload_s = 0.0

    @property
    def hosts_file(self) -> Path:
        return self._folder / "hosts"

    def configure(self, text: str) -> None:
        """Take a configuration; `start` uses it.

        Raises:
            KernelError: dnsmasq refuses it; the old one stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        candidate = self._folder / "dnsmasq.conf.new"
        candidate.write_text(text)
        done = subprocess.run(
            ["dnsmasq", "--test", "-C", str(candidate)], capture_output=True, text=True, timeout=10, check=False
        )
        if done.returncode != 0:
            raise KernelError(f"dnsmasq refuses its configuration: {done.stderr.strip()}")
        candidate.replace(self._folder / "dnsmasq.conf")

    def start(self) -> None:
        """Start it; it reads the hosts file as it is now."""
        self._write_hosts()
        # Until dnsmasq has a handler of its own, a SIGHUP would end it.
        ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            process = subprocess.Popen(
                ["dnsmasq", "--keep-in-foreground", "-C", str(self._folder / "dnsmasq.conf")],
                stderr=subprocess.PIPE, text=True, errors="replace", restore_signals=False,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGHUP, ignored)
        self.pid, self.is_alive = process.pid, True
        assert process.stderr
        threading.Thread(target=_pass_on, args=(process.stderr,), name="dnsmasq-log", daemon=True).start()
        threading.Thread(target=self._wait, args=(process,), name="dnsmasq", daemon=True).start()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        status = process.wait()
        self.is_alive = False
        self._ended(Ended(process.pid, status))

    def stop(self) -> None:
        """End it; `ended` will be called."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def show(self, hosts: str) -> bool:
        """Have dnsmasq read another hosts file, and return whether that made a difference."""
        if hosts == self._hosts:
            return False
        self._hosts = hosts
        self._write_hosts()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        return True

    def _write_hosts(self) -> None:
        self._serial += 1
        new = self.hosts_file.with_suffix(".new")
        # The serial's line comes last, so that a PTR of its address is another name's.
        new.write_text(f"{self._hosts}0.0.0.0 {self._serial}.{SERIAL_ZONE}\n")
        new.replace(self.hosts_file)

    def wait_until_read(self, within_s: float = _READ_WITHIN_S) -> bool:
        """Return whether dnsmasq answers from the hosts file as it was last written, waiting for that."""
        began = time.monotonic()
        query = DNSRecord.question(f"{self._serial}.{SERIAL_ZONE}")
        while self.is_alive and time.monotonic() - began < within_s:
            reply = _ask_loopback(bytes(query.pack()), _ASK_AGAIN_S)
            if reply is not None and reply.rr:
                self.reloads += 1
                self.last_reload_s = time.monotonic() - began
                return True
            time.sleep(0.001)
        return False


def _pass_on(said: IO[str]) -> None:
    """Write into the pod's log what dnsmasq says, until nobody has its standard error: a child may outlive it."""
    with said:
        for line in said:
            if is_remarkable(line):
                sys.stderr.write(line)
                sys.stderr.flush()


def is_remarkable(line: str) -> bool:
    """Say whether a line of dnsmasq belongs into the pod's log: not that it has started or read the hosts file again, which it
    does at each change of a Service, nor our own questions whether it has.
    """
    _, _, message = line.partition("]: ")
    return not message.startswith(_EVERYDAY) and f".{SERIAL_ZONE} " not in message


def _ask_loopback(query: bytes, timeout_s: float) -> DNSRecord | None:
    """Return what dnsmasq answers, or None when it does not in time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(timeout_s)
        try:
            made.connect((_LOOPBACK, DNS_PORT))
            made.send(query)
            return DNSRecord.parse(made.recv(4096))
        except (OSError, *MALFORMED):
            return None


class ClusterDns:
    """Takes messages in, and keeps zone and dnsmasq equal to the objects. Only one thread uses it.

    Args:
        on_watch: called with a resource that is to be watched from now on.
    """

    def __init__(
        self, config: DnsConfig, text: str, dnsmasq: Dnsmasq, responder: Responder,
        *, addresses: tuple[str, ...], log: Callable[[str], None], on_watch: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.config = config
        self.is_ready = False
        self._text = text
        self._dnsmasq = dnsmasq
        self._responder = responder
        self._addresses = addresses
        self._log = log
        self._on_watch = on_watch
        self._clock = clock
        self._not_listed: set[str] = set()
        self._watched: set[str] = set()
        self._is_due = False
        self._not_before_s = 0.0
        self._started_s = 0.0

    @property
    def dnsmasq_pid(self) -> int:
        return self._dnsmasq.pid

    def start(self) -> None:
        """Start dnsmasq and the watches.

        Raises:
            KernelError: dnsmasq refuses its configuration.
        """
        self._dnsmasq.configure(self._render(self.config))
        self._start_dnsmasq()
        self._watch_what_is_needed()

    def _render(self, config: DnsConfig) -> str:
        return render_dnsmasq(config, addresses=self._addresses, hosts_file=str(self._dnsmasq.hosts_file))

    def _start_dnsmasq(self) -> None:
        self._started_s = self._clock()
        self._dnsmasq.start()

    def _watch_what_is_needed(self) -> None:
        wanted = [SERVICES, SLICES, NAMESPACES]
        if self.config.zone.pods is PodMode.VERIFIED:
            wanted.append(PODS)
        for resource in wanted:
            if resource not in self._watched:
                self._watched.add(resource)
                self._not_listed.add(resource)
                self._on_watch(resource)

    def accept(self, messages: Iterable[Message]) -> None:
        """Take in what came together; questions that only the responder answers see it at once."""
        changes: list[Listed | Changed] = []
        for message in messages:
            if isinstance(message, Ended):
                self._revive(message)
            elif isinstance(message, Listed | Changed):
                changes.append(message)
        if not changes:
            return
        self._not_listed -= {message.resource for message in changes if isinstance(message, Listed)}

        def change(zone: Zone) -> None:
            for message in changes:
                if isinstance(message, Listed):
                    zone.replace(message.resource, message.objects)
                elif message.deleted:
                    metadata = message.object["metadata"]
                    zone.delete(message.resource, metadata.get("namespace", ""), metadata["name"])
                else:
                    zone.put(message.resource, message.object)

        self._responder.update(change, synced=not self._not_listed)
        self._is_due = True

    def _revive(self, ended: Ended) -> None:
        """Start dnsmasq again: nobody else does, because to the kubelet the container runs."""
        if ended.pid != self._dnsmasq.pid:
            return
        self._log(f"dnsmasq ended with status {ended.status}; starting it again")
        if self._clock() - self._started_s < _RESTART_PAUSE_S:
            time.sleep(_RESTART_PAUSE_S)
        self._start_dnsmasq()
        self._is_due = True
        self._not_before_s = 0.0

    @property
    def is_up_to_date(self) -> bool:
        """Say whether dnsmasq has been told everything that was accepted."""
        return not self._is_due and not self._not_listed

    def wait_s(self) -> float:
        """Return how long nothing needs to be done if no message comes."""
        if not self._is_due or self._not_listed:
            return _COREFILE_EVERY_S
        return min(_COREFILE_EVERY_S, max(0.0, self._not_before_s - self._clock()))

    def step(self) -> None:
        """Do what is due."""
        if not self._is_due or self._not_listed or self._clock() < self._not_before_s:
            return
        self._is_due = False
        hosts = self._responder.read(lambda zone: zone.hosts_text())
        if self._dnsmasq.show(hosts) or not self.is_ready:
            if not self._dnsmasq.wait_until_read():
                self._log("dnsmasq has not read its hosts file in time")
                self._is_due = True  # nobody else may have a reason to look again
                self._not_before_s = self._clock() + _MOST_REST_S
                return
            took_s = self._dnsmasq.last_reload_s
            self._not_before_s = self._clock() + min(_MOST_REST_S, _REST_SHARE * took_s)
        self.is_ready = True

    def follow(self, text: str, read: Callable[[str], DnsConfig]) -> None:
        """Take another Corefile, unless it is wrong."""
        if text == self._text:
            return
        self._text = text
        try:
            config = read(text)
            if self._render(config) != self._render(self.config):
                self._dnsmasq.configure(self._render(config))
                self._dnsmasq.stop()
        except (CorefileError, KernelError) as error:
            self._log(f"[ERROR] Restart failed: {error}")
            return
        self.config = config
        self._responder.update(lambda zone: zone.configure(config.zone), config=config)
        self._watch_what_is_needed()
        self._is_due = True
        self._log("[INFO] Reloading complete")


class Faces:
    """What the pod answers on its HTTP ports."""

    def __init__(
        self, is_ready: Callable[[], bool], dnsmasq: Dnsmasq, count_replies: Callable[[Rcode], int]
    ) -> None:  # fmt: skip
        self._is_ready = is_ready
        self._dnsmasq = dnsmasq
        self._count_replies = count_replies

    def health(self, path: str) -> Answer:
        return Answer(200, "OK") if path == "/health" else Answer(404, "404 page not found\n")

    def ready(self, path: str) -> Answer:
        if path != "/ready":
            return Answer(404, "404 page not found\n")
        return Answer(200, "OK") if self._is_ready() else Answer(503, "kubernetes")

    def metrics(self, path: str) -> Answer:
        if path != "/metrics":
            return Answer(404, "404 page not found\n")
        local, forwarded = (_statistic(name) for name in ("hits.bind", "misses.bind"))
        rows = [
            ("coredns_dns_requests_total", "counter", local + forwarded),
            ("coredns_forward_requests_total", "counter", forwarded),
            ("coredns_hosts_reloads_total", "counter", self._dnsmasq.reloads),
            ("coredns_hosts_reload_seconds", "gauge", self._dnsmasq.last_reload_s),
        ]
        text = "".join(f"# TYPE {name} {kind}\n{name} {value:.9g}\n" for name, kind, value in rows)
        # What dnsmasq answers itself (names with an address) is not among these: NXDOMAIN never is.
        text += "# TYPE coredns_dns_responses_total counter\n" + "".join(
            f'coredns_dns_responses_total{{rcode="{rcode.name}"}} {self._count_replies(rcode)}\n' for rcode in Rcode
        )
        return Answer(200, text, "text/plain; version=0.0.4; charset=utf-8")


def _statistic(name: str) -> int:
    """Return one of dnsmasq's counters: ``hits.bind`` are its own answers, ``misses.bind`` questions it passed on."""
    reply = _ask_loopback(bytes(DNSRecord.question(name, "TXT", "CH").pack()), 1.0)
    texts = [str(rr.rdata).strip('"') for rr in reply.rr] if reply else []
    return int(texts[0]) if texts and texts[0].isdigit() else 0


def parse_command(argv: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """Return the Corefile's path and the API's socket of a container's command line and environment.

    Raises:
        InputError: what is missing or unknown.
    """
    given = {"conf": "Corefile"}
    words = list(argv[1:])
    while words:
        name, equals, value = words.pop(0).lstrip("-").partition("=")
        if name in ("quiet", "version", "plugins"):
            continue
        if name not in ("conf", "dns.port", "p", "pidfile"):
            raise InputError(f"coredns: flag provided but not defined: -{name}")
        if not equals:
            value = words.pop(0) if words else ""
        if name in ("dns.port", "p") and value != str(DNS_PORT):
            raise InputError(f"coredns: only port {DNS_PORT} is served here, got {value!r}")
        given[name] = value
    socket_path = env.get("TESTBED_API_SOCKET", "")
    if not socket_path:
        raise InputError("coredns: TESTBED_API_SOCKET is not set: mount the API's folder, as Deployment coredns does")
    return {"corefile": given["conf"], "api_socket": socket_path}


def main(argv: Sequence[str], address: str) -> int:
    """Run until SIGTERM and return the exit status: 0, or 1 when it could not start.

    Args:
        argv: the container's command.
        address: the pod's.
    """
    from testbed.api.client import ApiClient

    def log(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def read(text: str) -> DnsConfig:
        return parse_corefile(text, server=address, read_file=lambda path: Path(path).read_text())

    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: messages.put(Stop()))
    try:
        command = parse_command(argv, os.environ)
        corefile = Path(command["corefile"])
        text = corefile.read_text()
        config = read(text)
    except (InputError, OSError) as error:
        log(str(error))
        return 1

    def watch(resource: str) -> None:
        watcher = Watcher(ApiClient(command["api_socket"]), resource, messages.put, log)
        threading.Thread(target=watcher.run, name=f"watch-{resource}", daemon=True).start()

    responder = Responder(Zone(config.zone), config)
    dnsmasq = Dnsmasq(Path(FOLDER), messages.put)
    dns = ClusterDns(
        config, text, dnsmasq, responder, addresses=(address, _LOOPBACK), log=log, on_watch=watch
    )  # fmt: skip
    faces = Faces(lambda: dns.is_ready, dnsmasq, responder.count_replies)
    try:
        responder.start(_LOOPBACK, RESPONDER_PORT)
        dns.start()
        Listener("0.0.0.0", HEALTH_PORT, faces.health)
        Listener("0.0.0.0", METRICS_PORT, faces.metrics)
    except (OSError, KernelError) as error:
        log(f"coredns: {error}")
        return 1
    log(".:53\nCoreDNS-1.11.1 (testbed: dnsmasq)")
    run(dns, messages, corefile, read, on_ready=lambda: Listener("0.0.0.0", READY_PORT, faces.ready))
    return 0


def run(
    dns: ClusterDns, messages: queue.SimpleQueue[Message], corefile: Path, read: Callable[[str], DnsConfig],
    on_ready: Callable[[], Any],
) -> None:  # fmt: skip
    """Turn the loop until a `Stop` arrives. Messages that wait together are taken in together."""
    announced = False
    next_look_s = 0.0
    stop_at_s = float("inf")
    while time.monotonic() < stop_at_s:
        batch: list[Message] = []
        with contextlib.suppress(queue.Empty):
            batch.append(messages.get(timeout=max(0.0, min(dns.wait_s(), stop_at_s - time.monotonic()))))
            while True:
                batch.append(messages.get_nowait())
        if any(isinstance(message, Stop) for message in batch):
            stop_at_s = min(stop_at_s, time.monotonic() + dns.config.lameduck_s)
        dns.accept(batch)
        dns.step()
        if dns.is_ready and not announced:
            announced = True
            on_ready()  # not before: whoever probes is refused until then, and tries again soon
        if time.monotonic() >= next_look_s:
            next_look_s = time.monotonic() + _COREFILE_EVERY_S
            reap_orphans(dns.dnsmasq_pid)
            with contextlib.suppress(OSError):  # a ConfigMap that is being replaced
                dns.follow(corefile.read_text(), read)
