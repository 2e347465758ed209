"""The plan of the soak test: that it is one, that it is valid, and which failures it excuses."""

from __future__ import annotations

from itertools import islice

import pytest
from soak_plan import (
    APPS,
    CLIENTS,
    EVERYTHING,
    MOST_REPLICAS,
    NODES,
    Failure,
    Operation,
    Window,
    objects_of,
    operations,
    targets,
    unexcused,
)

from testbed.manifests.check import check_files


def first(count: int, *, seed: int = 1, client: int = 0, mode: str = "iptables") -> list[Operation]:
    return list(islice(operations(seed, client, mode), count))


def test_a_seed_is_a_plan() -> None:
    """The same seed gives the same operations, another one or another client others."""
    assert first(200) == first(200)
    assert first(200) != first(200, seed=2)
    assert [one.kind for one in first(200)] != [one.kind for one in first(200, client=1)]


@pytest.mark.parametrize("client", range(CLIENTS))
def test_operations_are_valid_when_they_come(client: int) -> None:
    """Nothing is done to an app that is not there, one always is, and within 300 operations every kind occurs."""
    there: set[str] = set()
    kinds = set()
    for operation in first(300, client=client):
        kinds.add(operation.kind)
        app = operation.app
        if app is None:
            assert operation.node
            continue
        assert 1 <= app.replicas <= MOST_REPLICAS
        assert app.client == client
        assert (app.name in there) == (operation.kind != "apply")
        there = there - {app.name} if operation.kind == "delete" else there | {app.name}
        assert there
    assert {"apply", "delete", "scale", "delete pod", "kill program", "kill kube-proxy", "link"} <= kinds
    assert {"edit port", "edit affinity", "edit policy", "edit config"} <= kinds


def test_what_disturbs_nothing() -> None:
    """Scaling up, affinity, ConfigMaps, a killed kube-proxy excuse nothing, unless that carries the traffic: userspace mode."""
    for operation in first(500):
        if operation.kind in ("apply", "edit affinity", "edit config", "kill kube-proxy"):
            assert operation.disturbs == frozenset()
        if operation.kind == "link":
            assert operation.disturbs == {EVERYTHING}
    in_userspace = [one for one in first(500, mode="userspace") if one.kind == "kill kube-proxy"]
    assert {one.disturbs for one in in_userspace} == {frozenset({EVERYTHING})}


def test_objects_are_what_the_api_takes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """No app has a Service or Deployment that our own check refuses, and no two share an address or a port."""
    import yaml

    apps = [one.app for client in range(CLIENTS) for one in first(len(APPS), client=client) if one.app]
    file = tmp_path / "apps.yaml"
    file.write_text(yaml.safe_dump_all([obj for app in apps for obj in objects_of(app)]))
    assert check_files([file]) == []
    assert len({app.cluster_ip for app in apps}) == len({app.node_port for app in apps}) == CLIENTS * len(APPS)


def test_targets() -> None:
    """From outside only NodePorts are asked; a disturbed path is not, nor the NodePort of a Service with policy Local."""
    apps = [one.app for one in first(len(APPS)) if one.app]
    outside = targets(apps, frozenset(), "client", "iptables")
    assert {key for key, _, _ in outside} == {app.key("nodeport") for app in apps}
    assert {address for _, address, _ in outside} == set(NODES.values())
    inside = targets(apps, frozenset({apps[0].key("clusterip")}), "soak-clients/on-node1", "ipvs")
    assert apps[0].key("clusterip") not in {key for key, _, _ in inside}
    assert apps[1].key("clusterip") in {key for key, _, _ in inside}


@pytest.mark.parametrize(("mode", "nodes"), [("iptables", set(NODES)), ("ipvs", {"node3"})])
def test_targets_of_a_node(mode: str, nodes: set[str]) -> None:
    """In ipvs mode it asks its own NodePorts only: other nodes would remember its address."""
    (app,) = [one.app for one in first(1) if one.app]
    asked = targets([app], frozenset(), "node3", mode)
    assert {address for key, address, _ in asked if key == app.key("nodeport")} == {NODES[node] for node in nodes}


@pytest.mark.parametrize(
    ("begin_s", "end_s", "disturbs", "excused"),
    [
        pytest.param(5.0, 6.0, {"a"}, True, id="within"),
        pytest.param(0.5, 1.5, {"a"}, True, id="was under way when the disturbance began"),
        pytest.param(8.5, 9.5, {EVERYTHING}, True, id="a link, which everything may need"),
        pytest.param(5.0, 6.0, {"b"}, False, id="another path was disturbed"),
        pytest.param(5.0, 6.0, set(), False, id="an operation that disturbs nothing"),
        pytest.param(9.5, 9.6, {"a"}, False, id="afterwards"),
        pytest.param(0.1, 0.9, {"a"}, False, id="before"),
    ],
)
def test_excuses(begin_s: float, end_s: float, disturbs: set[str], excused: bool) -> None:
    """Only a disturbance of its own path, at its own time, excuses a request."""
    failure = Failure(key="a", begin_s=begin_s, end_s=end_s, why="timed out")
    window = Window(operation="x", disturbs=frozenset(disturbs), begin_s=1.0, end_s=9.0)
    assert (unexcused([failure], [window]) == []) is excused
