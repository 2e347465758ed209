"""Starts the ingress controller: command line, API, nginx, and the loop that joins them."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from testbed.dataplane.ingress.secrets import FAKE_NAME
from testbed.dataplane.ingress.settings import Options, parse_options
from testbed.errors import InputError, TestbedError
from testbed.kernel.processes import reap_orphans
from testbed.model.objects import Object
from testbed.programs.answers import Answer, Listener
from testbed.programs.ingress.controller import RESOURCES, IngressLoop, Message
from testbed.programs.ingress.metrics import RequestMetrics, nginx_metrics
from testbed.programs.ingress.nginx_process import NginxProcess
from testbed.programs.ingress.status import StatusPublisher
from testbed.programs.kube_proxy import Changed, Listed, Stop, Watcher
from testbed.programs.lease import Leadership
from testbed.programs.proxy_events import Events
from testbed.programs.proxy_status import ProxyMetrics

PREFIX: Final = "nginx_ingress_controller_"
_COMPONENT: Final = "nginx-ingress-controller"
_LEASE_LASTS_S: Final = 30
#: How long nginx goes on after SIGTERM, until nobody is sent here any more.
_LAME_DUCK_S: Final = 1.0
_QUIT_WITHIN_S: Final = 240.0
_FAKE_VALID_DAYS: Final = 365
_KINDS: Final = {"ingresses.networking.k8s.io": ("networking.k8s.io/v1", "Ingress")}


def fake_certificate() -> bytes:
    """Return the certificate and key for hosts that have none, as PEM; new at each start."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme Co"), x509.NameAttribute(NameOID.COMMON_NAME, FAKE_NAME)]
    )
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_FAKE_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("ingress.local")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    shape = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, *shape
    )  # fmt: skip


def resolvers_of(text: str) -> tuple[str, ...]:
    """Return the servers of a resolv.conf."""
    lines = (line.split() for line in text.splitlines())
    return tuple(words[1] for words in lines if len(words) > 1 and words[0] == "nameserver" and ":" not in words[1])


@dataclass(frozen=True, slots=True)
class Faces:
    """What answers on port 10254."""

    options: Options
    loop: IngressLoop
    nginx: NginxProcess
    metrics: ProxyMetrics
    requests: RequestMetrics | None
    is_leader: threading.Event

    def answer(self, path: str) -> Answer:
        if path == "/metrics":
            leads = float(self.is_leader.is_set())
            self.metrics.set("leader_election_status", leads, name=self.options.election_id)
            text = self.metrics.render()
            if self.requests is not None:
                text += self.requests.render() + nginx_metrics(self.nginx.status(), PREFIX)
            return Answer(200, text, "text/plain; version=0.0.4; charset=utf-8")
        if path == self.options.health_check_path:
            return self._health()
        if path == "/build":
            return Answer(200, "testbed\n")
        return Answer(404, "404 page not found\n")

    def _health(self) -> Answer:
        if not self.loop.has_synced:
            return Answer(500, "the objects are not listed yet\n")
        if not self.nginx.is_alive:
            return Answer(500, "nginx does not run\n")
        if self.nginx.serving_generation() is None:
            return Answer(500, "nginx does not answer\n")
        return Answer(200, "ok")


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run until SIGTERM; return the exit status: 0, or 1 when it could not start."""
    from testbed.api.client import ApiClient, in_cluster

    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: messages.put(Stop()))
    try:
        options = parse_options(argv[1:])
        server = in_cluster(env)
        with contextlib.suppress(OSError):
            resolvers = resolvers_of(Path("/etc/resolv.conf").read_text())
        namespace, pod_name = env.get("POD_NAMESPACE", ""), env.get("POD_NAME", "")
        if not namespace or not pod_name:
            raise InputError("nginx-ingress-controller: POD_NAME and POD_NAMESPACE must be set, by the downward API")
        metrics = ProxyMetrics(PREFIX)
        api = ApiClient(server)
        pod = {"apiVersion": "v1", "kind": "Pod", **api.get("pods", namespace, pod_name)}
        requests = RequestMetrics(PREFIX) if options.enable_metrics else None
        nginx = NginxProcess(options.status_port, messages.put)
        loop = IngressLoop(
            options, nginx, metrics, default_certificate=fake_certificate(), resolvers=resolvers, log=log,
            tell=Events(ApiClient(server), "", log, component=_COMPONENT).tell, pod=pod,
        )  # fmt: skip
        leadership = Leadership(
            ApiClient(server), namespace, options.election_id, pod_name, log, lasts_s=_LEASE_LASTS_S
        )  # fmt: skip
        publisher = StatusPublisher(
            ApiClient(server), options, (namespace, pod_name), leadership.is_leader, loop.see, log
        )  # fmt: skip
        metrics.set("build_info", 1, repository="testbed", release="v1.10.1")
        if requests is not None:
            requests.listen()
        faces = Faces(options, loop, nginx, metrics, requests, leadership.is_leader)
        Listener("0.0.0.0", options.healthz_port, faces.answer)
    except (TestbedError, OSError) as error:
        log(str(error))
        return 1
    log("NGINX Ingress controller (testbed: stock nginx, configuration of our own)")
    for resource in RESOURCES:
        watcher = Watcher(ApiClient(server), resource, lambda message: messages.put(with_kinds(message)), log)
        threading.Thread(target=watcher.run, name=f"watch-{resource}", daemon=True).start()
    leadership.start()
    if options.update_status:
        publisher.start()
    run(loop, messages)
    _shut_down(options, nginx, publisher if options.update_status else None, leadership, messages)
    return 0


def log(line: str) -> None:
    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S.%f}"[:12] + f" {_COMPONENT}: {line}\n")
    sys.stderr.flush()


def with_kinds(message: Message) -> Message:
    """Return a message whose Ingresses say what they are, as those of lists do not: events need it."""

    def named(obj: Object, kind: tuple[str, str]) -> Object:
        return {"apiVersion": kind[0], "kind": kind[1], **obj}

    if isinstance(message, Listed | Changed) and message.resource in _KINDS:
        kind = _KINDS[message.resource]
        if isinstance(message, Listed):
            return Listed(message.resource, tuple(named(obj, kind) for obj in message.objects))
        return replace(message, object=named(message.object, kind))
    return message


def run(loop: IngressLoop, messages: queue.SimpleQueue[Message]) -> None:
    """Turn the loop until a `Stop` arrives."""
    while True:
        batch: list[Message] = []
        with contextlib.suppress(queue.Empty):
            batch.append(messages.get(timeout=loop.wait_s()))
            while True:
                batch.append(messages.get_nowait())
        if any(isinstance(message, Stop) for message in batch):
            return
        loop.accept(batch)
        loop.step()
        reap_orphans(loop.nginx_pid)


def _shut_down(
    options: Options, nginx: NginxProcess, publisher: StatusPublisher | None, leadership: Leadership,
    messages: queue.SimpleQueue[Message],
) -> None:  # fmt: skip
    """End as the preStop hook expects: nginx after its requests, then this process, when the kubelet asks once more."""
    log("Shutting down")
    time.sleep(max(_LAME_DUCK_S, float(options.shutdown_grace_period)))
    if publisher is not None:
        publisher.stop()
    leadership.release()
    nginx.quit(_QUIT_WITHIN_S)
    log("nginx has ended")
    deadline = time.monotonic() + options.post_shutdown_grace_period
    while time.monotonic() < deadline:  # the hook returns now, and SIGTERM follows
        with contextlib.suppress(queue.Empty):
            if isinstance(messages.get(timeout=max(0.01, deadline - time.monotonic())), Stop):
                return
