"""``testbed``: every command. Heavy modules are imported by the commands that need them, so that --help is quick."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from testbed import __version__
from testbed.cli.bench import bench
from testbed.errors import ApiError, InputError, ManifestError, MissingFeature, Problem, TestbedError
from testbed.kernel.interrupts import HeldInterrupts, repeat_lost_interrupts

if TYPE_CHECKING:
    from testbed.lab.folder import LabRecord

F = TypeVar("F", bound=Callable[..., Any])

_PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}
INTERRUPTED = 130
UNREAD = 141  # a shell's status of a program that SIGPIPE has ended
_UNWRITABLE = 3


def main() -> NoReturn:
    """Run the command line; errors made for users become one message and an exit status, never a traceback."""
    with HeldInterrupts(signal.default_int_handler) as interrupts:  # ignored ones, in a shell's background, stay so
        repeat_lost_interrupts()
        status = _flushed(_run(interrupts))
        interrupts.end_deaf()
        sys.exit(status)


def _run(interrupts: HeldInterrupts) -> int:
    """Run the command line with interrupts let in, say what went wrong, and return the exit status."""
    debug = "--debug" in sys.argv[1:2]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal of another character set cannot show is a '?'
            stream.reconfigure(errors="replace")
    status: object
    try:
        with interrupts.let_in():
            status = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # At a terminal the line has ^C in it; click has ended that already, where it was the one to see it.
        begin = "" if isinstance(error, click.exceptions.Abort) else "\n"
        kept = f"{error.__cause__ or error}"  # click wraps what it sees first
        but_for = f", but for {kept}" if kept else ""
        click.echo(f"{begin}interrupted: what this command had started is gone{but_for}", err=True)
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = 2
    except SystemExit as exit_:
        # In this mode click ends with 1 only when nobody reads what we print.
        status = UNREAD if exit_.code == 1 else exit_.code
    except TestbedError as error:
        if debug:
            raise
        _complain(error)
        status = error.exit_status
    except OSError as error:
        if debug:
            raise
        status = UNREAD if isinstance(error, BrokenPipeError) else _UNWRITABLE
        if status != UNREAD:
            from testbed.lab.folder import describe_oserror

            _complain(describe_oserror(error))
    return status if isinstance(status, int) else 0


def _complain(error: object) -> None:
    with suppress(OSError):
        click.echo(f"{_red('error:')} {error}" if not isinstance(error, ManifestError) else str(error), err=True)


def _flushed(status: int) -> int:
    """Return the status that we end with once everything is written, or cannot be, so that Python does not try it again."""
    try:
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        status = status or UNREAD
    except OSError as error:
        if not status:
            _complain(f"standard output: {error.strerror}")
        status = status or _UNWRITABLE
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    return status


def _red(text: str) -> str:
    return click.style(text, fg="red") if sys.stderr.isatty() else text


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="testbed")
def cli(debug: bool) -> None:
    """A Kubernetes cluster's service network on one Linux machine, without containers."""


def _lab_option(command: F) -> F:
    return click.option("-l", "--lab", metavar="LAB", help="Which lab; not needed while only one is running.")(command)


def _backend_option(command: F) -> F:
    return click.option(
        "--iptables-backend", type=click.Choice(["legacy", "nft"]), callback=lambda context, option, value: value or "",
        help="Which iptables to use, instead of this machine's.",
    )(command)  # fmt: skip


def _output_option(*formats: str) -> Callable[[F], F]:
    return click.option("-o", "--output", type=click.Choice(formats), default=formats[0], help="How to print.")


@cli.command()
@click.argument("name", default="lab1")
@click.option(
    "-t", "--topology", metavar="FILE", default="three-nodes", help="A topology file, or the name of one of ours."
)
@click.option("--proxy-mode", metavar="MODE", help="kube-proxy's mode, instead of the topology's.")
@_backend_option
@click.option(
    "-f", "--filename", "manifests", metavar="MANIFEST", multiple=True, help="Objects to create once it is ready."
)
def up(
    name: str, topology: str, proxy_mode: str | None, iptables_backend: str, manifests: tuple[str, ...]
) -> None:  # fmt: skip
    """Start a lab in the background and return when it is ready."""
    import time

    from testbed.kernel.pace import is_nested
    from testbed.lab.start import check_machine, choose_iptables_backend, start_lab
    from testbed.manifests import find_topology, load_objects, load_topology
    from testbed.scenario.modes import NOT_NESTED, check_mode, why_not_here

    started = time.monotonic()
    files = [Path(manifest) for manifest in manifests]
    with _and_problems_of(files):
        topology_file = find_topology(topology)
    _check_whole([topology_file, *files])
    loaded = load_topology(topology_file)
    objects = [source for file in files for source in load_objects(file)]
    mode = check_mode(proxy_mode or loaded.proxy_mode)
    check_machine()
    if missing := why_not_here(mode, loaded):
        if is_nested():
            raise MissingFeature(missing)
        if mode in NOT_NESTED:
            raise MissingFeature(f"{missing}; {NOT_NESTED[mode]}")
        raise MissingFeature(f"{missing}. A lab in the nested kernel, for as long as its shell runs:\n  {_vm_line()}")
    backend = choose_iptables_backend(iptables_backend)
    with (
        HeldInterrupts() as interrupts,
        start_lab(
            loaded, name=name, proxy_mode=mode, iptables_backend=backend, attached=True, on_progress=_progress,
            interrupts=interrupts,
        ) as lab,
    ):  # fmt: skip
        with interrupts.let_in():
            for source in objects:
                try:
                    obj, verb = lab.api.apply(source.object)
                except ApiError as error:  # the lab ends with this command: nothing stays half applied
                    raise ManifestError([Problem(source.file, source.line, error.message)]) from error
                click.echo(f"{obj['kind'].lower()}/{obj['metadata']['name']} {verb}")
        lab.detach()
        interrupts.end_deaf()  # it lives: whoever interrupts now is too late
    nodes = ", ".join(node.name for node in loaded.nodes)
    used, look = f"mode {mode}, iptables-{backend}", "iptables-save -t nat"
    if mode == "nftables":
        used, look = f"mode {mode}", "nft list table ip kube-proxy"
    elif mode == "ipvs":
        look = "ipvsadm -Ln"
    click.echo(f"lab {name} is ready in {time.monotonic() - started:.1f} s: {nodes}; kube-proxy {used}")
    hints = {
        f'eval "$(testbed env {name})"; kubectl get pods -A': "objects, with your own kubectl",
        f"testbed kubectl -l {name} get pods -A": "the same, with the one that came along",
        f"testbed exec -l {name} {loaded.nodes[0].name} -- {look}": "run something in it",
        f"testbed down {name}": "stop it",
    }
    for example, what in hints.items():
        click.echo(f"  {example:{max(map(len, hints))}}   {what}")


def _vm_line() -> str:
    """Return what to type to have the same command carried out in the nested kernel, and a shell beside its lab."""
    same = shlex.join(["testbed", *sys.argv[1:]])
    return shlex.join(["testbed", "vm", "--", "bash", "-c", f"{same}; exec bash"])


def _progress(phase: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"  {phase} …", err=True)


@contextmanager
def _and_problems_of(files: Sequence[Path]) -> Iterator[None]:
    """Add what is wrong with files to a ManifestError of the block, so that all is said at once."""
    try:
        yield
    except ManifestError as error:
        from testbed.manifests import check_files

        raise ManifestError([*error.problems, *check_files(files)]) from error


def _check_whole(files: Sequence[Path]) -> None:
    """Say everything that is wrong with files that belong together; raise ManifestError unless they can be used."""
    from testbed.manifests import check_files

    problems = check_files(files)
    errors = [problem for problem in problems if not problem.warning]
    if errors:
        raise ManifestError(problems)
    for warning in problems:
        click.echo(str(warning), err=True)


@cli.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Stop every lab.")
def down(name: str | None, every: bool) -> None:
    """Stop a lab and everything in it."""
    from testbed.lab.start import stop_lab

    names = [record.name for record in _list_labs()] if every else [name]
    for each in names:
        with HeldInterrupts():
            click.echo(f"lab {stop_lab(each)} is gone")
    if not names:
        click.echo("no lab is running")


def _list_labs() -> Sequence[LabRecord]:
    from testbed.lab.folder import list_labs

    records, unreadable = list_labs()
    for reason in unreadable.values():
        click.echo(f"warning: {reason}", err=True)
    return records


@cli.command("ls")
@_output_option("text", "json")
def list_labs(output: str) -> None:
    """List the running labs."""
    import time

    records = _list_labs()
    now = time.time()
    if output == "json":
        rows = [
            {
                "name": record.name,
                "pid": record.pid,
                "topology": record.topology,
                "nodes": list(record.nodes),
                "proxyMode": record.proxy_mode,
                "iptablesBackend": record.iptables_backend,
                "ageSeconds": round(now - record.started, 1),
            }
            for record in records
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not records:
        click.echo("no lab is running; start one with `testbed up`", err=True)
        return
    from testbed.scenario.report import aligned

    header = ("NAME", "PID", "NODES", "MODE", "TOPOLOGY", "AGE")
    cells = [
        (r.name, str(r.pid), ",".join(r.nodes), r.proxy_mode, r.topology, f"{now - r.started:.0f}s") for r in records
    ]
    click.echo(aligned([header, *cells]))


@cli.command("exec", context_settings=_PASS_THROUGH)
@_lab_option
@click.argument("where", metavar="WHERE")
@click.argument("command", metavar="-- CMD...", nargs=-1, type=click.UNPROCESSED)
def exec_(lab: str | None, where: str, command: tuple[str, ...]) -> int:
    """Run a command in a node, an outside host, or a pod (NAMESPACE/POD[/CONTAINER])."""
    argv = command[1:] if command[:1] == ("--",) else command
    if not argv:
        raise InputError(f"nothing to run in {where!r}: testbed exec {where} -- CMD...")
    if not argv[0]:
        raise InputError(f"cannot run {''!r} in {where!r}: the name of a program is empty")
    return _run_in(lab, where, argv)


@cli.command("shell")
@_lab_option
@click.argument("where", metavar="WHERE")
def shell(lab: str | None, where: str) -> int:
    """Open a shell in a node, an outside host, or a pod."""
    return _run_in(lab, where, ("bash",))


def _run_in(lab_name: str | None, where: str, argv: tuple[str, ...]) -> int:
    from testbed.lab.handle import Lab

    with Lab.find(lab_name) as lab:
        return lab.run_in_foreground(where, argv)


@cli.command()
@click.argument("name", required=False)
def kubeconfig(name: str | None) -> None:
    """Print the path of a lab's kubeconfig."""
    from testbed.lab.handle import Lab

    with Lab.find(name) as lab:
        click.echo(lab.kubeconfig)


@cli.command("env")
@click.argument("name", required=False)
def env_(name: str | None) -> None:
    """Print what makes a shell use a lab: eval "$(testbed env LAB)"."""
    from testbed.lab.handle import Lab

    with Lab.find(name) as lab:
        click.echo(f"export KUBECONFIG={shlex.quote(str(lab.kubeconfig))}")


@cli.command(context_settings={**_PASS_THROUGH, "help_option_names": []})
@_lab_option
@click.argument("arguments", metavar="...", nargs=-1, type=click.UNPROCESSED)
def kubectl(lab: str | None, arguments: tuple[str, ...]) -> NoReturn:
    """Run kubectl on a lab; everything after our own option is kubectl's."""
    from testbed.lab.handle import Lab
    from testbed.lab.kubectl import find_kubectl

    program = find_kubectl()
    with Lab.find(lab) as found:
        environment = {**os.environ, "KUBECONFIG": str(found.kubeconfig)}
    sys.stdout.flush()
    os.execve(program, ["kubectl", *arguments], environment)  # noqa: S606  # its own process: Ctrl-C, terminal, exit status


@cli.command()
@_lab_option
@click.argument("service", metavar="[svc/NAMESPACE/NAME]", required=False)
@_output_option("text", "json")
def doctor(lab: str | None, service: str | None, output: str) -> int:
    """Say what is wrong with a lab's service network, where, and what to do; exit 1 when something is.

    With a Service: only what concerns it.
    """
    from testbed.cli.doctor import run_doctor
    from testbed.lab.handle import Lab

    with Lab.find(lab) as found:
        return run_doctor(found, service, output)


@cli.command("cli")
@_lab_option
def mininet_cli(lab: str | None) -> int:
    """Open Mininet's own command line on a lab, on this terminal."""
    from testbed.lab.handle import Lab

    with Lab.find(lab) as found:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends a line there, not us here
        try:
            return found.run_cli()
        finally:
            signal.signal(signal.SIGINT, before)


@cli.command()
@_lab_option
@click.argument("points", metavar="POINT...", nargs=-1, required=True)
@click.option(
    "-w", "--write", metavar="FILE", help="Write a pcapng file; - is standard output, for `wireshark -k -i -`."
)
@click.option("--filter", "filter_text", metavar="FILTER", default="", help="tcpdump's, for example 'tcp port 80'.")
@click.option("--duration", metavar="TIME", help="End after this long, such as 500ms, 10s or 1m.")
@click.option("--count", metavar="N", type=click.IntRange(min=1), help="End after N packets, all points together.")
@click.option("--follow", is_flag=True, help="Tell the journey of each connection, instead of each packet.")
@_output_option("text", "json", "mermaid")
@click.option("--snaplen", "snap_bytes", metavar="BYTES", type=click.IntRange(64, 262144), default=262144,
              help="Of each packet at most so much.")  # fmt: skip
@click.option(
    "--buffer", metavar="SIZE", help="The kernel's buffer for each point; default 16MiB, less for many points."
)
@click.option("--keep", metavar="SIZE", help="With -w: keep only the last packets, and write them at the end.")
@click.option("--forget-from", "forget_fd", type=int, hidden=True)  # for the flight recorder of `testbed run`
@click.option("--comments/--no-comments", default=True, help="With -w: say in each packet which connection it is of.")
def capture(points: tuple[str, ...], filter_text: str, **options: Any) -> int:
    """Capture packets at many points at once, and follow connections through NAT.

    POINT is a node, an outside host, a pod NAMESPACE/POD, one interface WHERE:INTERFACE, svc/NAMESPACE/NAME (every place
    where packets of that Service pass), or all. Ctrl-C ends it.
    """
    from testbed.cli.capture import CaptureRequest
    from testbed.cli.capture import capture as run_capture

    return run_capture(CaptureRequest(points=points, filter=filter_text, **options))


@cli.command()
@click.argument("scenarios", metavar="SCENARIO...", nargs=-1, required=True)
@click.option(
    "--proxy-mode", "modes", metavar="MODE", multiple=True, help="Only this mode; may be given several times."
)
@_backend_option
@_output_option("text", "json", "junit")
@click.option(
    "--report", "report_folder", metavar="DIR", type=click.Path(path_type=Path), help="Write reports into DIR."
)
@click.option("--keep", is_flag=True, help="Leave the (last) lab running.")
@click.option("--one-lab", is_flag=True, help="Scenarios of one topology and mode share a lab, one after the other.")
@click.option(
    "--capture/--no-capture", "record", default=True, help="With --report: keep packets of steps, and of what fails."
)
@click.option("--packets", type=click.Path(path_type=Path), hidden=True)  # we are the one in the nested kernel
@click.option("--no-vm", is_flag=True, help="Refuse what this kernel cannot do, instead of using the nested one.")
@click.option("--results-fd", type=int, hidden=True)  # we are the one in the nested kernel
def run(
    scenarios: tuple[str, ...],
    modes: tuple[str, ...],
    iptables_backend: str,
    output: str,
    report_folder: Path | None,
    keep: bool,
    one_lab: bool,
    record: bool,
    packets: Path | None,
    no_vm: bool,
    results_fd: int | None,
) -> int:
    """Run scenarios, each in a lab of its own; exit 1 when an expectation failed.

    A folder of scenarios is a course: they share a lab, one after the other in the order of their names.
    """
    from testbed.cli.run import RunOptions, run_scenarios

    options = RunOptions(
        modes=modes,
        iptables_backend=iptables_backend,
        output=output,
        report_folder=report_folder,
        keep=keep,
        one_lab=one_lab,
        packets=packets or (report_folder if record else None),
        use_vm=not no_vm,
        results_fd=results_fd,
    )
    return run_scenarios([Path(name) for name in scenarios], options)


@cli.command(context_settings=_PASS_THROUGH)
@click.option("--memory", metavar="SIZE", help="How much memory it has, like 512M or 2G (default: 2G).")
@click.option("--timeout", metavar="TIME", help="End everything after so long, like 90s or 10m, with status 124.")
@click.option(
    "--share", "shares", metavar="DIR", multiple=True, type=click.Path(path_type=Path),
    help="A folder that the command may change for real; may be given several times.",
)  # fmt: skip
@click.argument("command", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED)
def vm(memory: str | None, timeout: str | None, shares: tuple[Path, ...], command: tuple[str, ...]) -> int:
    """Run a command in a nested kernel that has IPVS (User-Mode Linux), on this machine's files, read-only."""
    from testbed.cli.vm import run_in_vm

    return run_in_vm(command, memory, timeout, shares)


@cli.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def validate(files: tuple[Path, ...]) -> int:
    """Check topologies, scenarios and manifests; every problem with file and line. Touches nothing."""
    _check_whole(files)
    click.echo(f"{len(files)} {'file is' if len(files) == 1 else 'files are'} valid")
    return 0


@cli.group()
def proxy() -> None:
    """See, write and follow the rules that kube-proxy makes of manifests. No lab is needed.

    FILEs are Services, EndpointSlices or Endpoints, Nodes, ServiceCIDRs, and perhaps a KubeProxyConfiguration.
    """


def _proxy_options(command: F) -> F:
    for option in (
        click.argument("files", metavar="FILE...", nargs=-1, type=click.Path(path_type=Path)),
        click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="A KubeProxyConfiguration."),
        click.option("--node", metavar="NODE", help="The node that kube-proxy runs on."),
        click.option("--mode", metavar="MODE", help="kube-proxy's mode, instead of the configuration's."),
    ):
        command = option(command)
    return command


def _need(node: str | None, files: tuple[Path, ...]) -> str:
    if not node:
        raise InputError("which node? Give --node NAME: what kube-proxy writes depends on where it runs")
    if not files:
        raise InputError("no FILE given: name manifests with Services, EndpointSlices and Nodes")
    return node


@proxy.command("render")
@_proxy_options
def proxy_render(files: tuple[Path, ...], config: Path | None, node: str | None, mode: str | None) -> None:
    """Print what kube-proxy would write, for iptables-restore or nft. Touches nothing, needs no root."""
    from testbed.cli.proxy import read_input, render

    click.echo(render(read_input(files, _need(node, files), mode, config)), nl=False)


@proxy.command("sync")
@_proxy_options
@_backend_option
@click.option("--cleanup", is_flag=True, help="Remove what kube-proxy wrote, in any mode; needs no FILE.")
def proxy_sync(
    files: tuple[Path, ...],
    config: Path | None,
    node: str | None,
    mode: str | None,
    iptables_backend: str,
    cleanup: bool,
) -> int:
    """Write kube-proxy's rules into the network namespace you are in, once, as on a node of your own."""
    from testbed.cli.proxy import clean_up, read_input, sync

    if cleanup:
        clean_up(iptables_backend)
        return 0
    return sync(read_input(files, _need(node, files), mode, config), iptables_backend)


@proxy.command("explain")
@_proxy_options
@click.option("--from", "source", metavar="IP", required=True, help="Who sends: a pod, the node, somebody outside.")
@click.option("--to", "target", metavar="IP:PORT[/udp]", required=True, help="Where to.")
@click.option("--interface", metavar="NAME", default="", help="The interface it comes in by, where that matters.")
@_output_option("text", "json")
def proxy_explain(
    files: tuple[Path, ...],
    config: Path | None,
    node: str | None,
    mode: str | None,
    source: str,
    target: str,
    interface: str,
    output: str,
) -> None:
    """Follow a packet through kube-proxy's rules: which it meets, where it may end, whose address is seen there."""
    from testbed.cli.proxy import explain_json, explain_text, find_fate, parse_packet, read_input

    packet = parse_packet(source, target, interface)
    given = read_input(files, _need(node, files), mode, config)
    fate = find_fate(given, packet)
    click.echo(explain_json(given, packet, fate) if output == "json" else explain_text(given, packet, fate))


@cli.command()
@click.argument("kind", type=click.Choice(["topology", "scenario", "benchmark", "benchmark-results"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a file format, for editors."""
    if kind == "benchmark-results":
        from testbed.bench.results import results_schema as make
    elif kind == "benchmark":
        from testbed.manifests.benchmark import benchmark_schema as make
    elif kind == "topology":
        from testbed.manifests.topology import topology_schema as make
    else:
        from testbed.manifests.scenario import scenario_schema as make
    click.echo(json.dumps(make(), indent=2))


cli.add_command(bench)
