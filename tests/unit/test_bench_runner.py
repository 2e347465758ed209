"""Turns, warm-up, failures: how samples are taken, with sites that only pretend."""

from __future__ import annotations

import pytest
from bench_world import LATENCY, THROUGHPUT, FakeSite, benchmark

from testbed.bench.placement import place_modes
from testbed.bench.results import Skipped
from testbed.bench.runner import Recording, plan, record
from testbed.errors import LabError
from testbed.model.benchmark import Case, NetPath, Position, Workload, connections_cases, latency_cases, with_baselines

DIRECT, CLUSTER_IP = THROUGHPUT[0], THROUGHPUT[1]


def test_turns() -> None:
    """Of each case every mode is asked before the next case, and modes take turns in being first."""
    asked = benchmark(cases=(DIRECT, CLUSTER_IP), samples=2, services=(1000, 1))
    steps = plan(asked, ["iptables", "ipvs", "nftables"])
    assert [(step.services, step.round, step.case.path.value, step.mode[:3]) for step in steps[:9]] == [
        (1, 0, "direct", "ipt"), (1, 0, "direct", "ipv"), (1, 0, "direct", "nft"),
        (1, 0, "clusterip", "ipt"), (1, 0, "clusterip", "ipv"), (1, 0, "clusterip", "nft"),
        (1, 1, "direct", "ipv"), (1, 1, "direct", "nft"), (1, 1, "direct", "ipt"),
    ]  # fmt: skip
    assert len(steps) == 2 * 3 * 2 * 3  # Services, rounds with warm-up, cases, modes
    assert [step.services for step in steps] == [1] * 18 + [1000] * 18


def test_warm_up_is_dropped() -> None:
    """Every mode is asked once more than there are samples, and the first answer of each case does not count."""
    asked, recording = benchmark(samples=3), Recording()
    sites = {mode: FakeSite(mode) for mode in asked.proxy_modes}
    rounds: list[None] = []
    record(asked, sites, recording, machine="host", on_round=lambda: rounds.append(None), load=lambda: 0.5)
    assert [len(site.asked) for site in sites.values()] == [4 * 6, 4 * 6]
    assert len(recording.samples) == 2 * 3 * 6
    assert {sample.round for sample in recording.samples} == {1, 2, 3}
    assert recording.loads == [0.5] * 4 and len(rounds) == 3


def test_services_only_grow() -> None:
    """Numbers of Services are measured from the smallest on, whatever the order they were given in."""
    asked = benchmark(samples=1, services=(5000, 0, 100))
    site = FakeSite("iptables")
    record(asked, {"iptables": site}, Recording(), machine="host")  # the site refuses to shrink
    assert site.services == 5000


def test_a_case_that_fails() -> None:
    """What a program refuses is told once, not tried again, and costs the other modes nothing."""
    asked, recording = benchmark(samples=3), Recording()
    sites = {"iptables": FakeSite("iptables"), "nftables": FakeSite("nftables", breaks=[CLUSTER_IP])}
    record(asked, sites, recording, machine="host")
    reason = "bench/client: `iperf3` ended with status 1: unable to connect"
    assert recording.skipped == [Skipped(mode="nftables", what="tcp-1 clusterip, 1000 Services", reason=reason)]
    counts = {mode: sum(sample.mode == mode for sample in recording.samples) for mode in sites}
    assert counts == {"iptables": 18, "nftables": 15}


def test_a_sample_that_fails_later() -> None:
    """One sample that fails is missing; the next round has one again."""

    class Once(FakeSite):
        def sample(self, case: Case) -> dict[str, float]:
            self._breaks = [CLUSTER_IP] if self.asked.count(CLUSTER_IP) == 2 and not recording.skipped else []
            return super().sample(case)

    asked, recording = benchmark(samples=4, cases=(CLUSTER_IP,)), Recording()
    record(asked, {"iptables": Once("iptables")}, recording, machine="host")
    assert [sample.round for sample in recording.samples] == [1, 3, 4]
    assert recording.skipped[0].what == "tcp-1 clusterip, 1000 Services, round 2"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LabError("the lab ended")])
def test_what_was_measured_is_kept(error: BaseException) -> None:
    """An interrupt or the end of a lab stops everything, and the samples so far are there."""

    class Ends(FakeSite):
        def sample(self, case: Case) -> dict[str, float]:
            if len(self.asked) == 10:
                raise error
            return super().sample(case)

    recording = Recording()
    with pytest.raises(type(error)):
        record(benchmark(), {"iptables": Ends("iptables")}, recording, machine="host")
    assert len(recording.samples) == 4  # ten without six of warm-up


def test_progress() -> None:
    """Progress names the case and mode, and counts what was skipped as done."""
    told: list[str] = []
    counts: list[tuple[int, int]] = []
    asked = benchmark(samples=1, cases=LATENCY)
    record(
        asked, {mode: FakeSite(mode) for mode in asked.proxy_modes}, Recording(), machine="host", on_step=told.append,
        on_done=lambda *count: counts.append(count),
    )  # fmt: skip
    assert told[:3] == [
        "making 1000 Services in iptables", "making 1000 Services in nftables",
        "1000 Services, warm-up: first-answer direct in iptables",
    ]  # fmt: skip
    assert told[-1] == "1000 Services, round 1: first-answer clusterip (last) in iptables"
    assert counts == [(number, 8) for number in range(1, 9)]


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def test_baselines_come_along() -> None:
    """Each path comes after the one that it is compared with: the same node's with the same node's."""
    assert with_baselines([NetPath.NODE_PORT, NetPath.CLUSTER_IP_SAME_NODE, NetPath.DIRECT]) == [
        NetPath.DIRECT, NetPath.NODE_PORT, NetPath.DIRECT_SAME_NODE, NetPath.CLUSTER_IP_SAME_NODE,
    ]  # fmt: skip


def test_positions_are_of_the_cluster_ip() -> None:
    """Only the ClusterIP of another node's pod is asked at several positions of the rules."""
    cases = latency_cases([NetPath.CLUSTER_IP, NetPath.NODE_PORT], list(Position))
    assert [str(case) for case in cases] == [
        "first-answer direct", "first-answer clusterip (first)", "first-answer clusterip (middle)",
        "first-answer clusterip (last)", "first-answer nodeport",
    ]  # fmt: skip
    new = connections_cases([NetPath.CLUSTER_IP], [Position.LAST], [False])
    assert [str(case) for case in new] == ["new-connections direct", "new-connections clusterip (last)"]
    assert all(case.workload is Workload.CONNECTIONS for case in new)


# ── which kernel ────────────────────────────────────────────────────────────────────────────────────────────────────

HERE = {"ipvs": "no ip_vs in this kernel", "userspace": "", "iptables": "", "nftables": ""}
NESTED = {"ipvs": "", "userspace": "", "iptables": "", "nftables": "no NAT in its nf_tables"}
ALL = tuple(HERE)


def test_what_this_kernel_lacks_goes_to_the_nested_one() -> None:
    """Only the mode that this kernel cannot run is measured in the nested one."""
    found = place_modes(ALL, one_kernel=False, why_not_here=HERE.get, why_not_nested=NESTED.get)  # type: ignore[arg-type]
    assert (found.here, found.nested, found.skipped) == (("userspace", "iptables", "nftables"), ("ipvs",), ())


def test_one_kernel() -> None:
    """With --one-kernel all go to the nested one, and what that cannot run is left out with its reason."""
    found = place_modes(ALL, one_kernel=True, why_not_here=HERE.get, why_not_nested=NESTED.get)  # type: ignore[arg-type]
    assert (found.here, found.nested) == ((), ("ipvs", "userspace", "iptables"))
    assert found.skipped == (Skipped(mode="nftables", what="", reason="no NAT in its nf_tables"),)


def test_one_kernel_that_has_everything() -> None:
    """Where this kernel runs all that is asked for, --one-kernel stays on it."""
    found = place_modes(("iptables", "nftables"), one_kernel=True, why_not_here=HERE.get, why_not_nested=NESTED.get)  # type: ignore[arg-type]
    assert (found.here, found.nested) == (("iptables", "nftables"), ())


def test_nowhere() -> None:
    """A mode that neither kernel runs says why for both."""
    found = place_modes(("ipvs",), one_kernel=False, why_not_here=HERE.get, why_not_nested=lambda _: "UML is missing")  # type: ignore[arg-type]
    assert found.skipped == (Skipped(mode="ipvs", what="", reason="no ip_vs in this kernel; UML is missing"),)
