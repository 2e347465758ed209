"""What kubectl's columns show: durations, pod states, Services, JSONPath; and what an Accept header asks for."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

from typing import Any

import pytest

from testbed.api.printers import PRINTERS, custom_printer, default_printer
from testbed.api.printers.cells import duration, selector_text, since
from testbed.api.printers.jsonpath import find_path
from testbed.model.objects import RESOURCES
from testbed.registry.definitions import PrinterColumn

MINUTE, HOUR, DAY = 60, 3600, 86400
NOW = 1704067298.0  # 2024-01-01T00:01:38Z


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"), (-1, "0s"), (0, "0s"), (98, "98s"), (119.9, "119s"), (2 * MINUTE, "2m"), (7 * MINUTE + 34, "7m34s"),
        (5 * MINUTE, "5m"), (10 * MINUTE + 3, "10m"), (170 * MINUTE, "170m"), (3 * HOUR + 31 * MINUTE, "3h31m"), (4 * HOUR, "4h"),
        (8 * HOUR + 59 * MINUTE, "8h"), (47 * HOUR, "47h"), (2 * DAY + 5 * HOUR, "2d5h"), (3 * DAY, "3d"), (8 * DAY + 23 * HOUR, "8d"),
        (400 * DAY, "400d"), (2 * 365 * DAY + 35 * DAY, "2y35d"), (3 * 365 * DAY, "3y"), (9 * 365 * DAY + 100 * DAY, "9y"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    """Every branch of HumanDuration."""
    assert duration(seconds) == text


def test_times_that_are_none() -> None:
    """An absent time is unknown, and so is one that cannot be read."""
    assert (since(None, NOW), since("soon", NOW)) == ("<unknown>", "<unknown>")


def container(
    name: str = "c", *, ready: bool = False, restarts: int = 0, last: str = "", **state: Any
) -> dict[str, Any]:
    status = {"name": name, "ready": ready, "restartCount": restarts, "state": state}
    return {**status, "lastState": {"terminated": {"finishedAt": last}}} if last else status


def pod(
    *statuses: Any, init: Any = (), phase: str = "Running", containers: int = 1, init_specs: Any = (), **metadata: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "creationTimestamp": "2024-01-01T00:00:00Z", **metadata},
        "spec": {
            "containers": [{"name": f"c{number}"} for number in range(containers)],
            "initContainers": list(init_specs),
        },
        "status": {"phase": phase, "containerStatuses": list(statuses), "initContainerStatuses": list(init)},
    }


@pytest.mark.parametrize(
    ("obj", "shown"),
    [
        pytest.param(pod(container(ready=True, running={})), ["1/1", "Running", "0"], id="running"),
        pytest.param(pod(phase="Pending"), ["0/1", "Pending", "0"], id="not placed"),
        pytest.param(pod(container(waiting={"reason": "ContainerCreating"}), phase="Pending"), ["0/1", "ContainerCreating", "0"], id="starting"),
        pytest.param(pod(container(waiting={"reason": "CrashLoopBackOff"}, restarts=3, last="2024-01-01T00:00:38Z")), ["0/1", "CrashLoopBackOff", "3 (60s ago)"], id="crashing"),
        pytest.param(pod(container(terminated={"exitCode": 0, "reason": "Completed"}), phase="Succeeded"), ["0/1", "Completed", "0"], id="completed"),
        pytest.param(pod(container(terminated={"exitCode": 3})), ["0/1", "ExitCode:3", "0"], id="an exit code without a reason"),
        pytest.param(pod(container(terminated={"exitCode": 137, "signal": 9})), ["0/1", "Signal:9", "0"], id="a signal"),
        pytest.param(pod(container(ready=True, running={}), deletionTimestamp="x"), ["1/1", "Terminating", "0"], id="being deleted"),
        pytest.param(pod(init=[container("i", running={})], init_specs=[{"name": "i"}, {"name": "j"}]), ["0/1", "Init:0/2", "0"], id="the first of two init containers"),
        pytest.param(pod(init=[container("i", terminated={"exitCode": 1, "reason": "Error"})], init_specs=[{"name": "i"}]), ["0/1", "Init:Error", "0"], id="an init container failed"),
        pytest.param(pod(container(ready=True, running={}), init=[{**container("i", ready=True, running={}), "started": True}], init_specs=[{"name": "i", "restartPolicy": "Always"}]), ["2/2", "Running", "0"], id="a sidecar counts"),
        pytest.param({**pod(), "status": {"phase": "Failed", "reason": "Evicted"}}, ["0/1", "Evicted", "0"], id="evicted"),
    ],
)  # fmt: skip
def test_pods(obj: dict[str, Any], shown: list[str]) -> None:
    """READY, STATUS and RESTARTS for each state of a pod."""
    assert PRINTERS["pods"].cells(obj, NOW)[1:4] == shown


@pytest.mark.parametrize(
    ("spec", "status", "shown"),
    [
        ({"type": "ClusterIP", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "TCP"}]}, {}, ["ClusterIP", "10.96.0.1", "<none>", "80/TCP"]),
        ({"type": "ClusterIP", "clusterIP": "None"}, {}, ["ClusterIP", "None", "<none>", "<none>"]),
        ({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30001, "protocol": "TCP"}]}, {}, ["LoadBalancer", "10.96.0.1", "<pending>", "80:30001/TCP"]),
        ({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalIPs": ["1.1.1.1"]}, {"loadBalancer": {"ingress": [{"ip": "9.9.9.9"}, {"ip": "2.2.2.2"}]}}, ["LoadBalancer", "10.96.0.1", "2.2.2.2,9.9.9.9,1.1.1.1", "<none>"]),
        ({"type": "ExternalName", "externalName": "example.org"}, {}, ["ExternalName", "<none>", "example.org", "<none>"]),
    ],
)  # fmt: skip
def test_services(spec: dict[str, Any], status: dict[str, Any], shown: list[str]) -> None:
    """TYPE, CLUSTER-IP, EXTERNAL-IP and PORT(S) for each type."""
    obj = {"metadata": {"name": "s", "creationTimestamp": "2024-01-01T00:00:00Z"}, "spec": spec, "status": status}
    assert PRINTERS["services"].cells(obj, NOW)[1:5] == shown


def test_every_kind_has_as_many_cells_as_columns() -> None:
    """Also of an object that has nothing but its metadata."""
    for resource in RESOURCES:
        printer = PRINTERS.get(resource.key) or default_printer()
        obj = {"kind": resource.kind, "metadata": {"name": "x", "creationTimestamp": "2024-01-01T00:00:00Z"}}
        assert len(printer.cells(obj, NOW)) == len(printer.columns), resource.key
        assert sum(column.format == "name" for column in printer.columns) == 1, resource.key


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".a.b", [1]), ("{.a.b}", [1]), (".a['b']", [1]), (".list[0].n", ["x"]), (".list[-1].n", ["y"]), (".list[*].n", ["x", "y"]),
        ('.list[?(@.t=="Ready")].s', ["True"]), (".list[?(@.t!='Ready')].n", ["x"]), ("..n", ["x", "y"]), (".nothing.here", []),
        (".list[7]", []), (".a\\.b", ["dotted"]), ("((", []), (".a.*", [1]),
    ],
)  # fmt: skip
def test_jsonpath(path: str, found: list[Any]) -> None:
    """The part of JSONPath that printer columns use; nonsense finds nothing."""
    obj = {"a": {"b": 1}, "a.b": "dotted", "list": [{"n": "x", "t": "Other"}, {"n": "y", "t": "Ready", "s": "True"}]}
    assert find_path(obj, path) == found


def test_columns_of_custom_resources() -> None:
    """Types decide what a cell shows; a value that is not there is a null, which kubectl prints as a blank."""
    columns = [
        ("n", "integer", ".n"),
        ("s", "string", ".s"),
        ("d", "date", ".d"),
        ("b", "boolean", ".b"),
        ("l", "string", ".l"),
    ]
    printer = custom_printer(tuple(PrinterColumn(name=name, type=type_, path=path) for name, type_, path in columns))
    full = {"metadata": {"name": "x"}, "n": 3, "s": "text", "d": "2024-01-01T00:00:00Z", "b": True, "l": [1, "a"]}
    assert printer.cells(full, NOW) == ["x", 3, "text", "98s", True, '[1,"a"]']
    assert printer.cells({"metadata": {"name": "x"}}, NOW) == ["x", None, None, None, None, None]
    assert printer.cells({"metadata": {"name": "x"}, "n": "3", "d": "soon"}, NOW)[1::2] == [None, "<invalid>", None]


def test_selectors_as_text() -> None:
    """As kubectl's -l would take them."""
    terms = [
        {"key": "z", "operator": "Exists"},
        {"key": "a", "operator": "In", "values": ["2", "1"]},
        {"key": "q", "operator": "DoesNotExist"},
    ]
    assert selector_text({"matchLabels": {"x": "y"}, "matchExpressions": terms}) == "x=y,a in (1,2),!q,z"
    assert (selector_text({}), selector_text(None)) == ("<none>", "<none>")
