"""The control process: store, registry, API, controllers and one kubelet a node, on one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml
from aiohttp import web

from testbed.api.access import Tokens
from testbed.api.server import make_app
from testbed.api.streams import add_stream_routes
from testbed.controllers import ControllerDriver, default_controllers, ensure_system_namespaces
from testbed.controllers.openelb.names import WEBHOOK as OPENELB_WEBHOOK
from testbed.controllers.openelb.webhook import EipWebhook
from testbed.controllers.system import RootCertificatePublisher
from testbed.dataplane.ingress.admission import WEBHOOK as INGRESS_WEBHOOK
from testbed.dataplane.ingress.admission import IngressWebhook
from testbed.kubelet.agent import Kubelet
from testbed.lab.bootstrap import proxy_configuration, system_objects
from testbed.lab.dns_wait import until_dns_answers
from testbed.lab.endpoint import API_PORT, listen, make_endpoint
from testbed.lab.nodes import LabNodes
from testbed.lab.request import LabRequest, report
from testbed.lab.runtime import SpawnerRuntime
from testbed.model.objects import Object
from testbed.programs.catalogue import Catalogue
from testbed.registry import Registry
from testbed.registry.accounts import ServiceAccountAdmission
from testbed.registry.ingresses import DefaultIngressClass
from testbed.store import Event, Store

_log = logging.getLogger("testbed.control")


def run_control(request: LabRequest, spawner: socket.socket) -> None:
    """Run the cluster until the spawner is gone."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    asyncio.run(_run(request, spawner))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _run(request: LabRequest, spawner: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    runtime = SpawnerRuntime(spawner)
    store = Store(now=_now, new_uid=lambda: str(uuid.uuid4()))
    cluster = request.topology.cluster
    registry = Registry(store, cluster, now=_now, new_uid=lambda: str(uuid.uuid4()), pick=random.randrange)
    endpoint = make_endpoint(request.name, request.topology)
    tokens = Tokens(endpoint.signing_key, endpoint.admin_token, now_s=time.time)
    registry.admission.mutators += [ServiceAccountAdmission(store, random.randrange), DefaultIngressClass(store)]
    registry.admission.webhooks[OPENELB_WEBHOOK] = EipWebhook(store)
    registry.admission.webhooks[INGRESS_WEBHOOK] = IngressWebhook(store)
    driver = ControllerDriver(
        registry,
        [
            *default_controllers(cluster, pick=random.randrange),
            RootCertificatePublisher(endpoint.credentials.authority),
        ],
        now_s=time.monotonic,
        call_later=lambda delay_s, call: loop.call_later(delay_s, call),
        on_error=lambda key, error: _log.error("controller failed on %s: %r", key, error),
    )
    _run_driver_after_events(store, driver)
    driver.start()
    ensure_system_namespaces(registry)

    def token_of(pod: Object) -> str:
        account = registry.get("serviceaccounts", pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"])
        return tokens.issue(account, pod=pod)

    catalogue = Catalogue()
    nodes = LabNodes(
        request.topology.nodes,
        runtime,
        lambda node: Kubelet(
            node,
            registry,
            runtime,
            catalogue,
            cluster=cluster,
            clock=time.monotonic,
            now=_now,
            token_of=token_of,
            node_resolv_conf=request.topology.resolv_conf,
        ),  # fmt: skip,
    )
    app = make_app(registry, ready=lambda: True, tokens=tokens)
    add_stream_routes(app, registry, nodes)
    nodes.add_routes(app)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    api_folder = f"{request.folder}/api"
    await web.UnixSite(runner, f"{api_folder}/api.sock").start()
    await listen(endpoint, runner, request)
    report(request.progress_fd, phase="api")

    nodes.start()
    config = dump_yaml(proxy_configuration(request.topology, request.proxy_mode))
    objects = system_objects(
        request.topology,
        proxy_config_text=config,
        api_folder=api_folder,
        api=(endpoint.inside, API_PORT),
        iptables_backend=request.iptables_backend,
    )
    for obj in objects:
        registry.create(_resource_key(obj), obj)
    await _until_ready(store, nodes.failed)
    if cluster.dns is not None:
        names = [node.name for node in request.topology.nodes]
        await until_dns_answers(store, runtime, cluster.dns, names, [nodes.failed])
    report(request.progress_fd, ready=True)
    done, _ = await asyncio.wait([nodes.failed, runtime.gone], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _resource_key(obj: Object) -> str:
    from testbed.model.objects import BY_KIND

    return BY_KIND[(obj["apiVersion"], obj["kind"])].key


def _run_driver_after_events(store: Store, driver: ControllerDriver) -> None:
    """Let the controllers work once after each burst of changes, not inside the write that caused them."""
    loop = asyncio.get_running_loop()
    scheduled = False

    def run() -> None:
        nonlocal scheduled
        scheduled = False
        driver.run_pending()

    def wake(_event: Event) -> None:
        nonlocal scheduled
        if not scheduled:
            scheduled = True
            loop.call_soon(run)

    store.subscribe(wake)


class _Dumper(yaml.SafeDumper):
    """Writes '' as Kubernetes does: people edit the ConfigMap with the likes of ``sed 's/mode: ""/mode: "ipvs"/'``."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text else '"')
)


def dump_yaml(document: Mapping[str, Any]) -> str:
    """Return a document as text, its keys sorted and '' in double quotes, as Kubernetes prints it."""
    return str(yaml.dump(document, Dumper=_Dumper))


async def _until_ready(store: Store, failed: asyncio.Future[None]) -> None:
    """Return when kube-proxy is ready, which it is once it has synced, on every node; raise what a kubelet ended with."""
    ready = asyncio.get_running_loop().create_future()

    def look(event: Event) -> None:
        status = event.object.get("status") or {}
        wanted = status.get("desiredNumberScheduled", 0)
        if wanted and wanted == status.get("numberReady") and not ready.done():
            ready.set_result(None)

    subscription = store.subscribe(look, "daemonsets.apps")
    try:
        done, _ = await asyncio.wait([ready, failed], return_when=asyncio.FIRST_COMPLETED)
        if failed in done:
            failed.result()
    finally:
        subscription.cancel()
