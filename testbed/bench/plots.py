"""Plots of results: bars for each mode with spread, and curves over the number of Services. SVG and PNG, without a display."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.bench.report import mode_text, order_of
from testbed.bench.results import Results, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"userspace": "#8c6d31", "iptables": "#1f77b4", "ipvs": "#2ca02c", "nftables": "#d62728"}
_STYLES = ("-", "--", ":", "-.")
_BARS_OF = ("rate", "received", "requests", "p50", "to_kernel", "loss")
_CURVES_OF = ("rate", "requests", "p10", "p50", "to_kernel", "own")
_TITLES = {
    "rate": "TCP throughput",
    "received": "UDP received",
    "loss": "UDP loss",
    "requests": "HTTP requests",
    "p10": "time, tenth percentile",
    "p50": "time, median",
    "to_kernel": "from a change to the kernels",
    "own": "kube-proxy's own time for its rules",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn plot; ``name`` is its files' without suffix."""

    name: str
    title: str
    draw: Callable[[], Figure]


def plan_plots(results: Results) -> list[Plot]:
    """Return the plots that the results have figures for.

    Bars stand at the largest number of Services. Kernels have panels of their own: their figures are not to be compared.
    """
    plots = []
    groups: dict[tuple[str, str, str], list[Series]] = defaultdict(list)
    for one in sorted(results.series, key=order_of):
        if one.main or one.metric in _BARS_OF:
            groups[one.workload, one.case, one.metric].append(one)
    for (workload, case, metric), group in groups.items():
        counts = sorted({one.services for one in group})
        title = f"{case}: {_TITLES.get(metric, metric)}"
        if metric in _BARS_OF and (workload, metric) != ("connections", "p50"):
            last = [one for one in group if one.services == counts[-1]]
            name = _file_name(workload, case, metric, "bars")
            plots.append(
                Plot(
                    name,
                    f"{title}, {counts[-1]} Services",
                    partial(_panels, last, f"{title}, {counts[-1]} Services", _draw_bars),
                )
            )
        if metric in _CURVES_OF and len(counts) > 1 and (workload, metric) != ("connections", "p50"):
            plots.append(
                Plot(_file_name(workload, case, metric, "curve"), title, partial(_panels, group, title, _draw_curves))
            )
    return plots


def _file_name(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower())


def _panels(group: Sequence[Series], title: str, draw_panel: Callable[[Any, list[Series]], None]) -> Figure:
    """Return a figure with a panel for each kernel, drawn by ``draw_panel(axes, series)``."""
    from matplotlib.figure import Figure

    machines = list(dict.fromkeys(one.machine for one in group))
    figure = Figure(figsize=(4 + 5 * len(machines), 4.2), layout="constrained")
    for machine, axis in zip(machines, figure.subplots(1, len(machines), squeeze=False)[0], strict=True):
        draw_panel(axis, [one for one in group if one.machine == machine])
        axis.set_ylabel(group[0].unit)
        axis.set_title("nested kernel" if machine == "nested" else "this kernel", fontsize=9)
        axis.legend(fontsize=8)
        axis.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_bars(axis: Any, series: Sequence[Series]) -> None:
    places = list(dict.fromkeys((one.path, one.position) for one in series))
    modes = list(dict.fromkeys((one.mode, one.machine) for one in series))
    width = 0.8 / len(modes)
    for index, (mode, machine) in enumerate(modes):
        found = [(places.index((one.path, one.position)), one) for one in series if one.mode == mode]
        spread = [[one.median - one.q1 for _, one in found], [one.q3 - one.median for _, one in found]]
        axis.bar(
            [place + (index - (len(modes) - 1) / 2) * width for place, _ in found], [one.median for _, one in found], width,
            yerr=spread, capsize=3, label=mode_text(mode, machine), color=COLOURS[mode], edgecolor="white",
            hatch="//" if machine == "nested" else None,
        )  # fmt: skip
    labels = ["\n".join(filter(None, place)) if place[0] != "none" else "" for place in places]
    axis.set_xticks(range(len(places)), labels, fontsize=8)


def _draw_curves(axis: Any, series: Sequence[Series]) -> None:
    lines: dict[tuple[str, str, str], list[Series]] = defaultdict(list)
    for one in sorted(series, key=lambda one: one.services):
        lines[mode_text(one.mode, one.machine), one.path, one.position].append(one)
    places = list(dict.fromkeys((path, position) for _, path, position in lines))
    for (mode, path, position), found in lines.items():
        xs = [one.services for one in found]
        colour = COLOURS[found[0].mode]
        style = _STYLES[places.index((path, position)) % len(_STYLES)]
        label = " ".join(filter(None, (mode, "" if path == "none" else path, position)))
        axis.plot(xs, [one.median for one in found], style, marker="o", ms=3, label=label, color=colour)
        axis.fill_between(xs, [one.q1 for one in found], [one.q3 for one in found], color=colour, alpha=0.15, lw=0)
    axis.set_xlabel("Services")


def write_plots(folder: Path, plots: Sequence[Plot]) -> list[Path]:
    """Write each plot as SVG and PNG; return the SVG files. The same results make the same bytes."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "testbed", "svg.fonttype": "none", "hatch.linewidth": 0.6}):
        for plot in plots:
            figure = plot.draw()
            file = folder / f"{plot.name}.svg"
            figure.savefig(file, metadata=nothing)
            figure.savefig(file.with_suffix(".png"), dpi=110, metadata={"Software": None})
            written.append(file)
    return written
