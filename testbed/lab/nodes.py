"""The nodes of a lab: each has a kubelet in the control process, and may lose its power and get it back.

A node without power has no kubelet, no running containers and no LAN link. Its Node object stays, and what the cluster
makes of the silence is the node controller's to decide. With power it boots: the kubelet comes back and starts the pods
that are still bound to it anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from testbed.errors import ApiError
from testbed.kubelet.agent import Kubelet
from testbed.kubelet.node import KUBELET_PORT
from testbed.kubelet.server import KubeletServer
from testbed.lab.runtime import SpawnerRuntime
from testbed.model.topology import NodeSpec
from testbed.registry.errors import bad_request

POWER_PATH = "/testbed/v1/nodes/{name}/power"


class LabNodes:
    """Implements `api.streams.Nodes`, and switches nodes off and on."""

    def __init__(
        self, specs: Sequence[NodeSpec], runtime: SpawnerRuntime, make_kubelet: Callable[[NodeSpec], Kubelet]
    ) -> None:  # fmt: skip
        self._specs = {spec.name: spec for spec in specs}
        self._runtime = runtime
        self._make_kubelet = make_kubelet
        self._kubelets: dict[str, Kubelet] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._switching = asyncio.Lock()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Start the kubelet of every node. One that fails makes ``failed`` fail: without it there is no lab."""
        for spec in self._specs.values():
            self._start(spec)

    def _start(self, spec: NodeSpec) -> None:
        kubelet = self._kubelets[spec.name] = self._make_kubelet(spec)
        task = self._tasks[spec.name] = asyncio.create_task(kubelet.run(), name=f"kubelet {spec.name}")
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            self.failed.set_exception(task.exception() or AssertionError)

    def server_of(self, node: str) -> KubeletServer:
        kubelet = self._kubelets.get(node)
        if kubelet is None:
            spec = self._specs.get(node)
            where = f"{spec.address}:{KUBELET_PORT}" if spec is not None else node
            words = "connect: no route to host" if spec is not None else f"lookup {node}: no such host"
            raise ApiError(500, "InternalError", f'Get "https://{where}": dial tcp {where}: {words}')
        return KubeletServer(kubelet)

    async def switch(self, node: str, *, on: bool) -> None:
        """Take a node's power away or give it back; what is so already stays so.

        Raises:
            ApiError: 404 when the topology has no such node.
        """
        spec = self._specs.get(node)
        if spec is None:
            names = ", ".join(self._specs)
            raise ApiError(404, "NotFound", f"there is no node {node!r} in this lab's topology; nodes: {names}")
        async with self._switching:
            if on == (node in self._kubelets):
                return
            if on:
                await self._runtime.set_link(node, up=True)
                self._start(spec)
                return
            await self._runtime.set_link(node, up=False)
            del self._kubelets[node]
            task = self._tasks.pop(node)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def add_routes(self, app: web.Application) -> None:
        app.router.add_put(POWER_PATH, self._serve_power)

    async def _serve_power(self, request: web.Request) -> web.Response:
        try:
            body: Any = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or not isinstance(body.get("on"), bool):
            raise bad_request('the body must be {"on": true} or {"on": false}')
        await self.switch(request.match_info["name"], on=body["on"])
        return web.json_response({"name": request.match_info["name"], "on": body["on"]})
