"""A lab without machines for tests of scenarios: real objects and controllers, places that exist, scripted answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from controllers_world import World

from testbed.errors import ApiError, InputError
from testbed.kernel.processes import Completed
from testbed.model.objects import BY_KIND, Object, Resource, name_of, namespace_of
from testbed.model.scenario import Request
from testbed.model.topology import Topology
from testbed.probes import ArpAnswer, Observation, Outcome, ask, ask_arp


class FakeApi:
    """`ApiClient`, without a socket: the registry that answers in a lab, and what it refuses."""

    def __init__(self, world: World) -> None:
        self._registry = world.registry

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]:
        assert not (label_selector or field_selector), "steps select for themselves"
        return self._registry.list(resource, namespace), "1"

    def get(self, resource: str, namespace: str, name: str) -> Object:
        return self._registry.get(resource, namespace, name)

    def apply(self, obj: Object) -> tuple[Object, str]:
        resource = BY_KIND[(obj["apiVersion"], obj["kind"])]
        namespace = (namespace_of(obj) or "default") if resource.namespaced else ""
        try:
            before = self._registry.get(resource.key, namespace, name_of(obj))
        except ApiError as error:
            if error.code != 404:
                raise
            placed = {**obj, "metadata": {**obj["metadata"], **({"namespace": namespace} if namespace else {})}}
            return self._registry.create(resource.key, placed), "created"
        after = self._registry.patch(resource.key, namespace, name_of(obj), obj)
        return after, "unchanged" if after == before else "configured"

    def resource_of(self, obj: Object) -> Resource:
        found = self._registry.resources.of_kind(obj["apiVersion"], obj["kind"])
        if found is None:
            raise ApiError(404, "NotFound", f'no matches for kind "{obj["kind"]}" in version "{obj["apiVersion"]}"')
        return found

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object:
        return self._registry.patch(resource, namespace, name, patch, subresource=subresource)

    def delete(self, resource: str, namespace: str, name: str, grace_s: int | None = None) -> Object:
        return self._registry.delete(resource, namespace, name, grace_s=grace_s)


class FakeLab:
    """A lab whose places exist when its topology or its API has them, and whose answers a test writes.

    ``answers`` is called for each round of requests with its number, from 1; ``programs`` for each program.
    """

    def __init__(self, world: World, topology: Topology) -> None:
        self.world = world
        self.topology = topology
        self.api = FakeApi(world)
        self.kubeconfig = Path("kubeconfig")
        self.answers: Callable[[int], Sequence[Observation]] = lambda _round: [Observation(outcome=Outcome.ANSWERED)]
        self.programs: Callable[[int], Completed] = lambda _run: Completed(0, b"", b"")
        self.asked: list[tuple[str, Request, int, bool]] = []
        self.ran: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[tuple[str, bool]] = []
        self.powers: list[tuple[str, bool]] = []
        self.signals: list[tuple[str, int]] = []
        self.arps: list[tuple[str, IPv4Address]] = []
        self.arp_answers: Callable[[int], Sequence[ArpAnswer]] = lambda _question: ()
        self.ended = ""

    def why_ended(self, *, within_s: float = 0.0) -> str:
        return self.ended

    def _enter(self, where: str) -> None:
        if where in {machine.name for machine in self.topology.machines}:
            return
        namespace, slash, name = where.partition("/")
        if not slash:
            raise InputError(f"there is no {where!r} in this lab")
        self.api.get("pods", namespace, name)

    def call(self, where: str, function: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        self._enter(where)
        if function is ask_arp:
            address, patience_s = args
            assert timeout_s > patience_s, "it has to be let finish"
            self.arps.append((where, address))
            return self.arp_answers(len(self.arps))
        assert function is ask
        request, times, connect_only = args
        assert timeout_s > times * request.patience_s, "it has to be let finish"
        self.asked.append((where, request, times, connect_only))
        return tuple(self.answers(len(self.asked)))

    def run(self, where: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        self._enter(where)
        self.ran.append((where, tuple(argv)))
        return self.programs(len(self.ran))

    def set_power(self, node: str, on: bool) -> None:
        self.powers.append((node, on))

    def set_link(self, where: str, up: bool) -> None:
        self._enter(where)
        self.links.append((where, up))

    def signal_pod(self, namespace: str, name: str, signal_number: int) -> None:
        self._enter(f"{namespace}/{name}")
        self.signals.append((f"{namespace}/{name}", signal_number))
