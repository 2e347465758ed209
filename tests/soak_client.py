"""One client of the soak test: carries out its plan over the API of a lab, under a load that it keeps informed.

A program of its own, so that clients share nothing but the lab: ``python soak_client.py`` with one argument, JSON. Prints a
line of JSON for each operation when it is carried out (a `soak_plan.Window`), or what is wrong, and leaves nothing behind.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak_plan import (
    CLIENTS,
    CONFIG_FOLDER,
    NODES,
    App,
    Object,
    Operation,
    Window,
    namespace,
    objects_of,
    operations,
    targets,
)

from testbed.bench.clients import fetch_metrics
from testbed.bench.parse import parse_metrics
from testbed.bench.site import is_synced
from testbed.errors import ApiError, TestbedError
from testbed.kernel.pace import patient
from testbed.lab.handle import Lab

T = TypeVar("T")

SETTLES_WITHIN_S = 60.0
LOOK_EVERY_S = 0.1
UNDER_WAY_S = 0.3
"""How long an event may take from the API to a kube-proxy."""
LOAD = Path(__file__).with_name("soak_load.py")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client is to do, and where its load comes from."""

    lab: str
    client: int
    seed: int
    mode: str
    seconds: float
    place: str
    rate: float
    failures: str  # file that the load's lines go to


class Load:
    """A loader in a place of the lab."""

    def __init__(self, order: Order) -> None:
        argv = [sys.executable, "-m", "testbed", "exec", "-l", order.lab, order.place, "--"]
        argv += [sys.executable, str(LOAD), str(order.rate)]
        self._lines = open(order.failures, "w")  # noqa: SIM115  # lives as long as the load
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, wanted: list[tuple[str, str, int]]) -> None:
        """Have these asked, and return when nothing else is."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if "asking" in json.loads(line):
                return
            self._lines.write(line)
        raise SystemExit("the load has ended")

    def end(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        for line in self._process.stdout:
            self._lines.write(line)
        self._lines.close()
        assert self._process.wait(60) == 0


class Client:
    """Carries out operations one after the other, each until the cluster has settled."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lab = Lab.find(order.lab)
        self._api = self._lab.api
        self._load = Load(order)
        self._apps: dict[str, App] = {}
        self._space = namespace(order.client)

    def run(self) -> None:
        self._api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self._space}})
        until = time.monotonic() + self._order.seconds
        for operation in operations(self._order.seed, self._order.client, self._order.mode):
            if time.monotonic() >= until:
                break
            self._carry_out(operation)
        self._load.ask([])
        self._load.end()
        self._api.delete("namespaces", "", self._space)
        self._eventually(self._namespace_is_gone, "the namespace is gone")
        self._settle_proxies()

    def _namespace_is_gone(self) -> bool:
        try:
            self._api.get("namespaces", "", self._space)
        except ApiError as error:
            return error.code == 404
        return False

    def _carry_out(self, operation: Operation) -> None:
        self._ask(operation.disturbs)
        begin_s = time.monotonic()
        self._do(operation)
        app = operation.app
        if app is not None:
            if operation.kind == "delete":
                del self._apps[app.name]
                self._eventually(lambda: not self._pods(app), f"no pod of {app.name}")
            else:
                self._apps[app.name] = app
                self._eventually(lambda: self._is_settled(app), f"{app} is settled")
        self._settle_proxies()
        window = Window(
            operation=operation.kind, disturbs=operation.disturbs, begin_s=begin_s,
            end_s=time.monotonic(),
        )  # fmt: skip
        print(json.dumps({**asdict(window), "disturbs": sorted(window.disturbs)}), flush=True)
        self._ask(frozenset())

    def _ask(self, disturbed: frozenset[str]) -> None:
        self._load.ask(targets(self._apps.values(), disturbed, self._order.place, self._order.mode))

    def _do(self, operation: Operation) -> None:
        app = operation.app
        match operation.kind:
            case "kill kube-proxy":
                self._kill_proxy(operation.node)
            case "link":
                self._lab.set_link(operation.node, up=False)
                time.sleep(operation.for_s)  # how long the plan has it unplugged
                self._lab.set_link(operation.node, up=True)
            case "delete":
                assert app
                for obj in objects_of(app):
                    self._api.delete(self._api.resource_of(obj).key, app.namespace, app.name)
            case "delete pod":
                assert app
                pod = self._pods(app)[operation.pick % app.replicas]
                self._api.delete("pods", app.namespace, pod["metadata"]["name"])
                self._eventually(lambda: pod["metadata"]["uid"] not in self._uids(app), "the pod is gone")
            case "kill program":
                assert app
                self._kill_program(self._pods(app)[operation.pick % app.replicas])
            case "scale":
                assert app
                self._api.scale("deployments.apps", app.namespace, app.name, app.replicas)
            case "edit config":
                assert app
                self._api.apply(objects_of(app)[0])
                pod = self._pods(app)[operation.pick % app.replicas]
                self._eventually(lambda: self._config_of(pod) == str(app.revision), "the pod has the new revision")
            case _:
                assert app
                for obj in objects_of(app):
                    self._api.apply(obj)

    def _kill_program(self, pod: Object) -> None:
        """Kill what runs in a pod, and wait until it runs again; the second time in one pod, delete that: it would wait."""
        space, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        if _restarts(pod):
            self._api.delete("pods", space, name)
            return
        self._lab.signal_pod(space, name, signal.SIGKILL)

        def is_back() -> bool:
            now = self._api.get("pods", space, name)
            return _restarts(now) > 0 and _is_ready(now)

        self._eventually(is_back, f"{space}/{name} runs again")

    def _kill_proxy(self, node: str) -> None:
        pods, _ = self._api.list("pods", "kube-system", label_selector="k8s-app=kube-proxy")
        mine = [pod for pod in pods if pod["spec"].get("nodeName") == node and _is_ready(pod)]
        if mine:  # else somebody else has just done it
            try:
                self._kill_program(mine[0])
            except TestbedError:  # likewise, while we looked
                return

    def _config_of(self, pod: Object) -> str:
        where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        return self._lab.run(where, ["cat", f"{CONFIG_FOLDER}/revision"], timeout_s=30).stdout.decode()

    # -- settling --------------------------------------------------------------------------------------------------

    def _pods(self, app: App) -> list[Object]:
        pods, _ = self._api.list("pods", app.namespace, label_selector=f"app={app.name}")
        return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))

    def _uids(self, app: App) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self._pods(app)}

    def _is_settled(self, app: App) -> bool:
        """Say whether there are exactly the pods that are wanted, all ready, and they alone are endpoints."""
        pods = self._pods(app)
        if len(pods) != app.replicas or not all(_is_ready(pod) for pod in pods):
            return False
        selector = f"kubernetes.io/service-name={app.name}"
        slices, _ = self._api.list("endpointslices.discovery.k8s.io", app.namespace, label_selector=selector)
        endpoints = [each for one in slices for each in one.get("endpoints") or ()]
        ready = sorted(each["addresses"][0] for each in endpoints if each["conditions"].get("ready"))
        return ready == sorted(pod["status"]["podIP"] for pod in pods) and len(endpoints) == len(ready)

    def _settle_proxies(self) -> None:
        """Wait until every kube-proxy has written all that it knows, and that it knows what the API says."""
        self._eventually(self._proxies_are_idle, "every kube-proxy has synced")
        time.sleep(patient(UNDER_WAY_S))
        self._eventually(self._proxies_are_idle, "every kube-proxy has synced")

    def _proxies_are_idle(self) -> bool:
        return all(
            is_synced(parse_metrics(self._lab.call(node, fetch_metrics, timeout_s=patient(20)))) for node in NODES
        )

    def _eventually(self, check: Callable[[], T], what: str) -> T:
        """Look until a check holds, and leave the processor to what is waited for most of the time: looking takes some, too."""
        deadline = time.monotonic() + patient(SETTLES_WITHIN_S)
        while True:
            began = time.monotonic()
            if seen := check():
                return seen
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._space}: not within {SETTLES_WITHIN_S:g} s: {what}")
            time.sleep(max(LOOK_EVERY_S, CLIENTS * (time.monotonic() - began)))


def _restarts(pod: Object) -> int:
    return sum(status.get("restartCount", 0) for status in _statuses(pod))


def _is_ready(pod: Object) -> bool:
    statuses = _statuses(pod)
    is_leaving = "deletionTimestamp" in pod["metadata"]
    return bool(statuses) and all(status.get("ready") for status in statuses) and not is_leaving


def _statuses(pod: Object) -> list[dict[str, Any]]:
    return (pod.get("status") or {}).get("containerStatuses") or []


if __name__ == "__main__":
    Client(Order(**json.loads(sys.argv[1]))).run()
