"""Keeps nginx equal to the API's objects.

::

    watchers ── queue ──▶ world ── translate, render ──▶ text ──▶ nginx -t, reload      (pods came or went: reload only)
                                                          └─ refused: the Ingress is named, the old text stays

What comes together is applied together: the loop waits until nothing has come for a moment, but never long. A change of
endpoints after a time without any is one pod that came or went, and waits for nothing.

Source: kubernetes/ingress-nginx internal/ingress/controller/{controller,nginx}.go (v1.10): what a reload is, its events
and metrics.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from testbed.dataplane.ingress.endpoints import same_but_for_endpoints, with_endpoints
from testbed.dataplane.ingress.figures import certificate_ends, orphans
from testbed.dataplane.ingress.model import Document, IngressKey
from testbed.dataplane.ingress.render import Renderer
from testbed.dataplane.ingress.settings import Options
from testbed.dataplane.ingress.translate import translate
from testbed.dataplane.ingress.world import (
    CLASSES,
    CONFIGMAPS,
    INGRESSES,
    SECRETS,
    SERVICE_NAME_LABEL,
    SERVICES,
    SLICES,
    Name,
    World,
    our_ingresses,
)
from testbed.model.objects import Object, labels_of, name_of, namespace_of
from testbed.programs.ingress.nginx_process import ConfigRefused, Ended
from testbed.programs.kube_proxy import Changed, Listed, Stop
from testbed.programs.proxy_status import ProxyMetrics

RESOURCES: Final = (INGRESSES, CLASSES, SERVICES, SLICES, SECRETS, CONFIGMAPS)
#: Changes that come within this time of each other are applied together.
QUIET_S: Final = 0.03
#: A change waits at most so long for others.
LONGEST_WAIT_S: Final = 0.2
_RESTART_PAUSE_S: Final = 0.5
_MAX_LEFT_OUT: Final = 100

Message = Listed | Changed | Stop | Ended


class Nginx(Protocol):
    """What the loop needs of `nginx_process.NginxProcess`."""

    pid: int
    generation: int

    @property
    def is_alive(self) -> bool: ...

    def write_files(self, files: Mapping[str, bytes]) -> None: ...

    def forget_files(self, kept: Mapping[str, bytes]) -> None: ...

    def test(self, text: str) -> None: ...

    def start(self, text: str) -> None: ...

    def reload(self, text: str) -> None: ...

    def end_orphans(self) -> None: ...


class IngressLoop:
    """Takes messages in, and applies what they make of the configuration. Only one thread uses it.

    Args:
        default_certificate: PEM for hosts that have none.
        resolvers: DNS servers of the pod.
        tell: writes an event about an object: kind, reason, message.
        clock: seconds, for waiting.
    """

    def __init__(
        self, options: Options, nginx: Nginx, metrics: ProxyMetrics, *, default_certificate: bytes,
        resolvers: tuple[str, ...] = (), log: Callable[[str], None] = lambda line: None,
        tell: Callable[[Object, str, str, str], None] = lambda obj, kind, reason, message: None,
        pod: Object | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.options = options
        self.world = World()
        self.has_synced = False
        self._nginx = nginx
        self._metrics = metrics
        self._default_certificate = default_certificate
        self._resolvers = resolvers
        self._log = log
        self._tell = tell
        self._pod = pod
        self._clock = clock
        self._lock = threading.Lock()  # of the world: others look at it
        self._not_listed = set(RESOURCES)
        self._is_due = False
        self._changed_services: set[Name] | None = set()  # None: more than endpoints changed
        self._first_s = self._last_s = 0.0
        self._applied_s = 0.0
        self._renderer = Renderer()
        self._document: Document | None = None
        self._text = ""
        self._refused = ""
        self._noted: set[tuple[IngressKey | None, str]] = set()
        self._synced: set[tuple[Name, str]] = set()
        self._started_s = 0.0

    @property
    def nginx_pid(self) -> int:
        return self._nginx.pid

    # -- taking in ---------------------------------------------------------------------------------------------------

    def accept(self, messages: Iterable[Message]) -> None:
        """Take in what came together."""
        for message in messages:
            if isinstance(message, Ended):
                self._revive(message)
            elif isinstance(message, Listed):
                self._not_listed.discard(message.resource)
                self._replace(message)
            elif isinstance(message, Changed):
                self._change(message)

    def _replace(self, message: Listed) -> None:
        table = self.world.table(message.resource)
        assert table is not None, message.resource
        with self._lock:
            table.clear()
            table.update({(namespace_of(obj), name_of(obj)): obj for obj in message.objects})
        self._mark(None)

    def _change(self, message: Changed) -> None:
        table = self.world.table(message.resource)
        assert table is not None, message.resource
        obj = message.object
        name = (namespace_of(obj), name_of(obj))
        with self._lock:
            old = table.get(name)
            if message.deleted:
                table.pop(name, None)
            else:
                table[name] = obj
        if message.resource == SLICES:
            services = {labels_of(one).get(SERVICE_NAME_LABEL, "") for one in (old, obj) if one is not None}
            self._mark({(name[0], service) for service in services if service})
        elif _matters(message.resource, None if message.deleted else obj, old):
            self._mark(None)

    def _mark(self, services: set[Name] | None) -> None:
        now = self._clock()
        if not self._is_due:
            self._first_s = now
        self._last_s = now
        self._is_due = True
        if services is None or self._changed_services is None:
            self._changed_services = None
        else:
            self._changed_services |= services

    def see(self) -> tuple[Mapping[Name, Object], Mapping[Name, Object], Mapping[Name, Object]]:
        """Return our Ingresses, all Ingresses and all Services as of now; for other threads."""
        with self._lock:
            ours = {(namespace_of(one), name_of(one)): one for one in our_ingresses(self.world, self.options)}
            return ours, dict(self.world.ingresses), dict(self.world.services)

    # -- acting ------------------------------------------------------------------------------------------------------

    def wait_s(self) -> float:
        """Return how long nothing is to be done if no message comes."""
        if not self._is_due or self._not_listed:
            return 1.0
        now = self._clock()
        if self._changed_services and now - self._applied_s >= LONGEST_WAIT_S:
            return 0.0
        return max(0.0, min(self._last_s + QUIET_S, self._first_s + LONGEST_WAIT_S) - now)

    def step(self) -> None:
        """Apply what is due."""
        if not self._is_due or self._not_listed or self.wait_s() > 0:
            return
        changed, self._changed_services, self._is_due = self._changed_services, set(), False
        document = None
        if self._document is not None and changed is not None and self._nginx.is_alive:
            document = with_endpoints(self._document, self.world, changed)
        endpoints_only = document is not None
        if document is None:
            before = self._document
            document = translate(
                self.world, self.options, default_certificate=self._default_certificate, resolvers=self._resolvers
            )
            self._show_notes(document)
            self._show_figures(document)
            endpoints_only = changed is not None and before is not None and same_but_for_endpoints(before, document)
        text = self._renderer.render(document)
        if not self._nginx.is_alive:
            self._start(document, text)
        elif text == self._text:
            # also when only files changed: their names are in the text
            self._document = document
        elif text != self._refused:
            self._apply(document, text, tested=endpoints_only)
        self._applied_s = self._clock()
        self._tell_synced()

    def _apply(self, document: Document, text: str, *, tested: bool) -> None:
        began = self._clock()
        try:
            self._nginx.write_files(document.files)
            if not tested:
                self._nginx.test(text)
            self._nginx.reload(text)
        except (ConfigRefused, OSError) as error:
            self._refuse(text, error)
            return
        self._accepted(document, text)
        what = "endpoints" if tested else "configuration"
        self._log(f"{what} reloaded in {(self._clock() - began) * 1000:.0f} ms, generation {self._nginx.generation}")
        if tested:
            self._metrics.count("endpoint_updates")
        else:
            self._metrics.count("success")
            if self._pod is not None:
                message = "NGINX reload triggered due to a change in configuration"
                self._tell(self._pod, "Normal", "RELOAD", message)

    def _start(self, document: Document, text: str) -> None:
        """Start nginx. With nothing older to fall back on, Ingresses that it refuses are left out, one by one."""
        self._started_s = self._clock()
        left_out: dict[Name, Object] = {}
        while True:
            try:
                self._nginx.write_files(document.files)
                self._nginx.test(text)
                self._nginx.start(text)
            except (ConfigRefused, OSError) as error:
                culprit = self._refuse(text, error)
                name = (culprit.namespace, culprit.name) if culprit else ("", "")
                if name not in self.world.ingresses or len(left_out) >= _MAX_LEFT_OUT:
                    self._is_due, self._first_s, self._last_s = True, self._clock() + 1.0, self._clock() + 1.0
                    self._changed_services, self._refused = None, ""
                    break
                left_out[name] = self.world.ingresses[name]
                self._log(f"starting without ingress {culprit}")
                without = {key: one for key, one in self.world.ingresses.items() if key not in left_out}
                world = World(
                    without, self.world.classes, self.world.services, self.world.slices, self.world.secrets,
                    self.world.configmaps,
                )  # fmt: skip
                document = translate(
                    world, self.options, default_certificate=self._default_certificate, resolvers=self._resolvers
                )
                text = self._renderer.render(document)
            else:
                self._accepted(document, text)
                if left_out:
                    self._document = None  # the next change is translated anew, with them
                self.has_synced = True
                self._log(f"nginx started, {len(document.servers)} servers, {len(document.upstreams)} upstreams")
                return

    def _accepted(self, document: Document, text: str) -> None:
        self._document, self._text, self._refused = document, text, ""
        self._nginx.forget_files(document.files)
        self._metrics.set("config_last_reload_successful", 1)
        self._metrics.set("config_last_reload_successful_timestamp_seconds", time.time())
        self._metrics.set("config_hash", int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))

    def _refuse(self, text: str, error: Exception) -> IngressKey | None:
        """Tell whose fault it is, and remember not to try this text again."""
        self._refused = text
        self._metrics.count("errors")
        self._metrics.set("config_last_reload_successful", 0)
        culprit = ingress_at(text, error.line) if isinstance(error, ConfigRefused) else None
        whose = f"ingress {culprit}: " if culprit else ""
        self._log(f"{whose}{error}; the last good configuration stays")
        found = self.world.ingresses.get((culprit.namespace, culprit.name)) if culprit else None
        if found is not None:
            self._tell(found, "Warning", "Rejected", f"{error}; the last good configuration stays")
        return culprit

    def _revive(self, ended: Ended) -> None:
        """Start nginx again: to the kubelet the container runs, so nobody else does."""
        if ended.pid != self._nginx.pid:
            return
        self._log(f"nginx ended with status {ended.status}; starting it again")
        self._nginx.end_orphans()
        if self._clock() - self._started_s < _RESTART_PAUSE_S:
            time.sleep(_RESTART_PAUSE_S)
        self._mark(None)
        self._last_s = self._first_s = self._clock() - LONGEST_WAIT_S  # at once

    # -- telling -----------------------------------------------------------------------------------------------------

    def _show_notes(self, document: Document) -> None:
        _, settings_notes = self.world.settings(self.options)
        notes: set[tuple[IngressKey | None, str]] = {*document.notes, *((None, note) for note in settings_notes)}
        for key, note in sorted(notes - self._noted, key=str):
            self._log(f"ingress {key}: {note}" if key else note)
        self._noted = notes

    def _show_figures(self, document: Document) -> None:
        self._metrics.replace(
            "orphan_ingress",
            (
                ({"namespace": key.namespace, "ingress": key.name, "type": kind}, float(is_so))
                for (key, kind), is_so in orphans(document).items()
            ),
        )
        own = {"namespace": namespace_of(self._pod) if self._pod else "", "class": self.options.controller_class}
        self._metrics.replace(
            "ssl_expire_time_seconds",
            (
                ({**own, "host": host, "secret_name": secret}, expires_s)
                for (host, secret), expires_s in certificate_ends(document).items()
            ),
        )

    def _tell_synced(self) -> None:
        """Write upstream's event about each Ingress that is new or changed."""
        seen = set()
        for ingress in our_ingresses(self.world, self.options):
            mark = ((namespace_of(ingress), name_of(ingress)), str(ingress["metadata"].get("generation", "")))
            seen.add(mark)
            if mark not in self._synced:
                self._tell(ingress, "Normal", "Sync", "Scheduled for sync")
        self._synced = seen


def _matters(resource: str, new: Object | None, old: Object | None) -> bool:
    """Say whether a change can make a difference: status and bookkeeping cannot."""
    if new is None or old is None:
        return True
    if resource in (INGRESSES, SERVICES, CLASSES):
        same = new.get("spec") == old.get("spec")
        return not same or new["metadata"].get("annotations") != old["metadata"].get("annotations")
    return any(new.get(part) != old.get(part) for part in ("data", "binaryData", "type"))


_COMMENT = re.compile(r"# ingress ([a-z0-9.-]+)/([a-z0-9.-]+)")


def ingress_at(text: str, line: int) -> IngressKey | None:
    """Return the Ingress whose location a line of nginx.conf is in, or None."""
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        return None
    start = line - 1
    while start >= 0 and not lines[start].lstrip().startswith("location "):
        if lines[start].lstrip().startswith(("server {", "upstream ")):
            return None
        start -= 1
    match = _COMMENT.fullmatch(lines[start + 1].strip()) if start >= 0 else None
    return IngressKey(match[1], match[2]) if match else None
