"""What a benchmark looks like: a table for a terminal, CSV, and the words for what is not a number. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from testbed.bench.compare import Change, Comparison
from testbed.bench.results import Beyond, Interval, Machine, Ratio, Results, Series, Slope, Verdict
from testbed.scenario.report import aligned

CSV_COLUMNS = (
    "machine", "kernel", "mode", "workload", "case", "path", "position", "services", "metric", "unit", "round", "sample",
)  # fmt: skip


def number(value: float) -> str:
    """Return a value with about three digits, and thousands set apart."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def interval_text(found: Interval | None) -> str:
    return f"{number(found.low)} – {number(found.high)}" if found else "–"


def ratio_text(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f}" if ratio else ""


def ratio_interval_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.interval.low:.2f} – {ratio.interval.high:.2f}" if ratio.interval else "–"


def mode_text(mode: str, machine: str) -> str:
    """Return a mode, marked when it was measured in the nested kernel."""
    return f"{mode} (nested)" if machine == "nested" else mode


HEADER = ("CASE", "PATH", "SERVICES", "METRIC", "MODE", "MEDIAN", "Q1 – Q3", "OF DIRECT", "95 %", "N")


def series_rows(series: Iterable[Series]) -> list[tuple[str, ...]]:
    """Return a row of `HEADER` for each series, those of one figure together."""
    return [
        (
            one.case, path_text(one), str(one.services), f"{one.metric} {one.unit}", mode_text(one.mode, one.machine),
            number(one.median), f"{number(one.q1)} – {number(one.q3)}", ratio_text(one.ratio),
            ratio_interval_text(one.ratio), str(len(one.samples)),
        )
        for one in series
    ]  # fmt: skip


_PLACES = (
    "direct",
    "clusterip",
    "direct-same-node",
    "clusterip-same-node",
    "nodeport",
    "loadbalancer",
    "ingress",
    "none",
)
_METRICS = ("rate", "received", "loss", "jitter", "requests", "p10", "p50", "p99", "to_kernel", "own")
_POSITIONS = ("", "first", "middle", "last")
_MODES = ("userspace", "iptables", "ipvs", "nftables")


def order_of(one: Series) -> tuple[object, ...]:
    """Return what series are sorted by: figure by figure, the modes of one kernel side by side."""
    metric = _METRICS.index(one.metric) if one.metric in _METRICS else len(_METRICS)
    case = (one.workload, len(one.case), one.case)
    place = (_PLACES.index(one.path), _POSITIONS.index(one.position))
    return (*case, metric, *place, one.services, one.machine, _MODES.index(one.mode))


def path_text(one: Series | Verdict | Slope) -> str:
    """Return a path and the target's position; '' when nothing is sent."""
    if one.path == "none":
        return ""
    return f"{one.path} ({one.position})" if one.position else one.path


def verdict_text(one: Verdict) -> str:
    figure = " ".join(filter(None, (one.case, path_text(one), one.metric)))
    where = f"{figure}, {one.services} Services"
    kernel = " (nested kernel)" if one.machine == "nested" else ""
    if not one.enough:
        return f"too few samples to tell {one.a} and {one.b} apart{kernel}: {where}"
    if not one.differ:
        return f"too noisy to tell {one.a} and {one.b} apart{kernel}: {where}"
    return f"{one.b} is {one.times:.2f} times {one.a}{kernel}: {where}"


def slope_text(one: Slope) -> str:
    unit, scale = ("ns", 1000.0) if one.unit == "µs" else (one.unit, 1.0)

    def shown(line: Slope | Beyond, fit: str = "") -> str:
        interval = f"95 %: {line.interval.low * scale:.3g} to {line.interval.high * scale:.3g}{fit}"
        return f"{line.per_service * scale:.3g} {unit} for each Service ({interval})"

    what = " ".join(filter(None, (one.case, path_text(one), one.metric)))
    text = f"{what} in {mode_text(one.mode, one.machine)}: {shown(one, f', R² {one.fit:.2f}')}"
    return f"{text}; beyond {one.beyond.path} {shown(one.beyond)}" if one.beyond else text


def machine_lines(machine: Machine) -> list[str]:
    """Return what a report says of a kernel."""
    what = "nested kernel, User-Mode Linux" if machine.id == "nested" else "kernel"
    conntrack = f"nf_conntrack_max {machine.conntrack_max:,}" if machine.conntrack_max else "nf_conntrack_max not known"
    during = f", {min(machine.load_during):.1f} – {max(machine.load_during):.1f} during" if machine.load_during else ""
    lines = [
        f"{what} {machine.kernel} {machine.architecture}; {machine.cpus} CPUs ({machine.cpu_model}), "
        f"{machine.memory_mib:,} MiB; {conntrack}",
        f"load {machine.load_before:.1f} before (others used {machine.busy_before:.0%} of the CPUs){during}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    ]
    for place, features in machine.offloads.items():
        on = ", ".join(name for name, is_on in features.items() if is_on)
        off = ", ".join(name for name, is_on in features.items() if not is_on)
        lines.append(f"offloads of {place}: on: {on or 'none'}; off: {off or 'none'}")
    return lines


def text_report(results: Results) -> str:
    """Return everything that a terminal shows at the end."""
    lines = []
    rows = series_rows(one for one in results.series if one.main)
    if rows:
        lines += [aligned([HEADER, *rows], right=(2, 5, 6, 7, 8, 9)), ""]
    for machine in results.machines:
        lines += [f"{machine.id}: {line}" for line in machine_lines(machine)]
    for title, found in (
        ("modes of one kernel side by side:", [verdict_text(one) for one in results.verdicts]),
        ("over the number of Services:", [slope_text(one) for one in results.slopes]),
        ("not measured:", [skipped_text(one.mode, one.what, one.reason) for one in results.skipped]),
    ):
        if found:
            lines += ["", title, *(f"  {line}" for line in found)]
    if results.warnings:
        lines += ["", *(f"warning: {warning}" for warning in results.warnings)]
    if not results.complete:
        lines += ["", f"INCOMPLETE: {results.reason}"]
    return "\n".join(lines)


def skipped_text(mode: str, what: str, reason: str) -> str:
    return f"{mode}{f': {what}' if what else ''}: {reason}"


def csv_text(results: Results) -> str:
    """Return a row for each sample."""
    kernels = {machine.id: machine.kernel for machine in results.machines}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in results.series:
        head = (
            one.machine, kernels[one.machine], one.mode, one.workload, one.case, one.path, one.position, one.services,
            one.metric, one.unit,
        )  # fmt: skip
        writer.writerows((*head, *pair) for pair in zip(one.rounds, one.samples, strict=True))
    return out.getvalue()


def comparison_text(comparison: Comparison, *, every: bool = False) -> str:
    """Return what changed beyond noise; with ``every``, also what did not."""
    shown = [change for change in comparison.changes if every or change.beyond_noise]
    lines = []
    if shown:
        header = ("FIGURE", "METRIC", "MODE", "KERNEL", "BEFORE", "AFTER", "TIMES", "")
        right = (4, 5, 6)
        lines.append(aligned([header, *map(_change_row, shown)], right=right))
    quiet = sum(not change.beyond_noise for change in comparison.changes)
    total = len(comparison.changes)
    lines.append(f"{total - quiet} of {total} figures changed beyond noise; {quiet} did not")
    lines += [f"note: {note}" for note in comparison.notes]
    lines += [f"not compared: {what}" for what in comparison.missing]
    return "\n".join(lines)


def _change_row(change: Change) -> tuple[str, ...]:
    word = ("better" if change.better else "worse") if change.beyond_noise else "within noise"
    return (
        change.subject, f"{change.metric} {change.unit}", change.mode, change.kernel, number(change.before),
        number(change.after), f"{change.times:.2f}", word,
    )  # fmt: skip
