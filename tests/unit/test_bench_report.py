"""Figures and what is made of them: ratios, verdicts, tables, files, plots, HTML, comparisons."""

# ruff: noqa: E501  # whole lines of reports

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import msgspec
import pytest
from bench_world import EVERYTHING, LATENCY, THROUGHPUT, a_machine, benchmark, run, write

from testbed.bench.assemble import join, judged, write_report
from testbed.bench.compare import compare
from testbed.bench.plots import plan_plots
from testbed.bench.report import CSV_COLUMNS, comparison_text, csv_text, number, slope_text, text_report, verdict_text
from testbed.bench.results import Results, Skipped, read_results, results_json, results_schema
from testbed.errors import InputError

TWO = benchmark(cases=THROUGHPUT[:3])


def incomplete(results: Results) -> Results:
    skipped = [Skipped(mode="ipvs", what="", reason="the kernel has no ip_vs")]
    return msgspec.structs.replace(results, complete=False, reason="interrupted after 7 of 36 samples", skipped=skipped)


def nested(**options: float) -> Results:
    """Results of ipvs in the nested kernel, which is slower."""
    return run(
        benchmark(proxy_modes=("ipvs",), cases=THROUGHPUT[:3]),
        machine=a_machine("nested", "6.1.176"),
        speed=0.2,
        **options,
    )  # type: ignore[arg-type]


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that gets 5% faster with each sample changes every figure, and hardly a ratio."""
    steady, drifting = run(noise=0.002), run(noise=0.002, drift=0.05)
    for results, most in ((steady, 0.02), (drifting, 0.2)):
        for one in results.series:
            if one.metric == "rate" and one.path == "clusterip":
                assert one.ratio is not None and one.ratio.path == "direct"
                assert one.ratio.median == pytest.approx(0.9, abs=most)
    spread = {round(results.series[0].q3 / results.series[0].q1, 1) for results in (steady, drifting)}
    assert min(spread) == 1.0 and max(spread) > 1.2


def test_direct_path_has_no_ratio() -> None:
    """The baseline is not divided by itself, and counts of retransmits are not divided at all."""
    assert all(one.ratio is None for one in run().series if one.path == "direct" or one.metric == "retransmits")


def test_modes_are_told_apart_beyond_noise_only() -> None:
    """Equal modes are too noisy to tell apart; what iptables takes for 1,000 Services is seen when noise is small."""
    assert not any(verdict.differ for verdict in run().verdicts)
    asked = benchmark(cases=LATENCY, services=(5000,))
    assert [(verdict.metric, verdict.a, verdict.b, verdict.differ) for verdict in run(asked).verdicts] == [
        ("p10", "iptables", "nftables", True),
        ("p50", "iptables", "nftables", True),
    ]
    assert not any(verdict.differ for verdict in run(asked, noise=1.5).verdicts)


def test_one_sample_tells_nothing() -> None:
    """With one sample there are no intervals, so nothing differs."""
    results = run(benchmark(cases=LATENCY, samples=1, services=(5000,)))
    assert all(one.interval is None for one in results.series)
    assert [verdict_text(verdict) for verdict in results.verdicts] == [
        f"too few samples to tell iptables and nftables apart: first-answer clusterip (last) {metric}, 5000 Services"
        for metric in ("p10", "p50")
    ]


def test_slopes() -> None:
    """Over the number of Services iptables' first answer rises by 10.5 ns a Service, nftables' does not."""
    results = run(benchmark(cases=LATENCY, services=(0, 1000, 5000, 10000), samples=7))
    found = {slope.mode: slope for slope in results.slopes if slope.path == "clusterip"}
    assert found["iptables"].rises and found["iptables"].per_service == pytest.approx(0.0105, rel=0.1)
    assert not found["nftables"].rises
    assert not any(slope.rises for slope in results.slopes if slope.path == "direct")


def test_slopes_beyond_the_direct_path() -> None:
    """Where every connection takes longer with more Services, what iptables adds is seen beyond that, and nftables adds nothing."""
    results = run(benchmark(cases=LATENCY, services=(0, 1000, 5000, 10000), samples=7), slows=0.07)
    assert all(slope.rises for slope in results.slopes)
    beyond = {
        slope.mode: slope.beyond for slope in results.slopes if (slope.path, slope.metric) == ("clusterip", "p50")
    }
    assert beyond["iptables"] and beyond["iptables"].rises
    assert beyond["iptables"].path == "direct" and beyond["iptables"].per_service == pytest.approx(0.0105, rel=0.3)
    assert beyond["nftables"] and not beyond["nftables"].rises
    assert all(slope.beyond is None for slope in results.slopes if slope.path == "direct")
    text = slope_text(next(slope for slope in results.slopes if slope.beyond and slope.metric == "p50"))
    assert "ns for each Service (95 %: 80" in text and "; beyond direct 10.8 ns for each Service (95 %: 10" in text


def test_noise_is_told() -> None:
    """A machine that others use, wide spreads, and rounds that disagree are warnings; a quiet run has none."""
    assert run().warnings == []
    busy = msgspec.structs.replace(a_machine(), busy_before=0.89, load_before=26.6)
    warnings = run(noise=0.6, machine=busy).warnings
    assert warnings[0] == "host: the machine was busy before the first lab: 89% of 2 CPUs (load 26.6)"
    assert any("the middle half of the samples spreads over" in warning for warning in warnings)


def test_two_runs_agree() -> None:
    """Ten rounds each: two runs of one machine have overlapping intervals, whatever the seed, or say that they are noisy."""
    asked = benchmark(samples=10, cases=THROUGHPUT[:3])
    for seed in range(1, 6):
        changes = compare(run(asked, seed=seed), run(asked, seed=seed + 100)).changes
        assert sum(change.beyond_noise for change in changes) <= 1, seed


# ── texts and files ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (31365.4, "31,365"),
        (1000, "1,000"),
        (274.3, "274"),
        (49.26, "49.3"),
        (9.988, "9.99"),
        (0.012345, "0.012"),
        (-1234, "-1,234"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    """Numbers have about three digits."""
    assert number(value) == text


def test_text_report() -> None:
    """The whole text of a small run that was interrupted: table, machine, verdicts, what is missing."""
    results = incomplete(judged(join(run(TWO), nested())))
    assert text_report(results) == (
        "CASE    PATH        SERVICES   METRIC        MODE            MEDIAN       Q1 – Q3   OF DIRECT          95 %   N\n"
        "tcp-1   direct          1000   rate Gbit/s   iptables          10.0   9.96 – 10.0                             5\n"
        "tcp-1   direct          1000   rate Gbit/s   nftables          10.0   9.87 – 10.1                             5\n"
        "tcp-1   direct          1000   rate Gbit/s   ipvs (nested)     2.00   1.99 – 2.00                             5\n"
        "tcp-1   clusterip       1000   rate Gbit/s   iptables          9.05   9.03 – 9.08        0.91   0.89 – 0.92   5\n"
        "tcp-1   clusterip       1000   rate Gbit/s   nftables          8.98   8.97 – 8.99        0.89   0.88 – 0.92   5\n"
        "tcp-1   clusterip       1000   rate Gbit/s   ipvs (nested)     1.81   1.78 – 1.81        0.91   0.89 – 0.91   5\n"
        "tcp-1   nodeport        1000   rate Gbit/s   iptables          9.00   8.98 – 9.03        0.90   0.88 – 0.92   5\n"
        "tcp-1   nodeport        1000   rate Gbit/s   nftables          9.03   8.94 – 9.04        0.91   0.88 – 0.91   5\n"
        "tcp-1   nodeport        1000   rate Gbit/s   ipvs (nested)     1.79   1.79 – 1.80        0.90   0.89 – 0.91   5\n"
        "\n"
        "host: kernel 6.18.0 x86_64; 2 CPUs (a processor), 4,096 MiB; nf_conntrack_max 262,144\n"
        "host: load 0.1 before (others used 2% of the CPUs), 0.0 – 0.0 during\n"
        "host: versions: iperf3 3.12\n"
        "host: offloads of bench/client eth0: on: tcp-segmentation-offload; off: generic-receive-offload\n"
        "nested: nested kernel, User-Mode Linux 6.1.176 x86_64; 2 CPUs (a processor), 4,096 MiB; nf_conntrack_max 262,144\n"
        "nested: load 0.1 before (others used 2% of the CPUs), 0.0 – 0.0 during\n"
        "nested: versions: iperf3 3.12\n"
        "nested: offloads of bench/client eth0: on: tcp-segmentation-offload; off: generic-receive-offload\n"
        "\n"
        "modes of one kernel side by side:\n"
        "  too noisy to tell iptables and nftables apart: tcp-1 clusterip rate, 1000 Services\n"
        "  too noisy to tell iptables and nftables apart: tcp-1 nodeport rate, 1000 Services\n"
        "\n"
        "not measured:\n"
        "  ipvs: the kernel has no ip_vs\n"
        "\n"
        "INCOMPLETE: interrupted after 7 of 36 samples"
    )


def test_kernels_never_meet_in_a_verdict() -> None:
    """A mode of the nested kernel is compared with none of this one."""
    results = judged(join(run(TWO), nested()))
    assert {(verdict.machine, verdict.a, verdict.b) for verdict in results.verdicts} == {
        ("host", "iptables", "nftables")
    }


def test_json_is_as_its_schema_says_and_reads_back(tmp_path: Path) -> None:
    """Whatever was measured: the file validates against the printed schema, and is the same when it is read."""
    for results in (run(benchmark(cases=EVERYTHING)), incomplete(run(TWO)), judged(join(run(TWO), nested()))):
        jsonschema.validate(json.loads(results_json(results)), results_schema())
        assert read_results(write(tmp_path / "a", results)) == results


def test_csv() -> None:
    """One row for each sample, with what it is of."""
    results = run(TWO)
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert len(rows) == sum(len(one.samples) for one in results.series) == 2 * 3 * 5 * 3
    assert tuple(rows[0]) == CSV_COLUMNS
    first = {**rows[0], "sample": "…"}
    assert list(first.values()) == [
        "host",
        "6.18.0",
        "iptables",
        "throughput",
        "tcp-1",
        "direct",
        "",
        "1000",
        "rate",
        "Gbit/s",
        "1",
        "…",
    ]


class Page(HTMLParser):
    """Every tag is closed; all that a page would load is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_needs_nothing_else(tmp_path: Path) -> None:
    """report.html is well-formed, holds its plots, loads nothing, says what was not complete, and escapes what it is told."""
    results = msgspec.structs.replace(incomplete(run(TWO)), name="<script>alert(1)</script>")
    write_report(tmp_path, results)
    source = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert len(page.loads) == 1 and page.loads[0].startswith("data:image/svg+xml;base64,")
    assert "@import" not in source and "url(" not in source and "<script" not in source
    for words in (
        "Incomplete: interrupted after 7 of 36 samples",
        "ipvs: the kernel has no ip_vs",
        "kernel 6.18.0",
        "<script>alert(1)",
    ):
        assert words in page.text


def test_plots(tmp_path: Path) -> None:
    """Bars at the largest number of Services, curves where there are several; SVG is XML, PNG is PNG, the same each time."""
    results = run(benchmark(cases=(*THROUGHPUT[:3], *LATENCY), services=(0, 1000, 5000), samples=3))
    names = [plot.name for plot in plan_plots(results)]
    assert names == [
        "latency-first-answer-p10-curve",
        "latency-first-answer-p50-bars",
        "latency-first-answer-p50-curve",
        "throughput-tcp-1-rate-bars",
        "throughput-tcp-1-rate-curve",
    ]
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_report(folder, results)
    for name in names:
        svg = (tmp_path / "a" / "plots" / f"{name}.svg").read_bytes()
        assert svg == (tmp_path / "b" / "plots" / f"{name}.svg").read_bytes()
        text = "".join(ElementTree.fromstring(svg).itertext())
        assert "iptables" in text and "nftables" in text
        assert (tmp_path / "a" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_kernels_have_panels_of_their_own() -> None:
    """What the nested kernel measured stands beside the others' axes, marked, and not among them."""
    figure = plan_plots(judged(join(run(TWO), nested())))[0].draw()
    assert [axis.get_title() for axis in figure.axes] == ["this kernel", "nested kernel"]
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
    assert legends == [["iptables", "nftables"], ["ipvs (nested)"]]


# ── compare ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_beyond_noise() -> None:
    """A path that became dearer is told with its direction; what did not change is counted."""
    asked = benchmark(cases=LATENCY, services=(1, 5000), samples=7)
    faster = run(asked)
    for one in faster.series:  # the second run's iptables takes twice as long through 5,000 Services
        if (
            one.mode == "iptables"
            and one.path == "clusterip"
            and one.services == 5000
            and one.metric == "p50"
            and one.ratio
            and one.ratio.interval
        ):
            one.ratio.median *= 2
            one.ratio.interval.low *= 2
            one.ratio.interval.high *= 2
    comparison = compare(run(asked, seed=2), faster)
    changed = [change for change in comparison.changes if change.beyond_noise]
    assert [(change.mode, change.subject, change.better) for change in changed] == [
        ("iptables", "first-answer clusterip (last), 5000 Services", False)
    ]
    text = comparison_text(comparison)
    assert (
        text.splitlines()[1].endswith("worse")
        and text.splitlines()[-1] == "1 of 16 figures changed beyond noise; 15 did not"
    )
    assert len(comparison_text(comparison, every=True).splitlines()) == 1 + 16 + 1


def test_a_faster_machine_is_no_change_of_a_path() -> None:
    """Ratios to the direct path are compared: on a machine of twice the speed only the direct path itself changed."""
    changes = compare(run(TWO), run(TWO, speed=2)).changes
    assert {(change.subject.split()[1].rstrip(","), change.beyond_noise) for change in changes} == {
        ("direct", True), ("clusterip", False), ("nodeport", False),
    }  # fmt: skip


def test_different_kernels_are_not_compared() -> None:
    """Neither another release nor a nested kernel is divided by this one."""
    with pytest.raises(InputError) as caught:
        compare(run(TWO), run(TWO, machine=a_machine(kernel="6.1.0")))
    assert str(caught.value) == (
        "6.18.0 and 6.1.0 are different kernels: their figures cannot be compared; measure both on one, for example with --one-kernel"
    )
    with pytest.raises(InputError, match=r"6\.18\.0 and 6\.18\.0 \(nested\) are different kernels"):
        compare(run(TWO), run(TWO, machine=a_machine("nested")))


def test_only_the_kernel_that_both_have_is_compared() -> None:
    """Of a run on two kernels and one on this alone, this kernel's figures are compared; the others are listed."""
    comparison = compare(judged(join(run(TWO), nested())), run(TWO, seed=3))
    assert {change.kernel for change in comparison.changes} == {"6.18.0"}
    assert (
        comparison.missing[0] == "only in the first: ipvs, tcp-1 direct, 1000 Services, rate on kernel 6.1.176 (nested)"
    )


def test_other_conditions_are_notes() -> None:
    """Other durations, versions and settings of the machine are told; results without a common figure are refused."""
    other = msgspec.structs.replace(a_machine(), versions={"iperf3": "3.16"}, cpus=8)
    comparison = compare(incomplete(run(TWO)), run(benchmark(cases=THROUGHPUT[:3], duration_s=2.0), machine=other))
    assert comparison.notes == (
        "the first is not complete: interrupted after 7 of 36 samples", "duration_s differs: 1.0 and 2.0",
        "host: cpus differs: 2 and 8", "host: iperf3 differs: 3.12 and 3.16",
    )  # fmt: skip
    with pytest.raises(InputError, match="no figure in common"):
        compare(run(TWO), run(benchmark(cases=LATENCY)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read '{file}': No such file or directory"),
        ("not json", "'{file}' does not hold results of a benchmark: JSON is malformed: invalid character (byte 4)"),
        (
            '{"kind": "Benchmark"}',
            "'{file}' does not hold results of a benchmark: Invalid enum value 'Benchmark' - at `$.kind`",
        ),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str | None, message: str) -> None:
    """A file that is not there, or not ours, is told by name."""
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_results(tmp_path)
    assert str(caught.value) == message.format(file=file)
