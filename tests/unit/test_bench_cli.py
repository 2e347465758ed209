"""``testbed bench`` as a user meets it: options, refusals, interrupts, files. No lab is started."""

# ruff: noqa: E501  # whole messages

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench_world import FakeSite, a_machine, benchmark, run, write

import testbed.cli.bench_run as bench_run
from testbed.bench.results import Results, read_results
from testbed.bench.runner import Recording, record
from testbed.bench.session import Listener, Session
from testbed.cli.main import main
from testbed.errors import KernelError, LabError
from testbed.model.benchmark import Benchmark, Case


@dataclass
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Run ``testbed bench …`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["testbed", "bench", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return Ended(int(str(caught.value.code or 0)), printed.out, printed.err)

    return call


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Benchmark]:
    """No machine and no labs: sites that pretend. Collects the benchmarks that are run."""
    asked: list[Benchmark] = []

    def measure(session: Session, one: Benchmark, modes: Any, backend: str, listener: Listener) -> None:
        asked.append(one)
        sites = {mode: FakeSite(mode) for mode in modes}
        record(one, sites, session.recording, machine="host", on_step=listener.on_step, on_done=listener.on_done,
               on_round=listener.on_round)  # fmt: skip

    _pretend(monkeypatch, measure)
    return asked


def _pretend(monkeypatch: pytest.MonkeyPatch, measure: Callable[..., None]) -> None:
    monkeypatch.setattr(bench_run, "check_machine", lambda *_: None)
    monkeypatch.setattr(bench_run, "choose_iptables_backend", lambda wanted: wanted or "nft")
    monkeypatch.setattr(bench_run, "begin_session", lambda: Session(machine=a_machine(), recording=Recording()))
    monkeypatch.setattr(bench_run, "measure", measure)
    monkeypatch.setattr(bench_run.signal, "signal", lambda *_: None)  # pytest's stays


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_are_a_benchmark(bench: Callable[..., Ended], fakes: list[Benchmark]) -> None:
    """What is typed is what is measured."""
    ended = bench(
        "latency", "--modes", "nftables,iptables", "--services", "1,100", "--samples", "2", "--duration", "200ms",
        "--paths", "clusterip", "--positions", "last", "--seed", "9", "--endpoints", "3", "--no-report",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    (asked,) = fakes
    assert (asked.name, asked.proxy_modes, asked.services) == ("latency", ("nftables", "iptables"), (1, 100))
    assert (asked.samples, asked.duration_s, asked.seed, asked.endpoints) == (2, 0.2, 9, 3)
    assert [str(case) for case in asked.cases] == ["first-answer direct", "first-answer clusterip (last)"]
    assert "first-answer   clusterip (last)        100   p50 µs" in ended.out
    assert "1 Services, round 2" in ended.err and "left] " in ended.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["throughput", "--streams", "0,x"],
         "--streams: wants a whole number from 1 to 128, got 0\n--streams: wants a whole number, got the text 'x'"),
        (["throughput", "--modes", "iptabels"],
         "--modes: 'iptabels' is not one of iptables, ipvs, nftables, userspace (did you mean \"iptables\"?)"),
        (["throughput", "--services", "99999"], "--services: wants a whole number from 0 to 50000, got 99999"),
        (["throughput", "--endpoints", "0"], "--endpoints: wants a whole number from 1 to 100, got 0"),
        (["throughput", "--samples", "0"], "--samples: wants a whole number from 1 to 1000, got 0"),
        (["throughput", "--duration", "0.2s"],
         "--duration: 0.2s: iperf3 and wrk count in whole seconds; latency alone may be sampled for less"),
        (["throughput", "--udp", "fast"], "--udp: 'fast' is not a rate such as 100mbit or 1gbit"),
        (["throughput", "--paths", "ingress"],
         "--paths: 'ingress' passes HTTP only: measure connections or latency over it"),
        (["latency", "--topology", "big", "--services", "50000", "-t", "three-nodes"],
         "--services: 50000 Services do not fit into the serviceCIDR 10.96.0.0/22 of topology 'three-nodes': it has room for 960"),
        (["latency", "-t", "nowhere"],
         "--topology: there is no topology 'nowhere' (ours: bench, big, three-nodes, tutorial, two-lans)"),
        (["compare", "a", "b"], "cannot read 'a': No such file or directory"),
        (["run", "nope.yaml"], "nope.yaml: no such file"),
        (["run", "."], "benchmark.yaml: no such file"),
    ],
)  # fmt: skip
def test_bad_options(bench: Callable[..., Ended], words: list[str], error: str) -> None:
    """Options are complained about by their names, all of them, before anything starts."""
    ended = bench(*words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.removeprefix("error: ").strip() == error


def test_a_mode_that_cannot_run(bench: Callable[..., Ended], fakes: list[Benchmark], monkeypatch: Any) -> None:
    """One that was asked for by name ends the command with the reason; by default it is left out, and that is told."""
    monkeypatch.setattr(bench_run, "why_not", lambda mode: "not built yet" if mode == "userspace" else "")
    monkeypatch.setattr(bench_run, "why_not_here", lambda mode: "no ip_vs here" if mode == "ipvs" else "")
    monkeypatch.setattr(bench_run, "why_not_nested", lambda mode: "no UML here")
    refused = bench("latency", "--modes", "iptables,ipvs")
    assert (refused.status, refused.out, refused.err) == (3, "", "error: no ip_vs here; no UML here\n")
    assert not fakes
    ended = bench("latency", "--samples", "1", "--services", "1", "-o", "json", "--no-report")
    assert ended.status == 0
    found = json.loads(ended.out)
    assert found["skipped"] == [
        {"mode": "userspace", "what": "", "reason": "not built yet"},
        {"mode": "ipvs", "what": "", "reason": "no ip_vs here; no UML here"},
    ]
    assert {one["mode"] for one in found["series"]} == {"iptables", "nftables"}


def test_unwritable_report_folder(bench: Callable[..., Ended], fakes: list[Benchmark]) -> None:
    """Known before anything is measured."""
    Path("file").touch()
    ended = bench("latency", "--report", "file/x", "--modes", "iptables")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "error: cannot write reports into 'file/x': Not a directory\n"
    assert not fakes


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_default_folder(bench: Callable[..., Ended], fakes: list[Benchmark]) -> None:
    """Without --report a new folder below bench-results gets everything, and its name is told."""
    ended = bench("throughput", "--modes", "iptables,nftables", "--samples", "3")
    assert ended.status == 0, ended.err
    (folder,) = Path("bench-results").iterdir()
    assert folder.name.startswith("throughput-2")
    assert sorted(file.name for file in folder.iterdir()) == ["plots", "report.html", "results.csv", "results.json"]
    assert ended.out.splitlines()[-1] == f"written into {folder}: results.json, results.csv, plots, report.html"
    assert read_results(folder).complete


def test_a_file_with_other_modes(bench: Callable[..., Ended], fakes: list[Benchmark]) -> None:
    """`run` takes a folder's benchmark.yaml; --modes stands instead of its proxyModes."""
    Path("benchmark.yaml").write_text(
        "apiVersion: testbed/v1\nkind: Benchmark\nmetadata: {name: b}\n"
        "spec: {proxyModes: [iptables], samples: 1, services: [5], measure: [{latency: {}}]}\n"
    )
    assert bench("run", ".", "--modes", "nftables", "--report", "out", "--only-data").status == 0
    assert [one.proxy_modes for one in fakes] == [("nftables",)]
    assert sorted(file.name for file in Path("out").iterdir()) == ["results.csv", "results.json"]
    ended = bench("run", ".", "--modes", "ipfs")
    assert ended.status == 2 and ended.err.startswith("error: there is no proxy mode 'ipfs'; the modes are ")


class Ends(FakeSite):
    """A site whose lab comes to some end in the third round."""

    end: BaseException

    def sample(self, case: Case) -> dict[str, float]:
        if len(self.asked) == 14:
            raise self.end
        return super().sample(case)


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted after 14 of 36 samples"),
        (LabError("iptables: the lab ended"), 3, "stopped after 14 of 36 samples: iptables: the lab ended"),
    ],
)
def test_interrupted(
    bench: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, end: BaseException, status: int, reason: str
) -> None:
    """What was measured is printed and written, marked as incomplete, with the reason; the status says what happened."""

    def measure(session: Session, one: Benchmark, modes: Any, backend: str, listener: Listener) -> None:
        site = Ends("iptables")
        site.end = end
        record(one, {"iptables": site}, session.recording, machine="host", on_done=listener.on_done)

    _pretend(monkeypatch, measure)
    ended = bench("throughput", "--modes", "iptables", "--report", "out")
    assert ended.status == status
    assert f"INCOMPLETE: {reason}" in ended.out
    found = read_results(Path("out"))
    assert (found.complete, found.reason) == (False, reason)
    assert sum(len(one.samples) for one in found.series if one.metric == "rate") == 8
    assert f"Incomplete: {reason}" in Path("out/report.html").read_text()


def test_drafts(bench: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    """After each round the file holds what there is, marked as incomplete: after a SIGKILL it is all there is."""
    drafts = []

    def measure(session: Session, one: Benchmark, modes: Any, backend: str, listener: Listener) -> None:
        def on_round() -> None:
            listener.on_round()
            drafts.append(read_results(Path("out")))

        record(one, {"iptables": FakeSite("iptables")}, session.recording, machine="host", on_done=listener.on_done,
               on_round=on_round)  # fmt: skip

    _pretend(monkeypatch, measure)
    assert bench("latency", "--modes", "iptables", "--services", "5", "--samples", "2", "--report", "out").status == 0
    assert [(draft.complete, draft.reason) for draft in drafts] == [
        (False, "the run ended after 5 of 15 samples"), (False, "the run ended after 10 of 15 samples"),
    ]  # fmt: skip
    assert [len(one.samples) for one in drafts[1].series if one.metric == "p50"] == [1] * 5
    assert read_results(Path("out")).complete


# ── two kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nested(monkeypatch: pytest.MonkeyPatch, fakes: list[Benchmark]) -> list[tuple[str, ...]]:
    """This kernel has no ip_vs, the nested one no NAT in nf_tables. Collects the modes that are measured in the nested one."""
    asked: list[tuple[str, ...]] = []

    def measure_nested(one: Benchmark, modes: tuple[str, ...], backend: str) -> tuple[Results, int]:
        asked.append(modes)
        return run(replace(one, proxy_modes=modes), machine=a_machine("nested", "6.1.176"), speed=0.2), 0

    monkeypatch.setattr(bench_run, "why_not", lambda mode: "")
    monkeypatch.setattr(bench_run, "why_not_here", lambda mode: "no ip_vs here" if mode == "ipvs" else "")
    monkeypatch.setattr(bench_run, "why_not_nested", lambda mode: "no NAT there" if mode == "nftables" else "")
    monkeypatch.setattr(bench_run, "measure_nested", measure_nested)
    return asked


def test_what_this_kernel_lacks_is_measured_in_the_nested_one(
    bench: Callable[..., Ended], fakes: list[Benchmark], nested: list[tuple[str, ...]]
) -> None:
    """One result on two kernels: figures are marked, and no verdict is on both."""
    assert bench("throughput", "--modes", "iptables,ipvs,nftables", "--report", "out").status == 0
    assert nested == [("ipvs",)]
    found = read_results(Path("out"))
    assert [machine.id for machine in found.machines] == ["host", "nested"] and found.complete
    assert {(one.machine, one.mode) for one in found.series} == {
        ("host", "iptables"), ("host", "nftables"), ("nested", "ipvs"),
    }  # fmt: skip
    assert {(verdict.a, verdict.b) for verdict in found.verdicts} == {("iptables", "nftables")}
    page = Path("out/report.html").read_text()
    assert "ipvs (nested)" in page and "nested kernel, User-Mode Linux 6.1.176" in page


def test_one_kernel(bench: Callable[..., Ended], fakes: list[Benchmark], nested: list[tuple[str, ...]]) -> None:
    """All in the nested kernel; nftables cannot be, which is told, or refused when it was asked for by name."""
    ended = bench("throughput", "--one-kernel", "--report", "out")
    assert ended.status == 0 and fakes == [] and nested == [("userspace", "iptables", "ipvs")]
    assert "nftables: no NAT there" in ended.out
    found = read_results(Path("out"))
    assert {(verdict.machine, verdict.a, verdict.b) for verdict in found.verdicts} == {
        ("nested", "userspace", "iptables"), ("nested", "userspace", "ipvs"), ("nested", "iptables", "ipvs"),
    }  # fmt: skip
    refused = bench("throughput", "--one-kernel", "--modes", "ipvs,nftables")
    assert (refused.status, refused.err) == (3, "error: no NAT there\n")


def test_interrupted_inside(
    bench: Callable[..., Ended], nested: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this kernel measured, and what the nested one had until then, is kept."""

    def measure_nested(one: Benchmark, modes: tuple[str, ...], backend: str) -> tuple[Results, int]:
        part = run(replace(one, proxy_modes=modes), machine=a_machine("nested", "6.1.176"))
        return msgspec.structs.replace(part, complete=False, reason="interrupted after 3 of 36 samples"), 130

    monkeypatch.setattr(bench_run, "measure_nested", measure_nested)
    ended = bench("throughput", "--modes", "iptables,ipvs", "--report", "out", "-o", "json")
    assert ended.status == 130
    found = read_results(Path("out"))
    assert (found.complete, found.reason) == (False, "nested kernel: interrupted after 3 of 36 samples")
    assert {one.mode for one in found.series} == {"iptables", "ipvs"}


def test_nested_kernel_that_ends(
    bench: Callable[..., Ended], nested: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nested kernel that does not boot costs its own modes only: the others' figures are written, and the status is 3."""

    def measure_nested(one: Benchmark, modes: tuple[str, ...], backend: str) -> tuple[Results, int]:
        raise KernelError("the nested kernel did not boot within 60 s")

    monkeypatch.setattr(bench_run, "measure_nested", measure_nested)
    ended = bench("throughput", "--modes", "iptables,ipvs", "--report", "out")
    assert ended.status == 3 and ended.err.endswith("error: the nested kernel did not boot within 60 s\n")
    found = read_results(Path("out"))
    assert not found.complete and {one.mode for one in found.series} == {"iptables"}


# ── compare ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compare(bench: Callable[..., Ended]) -> None:
    """Folders or files; text or JSON; kernels that differ are refused with status 2."""
    asked = benchmark()
    write(Path("a"), run(asked, seed=1))
    write(Path("b"), run(asked, seed=2))
    write(Path("c"), run(asked, machine=a_machine(kernel="6.1")))
    text = bench("compare", "a", "b/results.json", "--all")
    assert text.status == 0 and text.out.splitlines()[-1].endswith("of 12 figures changed beyond noise; 12 did not")
    found = json.loads(bench("compare", "a", "b", "-o", "json").out)
    assert len(found["changes"]) == 12 and found["notes"] == found["missing"] == []
    refused = bench("compare", "a", "c")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith("error: 6.18.0 and 6.1 are different kernels")
