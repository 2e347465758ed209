"""What a benchmark makes in a lab, and what it says when that does not come to life."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, cast

import pytest
from bench_world import FILE, THROUGHPUT, benchmark

import testbed.bench.site as bench_site
from testbed.bench import objects
from testbed.bench.site import LabSite, lab_topology
from testbed.errors import KernelError, LabError
from testbed.kernel.processes import Completed
from testbed.lab.handle import Lab
from testbed.manifests import load_topology
from testbed.model.benchmark import Position, sync_cases


class FakeApi:
    """An API in which every pod is ready, unless it is said not to be, and no Service has endpoints."""

    def __init__(self, unready: str = "") -> None:
        self.created: list[Any] = []
        self._unready = unready

    def create(self, obj: Any) -> Any:
        self.created.append(obj)
        return obj

    def get(self, resource: str, namespace: str, name: str) -> Any:
        status = "False" if name == self._unready else "True"
        return {"status": {"podIP": "10.244.1.2", "conditions": [{"type": "Ready", "status": status}]}}

    def list(self, resource: str, namespace: str, *, label_selector: str = "") -> tuple[list[Any], str]:
        events = [{"type": "Warning", "message": "Back-off restarting failed container http"}]
        return (events if resource == "events" else []), "1"


class FakeLab:
    def __init__(self, api: FakeApi, ended: str = "") -> None:
        self.api = api
        self.topology = load_topology(FILE)
        self._ended = ended

    def why_ended(self, *, within_s: float = 0.0) -> str:
        return self._ended


@pytest.mark.parametrize(
    ("unready", "ended", "message"),
    [
        ("", "", "iptables: Service bench/near has no endpoints: there is nothing to measure after 0 s"
                 "\n    Back-off restarting failed container http"),
        ("far", "", "iptables: pod bench/far is not ready after 0 s\n    Back-off restarting failed container http"),
        ("far", "the lab ended: somebody stopped it", "iptables: the lab ended: somebody stopped it"),
    ],
)  # fmt: skip
def test_what_does_not_come_to_life(
    monkeypatch: pytest.MonkeyPatch, unready: str, ended: str, message: str
) -> None:  # fmt: skip
    """A Service without endpoints, a pod that is not ready, a lab that ends: named, with the last warnings."""
    monkeypatch.setattr(bench_site, "READY_WITHIN_S", 0.0)
    site = LabSite(cast(Lab, FakeLab(FakeApi(unready), ended)), "iptables", benchmark(cases=THROUGHPUT))
    with pytest.raises(LabError) as caught:
        site.set_up()
    assert str(caught.value) == message


def test_syncs_need_no_pods() -> None:
    """Where nothing is sent, there is a namespace and nothing to wait for."""
    api = FakeApi()
    LabSite(cast(Lab, FakeLab(api)), "iptables", benchmark(cases=tuple(sync_cases()))).set_up()
    assert [obj["kind"] for obj in api.created] == ["Namespace"]


def test_kube_proxy_does_not_wait_when_syncs_are_measured() -> None:
    """minSyncPeriod is 0 for syncs alone; how seldom it looks at its rules stays."""
    assert lab_topology(benchmark()).kube_proxy == load_topology(FILE).kube_proxy
    found = lab_topology(benchmark(cases=tuple(sync_cases()))).kube_proxy
    assert found["iptables"] == {"syncPeriod": "1h", "minSyncPeriod": "0s"} == found["nftables"]


def test_client_and_servers_are_where_paths_say() -> None:
    """Client and near server share a node, the far one is on another; TCP and UDP of iperf3 have one NodePort."""
    made = objects.base_objects("node1", "node2", balanced=False)
    nodes = {obj["metadata"]["name"]: obj["spec"]["nodeName"] for obj in made if obj["kind"] == "Pod"}
    assert nodes == {"client": "node1", "near": "node1", "far": "node2"}
    services = {obj["metadata"]["name"]: obj["spec"] for obj in made if obj["kind"] == "Service"}
    assert (services["near"]["type"], services["far"]["type"]) == ("ClusterIP", "NodePort")
    ports = [port.get("nodePort") for port in services["far"]["ports"]]
    assert ports == [objects.HTTP_NODE_PORT, objects.IPERF_NODE_PORT, objects.IPERF_NODE_PORT]
    assert objects.base_objects("a", "b", balanced=True)[-1]["spec"]["type"] == "LoadBalancer"


@pytest.mark.parametrize("endpoints", [1, 3, 100])
def test_endpoints_of_the_many_are_nobodys(endpoints: int) -> None:
    """No two Services share an endpoint, none is a pod's address, and a change changes the last one."""
    pods = IPv4Network("10.244.0.0/15")
    seen: set[str] = set()
    for number in (0, 1, 2, 999, 49_999):
        before, after = (objects.nobody(number, endpoints, generation) for generation in (0, 1))
        assert len(set(before)) == endpoints and before[:-1] == after[:-1] and before[-1] != after[-1]
        assert seen.isdisjoint({*before, *after})
        assert not any(IPv4Address(address) in pods for address in (*before, *after))
        seen |= {*before, *after}


def test_positions() -> None:
    """First, middle and last of an order; of one Service all are that one, of none there is none."""
    order = [f"s-{number}" for number in range(1000)]
    assert objects.pick_positions(order, list(Position)) == {
        Position.FIRST: "s-0", Position.MIDDLE: "s-500", Position.LAST: "s-999",
    }  # fmt: skip
    assert set(objects.pick_positions(["s-0"], list(Position)).values()) == {"s-0"}
    assert objects.pick_positions([], list(Position)) == {}


REFUSED = "unable to connect to server: Connection refused"
BUSY = "error - the server is busy running a test. try again later"
BROKEN = "control socket has closed unexpectedly"
END = {"sum_sent": {"retransmits": 0}, "sum_received": {"bytes": 1e9, "bits_per_second": 8e9}}


@pytest.mark.parametrize(
    ("errors", "within_s", "message"),
    [([REFUSED, BUSY], 60.0, ""), ([BROKEN], 60.0, f"iperf3: {BROKEN}"), ([REFUSED] * 2, -1.0, f"iperf3: {REFUSED}")],
)
def test_an_iperf3_that_comes_before_its_server(
    monkeypatch: pytest.MonkeyPatch, errors: list[str], within_s: float, message: str
) -> None:  # fmt: skip
    """A client that could not begin tries again for a while; what goes wrong later is an error at once."""
    said = [json.dumps({"error": error}) for error in errors] + [json.dumps({"end": END})]

    class Asked(FakeLab):
        def run(self, where: str, argv: Sequence[str], *, timeout_s: float) -> Completed:
            text = said.pop(0)
            return Completed(status=int("error" in text), stdout=text.encode(), stderr=b"")

    monkeypatch.setattr(bench_site, "_BEGIN_WITHIN_S", within_s)
    monkeypatch.setattr(bench_site.time, "sleep", lambda _: None)
    monkeypatch.setattr(LabSite, "_server_pids", lambda *_: [])
    monkeypatch.setattr(LabSite, "_target", lambda *_: objects.Target("10.244.2.2"))
    site = LabSite(cast(Lab, Asked(FakeApi())), "iptables", benchmark(cases=THROUGHPUT))
    if message:
        with pytest.raises(KernelError) as caught:
            site.sample(THROUGHPUT[0])
        assert str(caught.value) == message
        assert len(said) == len(errors)
    else:
        assert site.sample(THROUGHPUT[0])["rate"] == 8.0
        assert said == []
