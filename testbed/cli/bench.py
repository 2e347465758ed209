"""``testbed bench``: its commands and options. What they do is in `bench_run`, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _listed(_context: click.Context, _option: click.Parameter, given: str | None) -> list[Any] | None:
    """Split at commas; whole numbers become numbers, the rest is left for the check of benchmarks to complain about."""
    if given is None:
        return None
    words = [word.strip() for word in given.split(",")]
    return [int(word) if word.isdigit() else word for word in words if word]


def _list_option(name: str, metavar: str, text: str) -> Callable[[F], F]:
    return click.option(name, metavar=metavar, callback=_listed, help=text)


def _report_options(command: F) -> F:
    for option in (
        click.option("--iptables-backend", type=click.Choice(["legacy", "nft"]), help="Which iptables the nodes use."),
        click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How to print."),
        click.option("--no-report", is_flag=True, help="Write no files."),
        click.option(
            "--report", "report_folder", metavar="DIR", type=click.Path(path_type=Path),
            help="Where results.json, results.csv, plots and report.html go; default: a new folder below bench-results.",
        ),
        click.option("--one-kernel", is_flag=True, help="All modes in the nested kernel, if one of them needs it."),
        _list_option("--modes", "MODE,...", "Proxy modes; default: all that can run."),
    ):  # fmt: skip
        command = option(command)
    return command


def _workload_options(command: F) -> F:
    for option in (
        click.option("--seed", type=int, help="Of the intervals; default 1."),
        click.option("--endpoints", type=int, metavar="N", help="Of each Service that is there to be many; default 1."),
        click.option("--duration", metavar="TIME", help="Of one sample; default 1s."),
        click.option("--samples", type=int, metavar="N", help="Rounds at each number of Services; default 5."),
        _list_option("--services", "N,...", "Numbers of Services at which everything is measured."),
        click.option("-t", "--topology", metavar="FILE", default="bench", help="A topology file, or one of ours."),
    ):
        command = option(command)
    return _report_options(command)


_paths = _list_option(
    "--paths", "PATH,...",
    "direct, direct-same-node, clusterip, clusterip-same-node, nodeport, loadbalancer, ingress; default: direct,clusterip,"
    "nodeport. What a path is compared with is measured as well.",
)  # fmt: skip
_positions = _list_option(
    "--positions", "POSITION,...", "Where in the rules the Service is that path clusterip asks: first, middle, last."
)


@click.group()
def bench() -> None:
    """Measure proxy modes, in turns: throughput, connections, latency, syncs (docs/benchmarks.md)."""


@bench.command()
@_paths
@_list_option("--streams", "N,...", "TCP streams; default 1,8.")
@_list_option("--udp", "RATE,...", "UDP at a rate such as 200mbit, instead of TCP unless --streams is given.")
@_workload_options
def throughput(paths: Any, streams: Any, udp: Any, **options: Any) -> int:
    """Bits a second, with iperf3."""
    return _measure("throughput", {"paths": paths, "streams": streams, "udp": udp}, options)


@bench.command()
@_paths
@_positions
@click.option("--only", type=click.Choice(["keep-alive", "new"]), help="Only on connections that last, or on new ones.")
@click.option("--clients", type=int, metavar="N", help="Connections that wrk holds open; default 16.")
@_workload_options
def connections(paths: Any, positions: Any, only: str | None, **options: Any) -> int:
    """HTTP requests a second, with wrk."""
    keep_alive = None if only is None else only == "keep-alive"
    return _measure("connections", {"paths": paths, "positions": positions, "keepAlive": keep_alive}, options)


@bench.command()
@_paths
@_positions
@_workload_options
def latency(paths: Any, positions: Any, **options: Any) -> int:
    """The time to the first answer of a new connection."""
    return _measure("latency", {"paths": paths, "positions": positions}, options)


@bench.command()
@_workload_options
def sync(**options: Any) -> int:
    """The time from a change to the rules in every node's kernel."""
    return _measure("sync", {}, options)


@bench.command("run")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@_report_options
@click.option("--only-data", is_flag=True, hidden=True, help="Neither plots nor report.html.")
def run_file(file: Path, only_data: bool, **options: Any) -> int:
    """Run a benchmark file, or the benchmark.yaml in a folder."""
    from testbed.cli.bench_run import load_file, run_benchmark

    benchmark = load_file(file, options.pop("modes"), one_kernel=options.pop("one_kernel"))
    return run_benchmark(benchmark, only_data=only_data, **options)


@bench.command()
@click.argument("before", metavar="BEFORE", type=click.Path(path_type=Path))
@click.argument("after", metavar="AFTER", type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="Also what did not change beyond noise.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How to print.")
def compare(before: Path, after: Path, every: bool, output: str) -> int:
    """Say what changed beyond noise from one results.json to another. Figures of different kernels are never compared."""
    from testbed.cli.bench_run import compare_files

    return compare_files(before, after, every=every, output=output)


@bench.command(hidden=True)
@click.argument("order")
def inside(order: str) -> int:
    """Measure in the nested kernel for the `testbed bench` that started us there."""
    from testbed.cli.bench_run import run_inside

    return run_inside(order)


def _measure(workload: str, parameters: dict[str, Any], options: dict[str, Any]) -> int:
    from testbed.cli.bench_run import benchmark_of_options, run_benchmark

    settings = {
        "proxyModes": options.pop("modes"),
        "services": options.pop("services"),
        "samples": options.pop("samples"),
        "duration": options.pop("duration"),
        "endpoints": options.pop("endpoints"),
        "seed": options.pop("seed"),
        "clients": options.pop("clients", None),
        "oneKernel": options.pop("one_kernel") or None,
    }
    benchmark = benchmark_of_options(workload, options.pop("topology"), parameters, settings)
    return run_benchmark(benchmark, **options)
