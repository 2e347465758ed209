"""A cluster without machines for tests: the real Store, Registry and controllers, a clock by hand, a pretended kubelet."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from testbed.controllers import ControllerDriver, default_controllers, ensure_system_namespaces
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Key, Object, is_terminating
from testbed.registry import Registry
from testbed.store import Event, EventType, Store

_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


class FakeKubelet:
    """Runs the pods of every node: gives them an address, makes them ready, and removes those that are to end.

    ``holds`` says which pods to leave alone for now; ``at_once`` how many it takes care of before the controllers look.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._todo: dict[Key, None] = {}
        self._addresses = count(2)
        self.holds: Callable[[Object], bool] = lambda _pod: False
        self.at_once = 1
        registry.store.subscribe(self._notice, "pods")

    def _notice(self, event: Event) -> None:
        if event.type is not EventType.DELETED and event.object["spec"].get("nodeName"):
            self._todo[event.key] = None

    def step(self) -> bool:
        """Do what is due for one pod; False when there is nothing to do."""
        for key in list(self._todo):
            pod = self._registry.store.get(*key)
            if pod is None:
                del self._todo[key]
                continue
            if self.holds(pod):
                continue
            del self._todo[key]
            if is_terminating(pod):
                self._registry.delete("pods", key.namespace, key.name, grace_s=0)
                return True
            if not (pod.get("status") or {}).get("podIP"):
                self.set_ready(pod, True)
                return True
        return False

    def set_ready(self, pod: Object, ready: bool, **status: Any) -> Object:
        """Write a running pod's status, with an address if it has none yet."""
        current = self._registry.get("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        before = current.get("status") or {}
        number = next(self._addresses) if "podIP" not in before else 0
        address = before.get("podIP") or f"10.244.{number // 250}.{number % 250 + 1}"
        condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": self._registry.now()}
        conditions = [one for one in before.get("conditions") or [] if one["type"] != "Ready"]
        new = {
            **before,
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [*conditions, condition],
            **status,
        }
        return self._registry.update("pods", {**current, "status": new}, subresource="status")


class FakeTimers:
    """Calls that are to come at some time of a clock by hand, in order, as an event loop has them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._numbers = count(1)
        self._order: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> FakeTimer:
        number = next(self._numbers)
        heapq.heappush(self._order, (self._clock() + delay_s, number))
        self._calls[number] = call
        return FakeTimer(self._calls, number)

    @property
    def next_s(self) -> float | None:
        """When the next one is due, if there is any."""
        while self._order and self._order[0][1] not in self._calls:
            heapq.heappop(self._order)
        return self._order[0][0] if self._order else None

    def ring_next(self, until_s: float) -> bool:
        """Make the next call if it is due by then; say whether it was."""
        due = self.next_s
        if due is None or due > until_s:
            return False
        self._calls.pop(heapq.heappop(self._order)[1])()
        return True


@dataclass(frozen=True)
class FakeTimer:
    """One of them."""

    among: dict[int, Callable[[], None]]
    number: int

    def cancel(self) -> None:
        self.among.pop(self.number, None)


class World:
    """One cluster in memory. ``settle`` lets everything happen that needs no time to pass."""

    def __init__(
        self, *, nodes: int = 3, clock: Callable[[], float] | None = None, grace_s: float | None = None
    ) -> None:  # fmt: skip
        self.now_s = 0.0
        self._clock = clock or (lambda: self.now_s)
        self._timers = FakeTimers(self._clock)
        uids = count(1)
        self.errors: list[tuple[Key, Exception]] = []
        self.store = Store(now=self.now, new_uid=lambda: f"uid-{next(uids)}")
        config = ClusterConfig(node_monitor_grace_s=grace_s)
        self._chance = 1
        self.registry = Registry(self.store, config, now=self.now, new_uid=lambda: f"uid-{next(uids)}", pick=self._pick)
        self.driver = ControllerDriver(
            self.registry,
            default_controllers(config, pick=self._pick),
            now_s=self._clock,
            call_later=self._timers.call_later,
            on_error=lambda key, error: self.errors.append((key, error)),
        )
        self.driver.start()
        ensure_system_namespaces(self.registry)
        self.kubelet = FakeKubelet(self.registry)
        for number in range(1, nodes + 1):
            self.add_node(f"node{number}")

    def now(self) -> str:
        return (_EPOCH + timedelta(seconds=int(self.now_s))).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _pick(self, n: int) -> int:
        self._chance = (self._chance * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
        return (self._chance >> 33) % n

    # --- time ---

    def settle(self) -> None:
        """Let controllers and kubelets work until nothing is left to do now."""
        for _ in range(100_000):
            self.driver.run_pending()
            if self._timers.ring_next(self._clock()):
                continue
            if sum(self.kubelet.step() for _ in range(self.kubelet.at_once)) == 0:
                return
        raise AssertionError("the controllers do not come to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass, and everything happen on its way."""
        end = self.now_s + seconds
        self.settle()
        while (due := self._timers.next_s) is not None and due <= end:
            self.now_s = max(self.now_s, due)
            self.settle()
        self.now_s = end
        self.settle()

    # --- objects ---

    def add_node(self, name: str, *, ready: bool = True, labels: dict[str, str] | None = None, **spec: Any) -> Object:
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            "spec": spec,
        }
        created = self.registry.create("nodes", node)
        conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": self.now()}]
        return self.registry.update("nodes", {**created, "status": {"conditions": conditions}}, subresource="status")

    def beat(self, name: str, *, ready: bool = True) -> None:
        """Renew a node's Lease and say that it is ready, as its kubelet does."""
        key = ("leases.coordination.k8s.io", "kube-node-lease", name)
        spec = {"holderIdentity": name, "renewTime": f"{self.now()[:-1]}.000000Z"}
        lease = self.store.get(*key)
        if lease is None:
            self.registry.create(key[0], {"metadata": {"name": name, "namespace": key[1]}, "spec": spec})
        else:
            self.registry.update(key[0], {**lease, "spec": spec})
        node = self.get("nodes", name, "")
        conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": self.now()}]
        self.registry.update("nodes", {**node, "status": {"conditions": conditions}}, subresource="status")

    def create(self, resource: str, obj: Object) -> Object:
        return self.registry.create(resource, obj)

    def change(self, resource: str, name: str, *, namespace: str = "default", **spec: Any) -> Object:
        """Set fields of an object's spec; None takes a field away."""
        return self.registry.patch(resource, namespace, name, {"spec": spec})

    def pods(self, namespace: str = "default", *, terminating: bool = False) -> list[Object]:
        return [pod for pod in self.store.list("pods", namespace) if terminating or not is_terminating(pod)]

    def get(self, resource: str, name: str, namespace: str = "default") -> Object:
        return self.registry.get(resource, namespace, name)

    def messages(self, reason: str, namespace: str = "default") -> list[str]:
        return [event["message"] for event in self.store.list("events", namespace) if event["reason"] == reason]

    def left(self, namespace: str, but: Iterable[str] = ("events", "serviceaccounts")) -> list[str]:
        """Return what is still in a namespace, as text."""
        from testbed.model.objects import RESOURCES

        kinds = [one.key for one in RESOURCES if one.namespaced and one.key not in tuple(but)]
        return [f"{kind}/{obj['metadata']['name']}" for kind in kinds for obj in self.store.list(kind, namespace)]


def template(labels: dict[str, str], *, image: str = "nginx", **spec: Any) -> Object:
    ports = spec.pop("ports", [{"containerPort": 80}])
    return {
        "metadata": {"labels": labels},
        "spec": {"containers": [{"name": "web", "image": image, "ports": ports}], **spec},
    }


def deployment(name: str = "web", *, replicas: int = 3, image: str = "nginx", **spec: Any) -> Object:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": spec.pop("template", None) or template(labels, image=image),
            **spec,
        },
    }


def service(name: str = "web", *, selector: dict[str, str] | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            **({"selector": {"app": name} if selector is None else selector} if selector != {} else {}),
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
            **spec,
        },
    }
