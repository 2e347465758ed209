"""The process of openelb-speaker: sockets, threads and watches around `testbed.programs.openelb.speaker.SpeakerLoop`."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from testbed.controllers.openelb.names import SYSTEM_NAMESPACE
from testbed.errors import InputError, KernelError, TestbedError
from testbed.kernel.addresses import link_towards, list_link_addresses
from testbed.model.objects import Object
from testbed.programs.answers import Listener
from testbed.programs.kube_proxy import Changed, Listed, Stop, Watcher
from testbed.programs.openelb.faces import answer_faces
from testbed.programs.openelb.flags import SETTINGS_CONFIGMAP, parse_speaker_flags
from testbed.programs.openelb.frames import request_frames
from testbed.programs.openelb.gobgp import READY_FILE
from testbed.programs.openelb.gossip import Gossip
from testbed.programs.openelb.responder import ArpResponder
from testbed.programs.openelb.speaker import (
    CONFIGMAPS,
    PODS,
    RESOURCES,
    SPEAKER_LABELS,
    Built,
    Foreign,
    Message,
    Responder,
    SpeakerLoop,
)
from testbed.programs.proxy_events import Events
from testbed.programs.proxy_status import ProxyMetrics

_COMPONENT = "openelb-speaker"


class KernelNode:
    """The links of the network namespace this process is in."""

    def __init__(self, metrics: ProxyMetrics, emit: Callable[[Message], None], log: Callable[[str], None]) -> None:
        self._metrics = metrics
        self._emit = emit
        self._log = log

    def addresses(self, link: str) -> tuple[IPv4Interface, ...]:
        return list_link_addresses(link)

    def towards(self, destination: IPv4Address) -> str:
        return link_towards(destination)

    def respond(self, link: str) -> Responder:
        responder = ArpResponder(link, self._metrics, lambda address, mac: self._emit(Foreign(address, mac)))
        responder.start()
        return responder

    def build(self, link: str, mac: str, addresses: tuple[IPv4Address, ...]) -> None:
        def run() -> None:
            try:
                self._emit(Built(link, request_frames(mac, addresses)))
            except KernelError as error:
                self._log(str(error))
                time.sleep(1.0)
                self._emit(Built(link, {}))

        threading.Thread(target=run, name="frames", daemon=True).start()


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run until SIGTERM; return the exit status: 0, or 1 when it could not start."""
    from testbed.api.client import ApiClient, in_cluster

    def log(line: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} openelb-speaker: {line}\n")
        sys.stderr.flush()

    messages: queue.SimpleQueue[Message | Stop] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: messages.put(Stop()))
    try:
        flags = parse_speaker_flags(argv, env)
        namespace = env.get("OPENELB_NAMESPACE") or SYSTEM_NAMESPACE
        server = in_cluster(env)
        metrics = ProxyMetrics("")
        gossip = Gossip((flags.bind_address, flags.bind_port), flags.secret.encode(), metrics, messages.put)
        if flags.metrics_port:
            Listener("0.0.0.0", flags.metrics_port, answer_faces(metrics))
    except InputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except (TestbedError, OSError) as error:
        log(str(error))
        return 1
    if not flags.secret:
        log("MEMBER_LIST_SECRET is empty: whoever reaches the port can speak for others")
    events = Events(ApiClient(server), flags.node, log, component=_COMPONENT)
    loop = SpeakerLoop(
        flags, KernelNode(metrics, messages.put, log), boot=time.time_ns(), send=gossip.send, tell=events.tell, log=log,
        namespace=namespace, now_s=time.monotonic(),
    )  # fmt: skip
    for resource in RESOURCES:
        labels = SPEAKER_LABELS if resource == PODS else ""
        fields = f"metadata.name={SETTINGS_CONFIGMAP}" if resource == CONFIGMAPS else ""
        watcher = Watcher(ApiClient(server), resource, _of_namespace(resource, namespace, messages.put), log,
                          label_selector=labels, field_selector=fields)  # fmt: skip
        threading.Thread(target=watcher.run, name=f"watch-{resource}", daemon=True).start()
    Path(READY_FILE).write_text(f"{os.getpid()}\n")
    run(loop, messages)
    return 0


def _of_namespace(
    resource: str, namespace: str, emit: Callable[[Message], None]
) -> Callable[[Listed | Changed | Stop], None]:
    """Return what hands on messages about pods and ConfigMaps of one namespace only, and all others."""

    def is_ours(obj: Object) -> bool:
        return resource not in (PODS, CONFIGMAPS) or obj["metadata"].get("namespace") == namespace

    def hand_on(message: Listed | Changed | Stop) -> None:
        if isinstance(message, Listed):
            emit(Listed(resource, tuple(filter(is_ours, message.objects))))
        elif isinstance(message, Changed) and is_ours(message.object):
            emit(message)

    return hand_on


def run(loop: SpeakerLoop, messages: queue.SimpleQueue[Message | Stop]) -> None:
    """Turn the loop until a `Stop` arrives. Messages that wait together are taken in together, for one election."""
    while True:
        with contextlib.suppress(queue.Empty):
            message = messages.get(timeout=loop.wait_s(time.monotonic()))
            while True:
                if isinstance(message, Stop):
                    loop.close()
                    return
                loop.accept(message, time.monotonic())
                message = messages.get_nowait()
        loop.step(time.monotonic())
