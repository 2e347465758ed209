"""Waiting for cluster DNS: pods that are ready, and a rule on every node that leads to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Address

from testbed.errors import LabError
from testbed.kernel.pace import patient
from testbed.kubelet.runtime import Runtime
from testbed.lab.cluster_dns import DNS_LABELS
from testbed.model.objects import Object, labels_of, matches_labels
from testbed.store import Store

_PORT = 53
_TRY_EVERY_S = 0.01
_TRY_FOR_S = 20.0
_CONNECT_WITHIN_S = 1.0


async def until_dns_answers(
    store: Store, runtime: Runtime, address: IPv4Address, nodes: Sequence[str], tasks: Sequence[asyncio.Future[None]]
) -> None:  # fmt: skip
    """Return when every DNS pod that has a node is ready, and every node reaches one at the Service's address.

    Where no node takes a DNS pod (all are tainted), there is nothing to wait for.

    Args:
        tasks: what must go on meanwhile: an end of one is raised.
    """
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()

    def look(*_: object) -> None:
        if not settled.done() and all(_is_settled(pod) for pod in _pods(store)) and _pods(store):
            settled.set_result(None)

    subscription = store.subscribe(look, "pods")
    try:
        look()
        done, _ = await asyncio.wait([settled, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {settled}:
            task.result()
            raise LabError("a kubelet ended")
    finally:
        subscription.cancel()
    if any(_condition(pod, "Ready") == "True" for pod in _pods(store)):
        await asyncio.gather(*(_until_reached(runtime, node, address) for node in nodes))


def _pods(store: Store) -> list[Object]:
    return [pod for pod in store.list("pods", "kube-system") if matches_labels(DNS_LABELS, labels_of(pod))]


def _is_settled(pod: Object) -> bool:
    return _condition(pod, "Ready") == "True" or _condition(pod, "PodScheduled") == "False"


def _condition(pod: Object, kind: str) -> str:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((str(condition["status"]) for condition in conditions if condition["type"] == kind), "")


async def _until_reached(runtime: Runtime, node: str, address: IPv4Address) -> None:
    deadline = asyncio.get_running_loop().time() + patient(_TRY_FOR_S)
    while True:
        try:
            (await runtime.connect(node, address, _PORT, timeout_s=patient(_CONNECT_WITHIN_S))).close()
            return
        except OSError as error:  # its rules are not there yet
            if asyncio.get_running_loop().time() > deadline:
                raise LabError(f"node {node} does not reach cluster DNS at {address}:{_PORT}: {error}") from error
        await asyncio.sleep(_TRY_EVERY_S)
