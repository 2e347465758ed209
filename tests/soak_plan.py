"""What four clients do to a lab for a long time, by chance but from a seed, and which requests may fail meanwhile: pure.

Each client has a namespace with up to three apps, each a Deployment behind a Service, and asks these Services all the time.
A request may fail while its path is disturbed: from when an operation that disturbs it begins until the cluster says that it
is carried out. Most operations disturb nothing: what is said about other Services, scaling up, an edited affinity, a killed
kube-proxy (its rules stay) must not cost a single request.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

CLIENTS = 4
NODES = {"node1": "192.168.93.11", "node2": "192.168.93.12", "node3": "192.168.93.13"}
OUTSIDE = "client"
KILLED_ON = ("node2", "node3")
"""Where kube-proxy is killed: that of node1 lives all the time, and must not grow."""
EVERYTHING = "*"
MOST_REPLICAS = 4
APPS = ("red", "green", "blue")
PORTS = (80, 8081)
CONFIG_FOLDER = "/etc/soak"

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A Deployment and its Service."""

    client: int
    name: str
    replicas: int = 2
    port: int = PORTS[0]
    affinity: bool = False
    local: bool = False  # externalTrafficPolicy
    revision: int = 0  # of its ConfigMap

    @property
    def number(self) -> int:
        return self.client * len(APPS) + APPS.index(self.name)

    @property
    def namespace(self) -> str:
        return namespace(self.client)

    @property
    def cluster_ip(self) -> str:
        return f"10.96.3.{10 + self.number}"

    @property
    def node_port(self) -> int:
        return 30100 + self.number

    def key(self, path: str) -> str:
        return f"{self.namespace}/{self.name}/{path}"


def namespace(client: int) -> str:
    return f"soak-{client}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing to do. ``app`` is how the app is to be afterwards, or was before it went; None: it is about a node.

    ``disturbs``: targets, by `App.key`, whose requests may fail meanwhile; `EVERYTHING`: all requests of all clients.
    ``pick``: chooses among what is only known when it is done (pods).
    """

    kind: str
    app: App | None = None
    node: str = ""
    for_s: float = 0.0
    disturbs: frozenset[str] = frozenset()
    pick: int = 0


def operations(seed: int, client: int, mode: str) -> Iterator[Operation]:
    """Return what a client does, without end; the same for the same seed. It begins with creating all apps."""
    chance = random.Random(f"{seed}/{client}")
    apps: dict[str, App] = {}
    for name in APPS:
        apps[name] = App(client=client, name=name, replicas=chance.randint(1, MOST_REPLICAS))
        yield Operation(kind="apply", app=apps[name])
    while True:
        kind = _choose(chance, apps)
        operation = _make(kind, chance, client, apps, mode)
        if operation.app is not None:
            if kind == "delete":
                del apps[operation.app.name]
            else:
                apps[operation.app.name] = operation.app
        yield operation


_WEIGHTS = {
    "apply": 3.0, "delete": 1.5, "scale": 4.0, "delete pod": 2.0, "kill program": 0.7, "kill kube-proxy": 0.7, "link": 0.5,
    "edit port": 2.0, "edit affinity": 2.0, "edit policy": 2.0, "edit config": 1.5,
}  # fmt: skip


def _choose(chance: random.Random, apps: Mapping[str, App]) -> str:
    possible = dict(_WEIGHTS)
    if len(apps) == len(APPS):
        del possible["apply"]
    if len(apps) == 1:
        del possible["delete"]
    return chance.choices(list(possible), list(possible.values()))[0]


def _make(kind: str, chance: random.Random, client: int, apps: Mapping[str, App], mode: str) -> Operation:
    pick = chance.randrange(1 << 16)
    node = chance.choice(sorted(NODES))
    app = apps[chance.choice(sorted(apps))]
    userspace = mode == "userspace"
    cluster_ip, node_port = frozenset({app.key("clusterip")}), frozenset({app.key("nodeport")})
    both = cluster_ip | node_port
    match kind:
        case "apply":
            name = chance.choice(sorted(set(APPS) - set(apps)))
            return Operation(kind=kind, app=App(client=client, name=name, replicas=chance.randint(1, MOST_REPLICAS)))
        case "delete":
            return Operation(kind=kind, app=app, disturbs=both)
        case "scale":
            wanted = chance.choice([count for count in range(1, MOST_REPLICAS + 1) if count != app.replicas])
            fewer = wanted < app.replicas
            return Operation(kind=kind, app=replace(app, replicas=wanted), disturbs=both if fewer else frozenset())
        case "delete pod" | "kill program":
            return Operation(kind=kind, app=app, disturbs=both, pick=pick)
        case "kill kube-proxy":  # in userspace mode it is what carries the traffic
            return Operation(
                kind=kind, node=chance.choice(KILLED_ON), disturbs=frozenset({EVERYTHING} if userspace else ())
            )
        case "link":
            return Operation(kind=kind, node=node, for_s=chance.uniform(0.2, 1.5), disturbs=frozenset({EVERYTHING}))
        case "edit port":
            port = next(port for port in PORTS if port != app.port)
            return Operation(kind=kind, app=replace(app, port=port), disturbs=both if userspace else cluster_ip)
        case "edit affinity":
            return Operation(kind=kind, app=replace(app, affinity=not app.affinity))
        case "edit policy":
            return Operation(kind=kind, app=replace(app, local=not app.local), disturbs=node_port)
        case "edit config":
            return Operation(kind=kind, app=replace(app, revision=app.revision + 1), pick=pick)
    raise AssertionError(kind)


def targets(apps: Iterable[App], disturbed: frozenset[str], place: str, mode: str) -> list[tuple[str, str, int]]:
    """Return what is asked now, as key, address and port: ClusterIPs from inside the cluster, NodePorts of every node.

    Those of a disturbed path are left out: their failing would say nothing. A node has no endpoint of its own for certain, so
    with externalTrafficPolicy Local its port is not asked. In ipvs mode a node asks no other node's port: that one's IPVS would
    remember its address and port, and now and then masquerading chooses the same port for what the node asks through its own
    rules, which the other then takes for the first (docs/proxy-modes.md): one of 6,000 requests.
    """
    nodes = [NODES[place]] if mode == "ipvs" and place in NODES else NODES.values()
    found = []
    for app in apps:
        if place != OUTSIDE and app.key("clusterip") not in disturbed:
            found.append((app.key("clusterip"), app.cluster_ip, app.port))
        if not app.local and app.key("nodeport") not in disturbed:
            found += [(app.key("nodeport"), address, app.node_port) for address in nodes]
    return found


def objects_of(app: App) -> list[Object]:
    """Return an app's ConfigMap, Deployment and Service."""
    metadata = {"name": app.name, "namespace": app.namespace}
    labels = {"app": app.name}
    container = {
        "name": "echo",
        "image": "echo",
        "ports": [{"containerPort": 8080}],
        "volumeMounts": [{"name": "config", "mountPath": CONFIG_FOLDER}],
    }
    pod = {"containers": [container], "volumes": [{"name": "config", "configMap": {"name": app.name}}]}
    template = {"metadata": {"labels": labels}, "spec": {**pod, "terminationGracePeriodSeconds": 1}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"revision": str(app.revision)}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"replicas": app.replicas, "selector": {"matchLabels": labels}, "template": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": "NodePort",
                "clusterIP": app.cluster_ip,
                "selector": labels,
                "ports": [{"name": "http", "port": app.port, "targetPort": 8080, "nodePort": app.node_port}],
                "sessionAffinity": "ClientIP" if app.affinity else "None",
                "externalTrafficPolicy": "Local" if app.local else "Cluster",
            },
        },
    ]


# ── afterwards ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When an operation was under way, on the monotonic clock."""

    operation: str
    disturbs: frozenset[str]
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that had no answer."""

    key: str
    begin_s: float
    end_s: float
    why: str


def unexcused(failures: Iterable[Failure], windows: Iterable[Window]) -> list[Failure]:
    """Return the failures that no disturbance of their path explains: none that was under way at any time of the request."""
    windows = list(windows)
    return [
        failure
        for failure in failures
        if not any(
            window.disturbs & {failure.key, EVERYTHING}
            and window.begin_s <= failure.end_s
            and failure.begin_s <= window.end_s
            for window in windows
        )
    ]
