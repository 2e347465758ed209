"""Starting and stopping labs, from outside.

A lab is begun in new network, mount, PID and UTS namespaces before anything else happens: the process that becomes its
PID 1 (tini) is born in them. The host's own links, mounts, sysctls and routes are never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from testbed.api.client import ApiClient
from testbed.errors import InputError, LabError, MissingFeature, TestbedError
from testbed.kernel import linux
from testbed.kernel.interrupts import HeldInterrupts
from testbed.kernel.iptables import default_backend, detect_backend
from testbed.kernel.limits import spare_processes
from testbed.kernel.modules import ensure_bridge_netfilter
from testbed.kernel.pace import patient
from testbed.kernel.runner import SubprocessRunner
from testbed.lab.folder import LabFolder, LabRecord, claim_folder, describe_oserror, find_record, list_records
from testbed.lab.handle import Lab, end_of_log
from testbed.lab.request import LabRequest, report
from testbed.model.topology import Topology

READY_WITHIN_S = 60.0
"""A lab takes a second or two; a loaded machine some more."""

_MOST_WARNINGS = 5

LEAST_OPEN_FILES = 1024
"""Of a process: a lab of three nodes has about a hundred open, and a pod adds up to ten."""
_END_WITHIN_S = 30.0
"""A lab takes a fraction of a second; the kernel some more where there is a lot to give back."""

_PROCESSES, _PROCESSES_OF_A_NODE = 40, 10
"""Of a lab before its first pod, threads among them: 54 with three nodes, at the most."""

_TOOLS = {
    "tini": "tini",
    "ip": "iproute2",
    "iptables-restore": "iptables",
    "nsenter": "util-linux",
    "nginx": "nginx-light",
    "conntrack": "conntrack",
    "dnsmasq": "dnsmasq-base",
    "which": "debianutils",  # by which Mininet looks for the next two, and ends a process that lacks one
    "mnexec": "mininet",
    "ifconfig": "net-tools",
}
"""Program -> Debian package, for what every lab needs."""


def check_machine(also: Mapping[str, str] = {}) -> None:
    """Refuse to start where a lab cannot run.

    Args:
        also: program -> Debian package, for what is to be done in the lab.

    Raises:
        InputError: not root.
        MissingFeature: tools or kernel features that are missing, with the packages that have them.
    """
    if os.geteuid() != 0:
        raise InputError("a lab needs root: run this command as root, or with sudo")
    tools = {**_TOOLS, **also}
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({tools[tool] for tool in missing}))
        raise MissingFeature(
            f"missing: {', '.join(missing)}; install with `apt-get install {packages}`, or run `./dev setup`"
        )
    _ensure_open_files()
    ensure_bridge_netfilter()


def _ensure_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= LEAST_OPEN_FILES:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, LEAST_OPEN_FILES))
    except (ValueError, OSError):
        raise MissingFeature(
            f"a process may have {hard} files open here, and a lab's need {LEAST_OPEN_FILES}: raise the limit where it was "
            "lowered (`ulimit -Hn`, /etc/security/limits.conf, LimitNOFILE= of a systemd service)"
        ) from None


def _check_processes(topology: Topology) -> None:
    needed = _PROCESSES + _PROCESSES_OF_A_NODE * len(topology.nodes)
    spare = spare_processes()
    if spare is not None and spare[0] < needed:
        raise MissingFeature(
            f"{spare[0]} more processes and threads can be started here, and a lab of {len(topology.nodes)} nodes needs "
            f"{needed}: raise the limit in {spare[1]}/pids.max (TasksMax= of a systemd unit, --pids-limit of a container)"
        )


def choose_iptables_backend(wanted: str = "") -> str:
    """Return the backend of iptables that a lab's nodes use: the wanted one, or what ``iptables`` is on this machine.

    Raises:
        MissingFeature: its tools are not installed.
    """
    runner = SubprocessRunner()
    backend = detect_backend(runner, wanted) if wanted else default_backend(runner)  # a lab's nodes have no past
    tool = f"iptables-{backend}-restore"
    if shutil.which(tool) is None:
        raise MissingFeature(
            f"iptables backend {backend.value!r} is not there: {tool} is missing (apt-get install iptables)"
        )
    return backend.value


def start_lab(
    topology: Topology,
    *,
    name: str,
    proxy_mode: str,
    attached: bool,
    iptables_backend: str = "",
    on_progress: Callable[[str], None] = lambda _: None,
    interrupts: HeldInterrupts | None = None,
) -> Lab:
    """Start a lab and return when kube-proxy has synced on every node.

    Args:
        interrupts: held by the caller, who lets them in while it uses the lab, so that one that comes just before or after
            does not leave the lab to itself; they are let in here while we wait.
        attached: end the lab when this process ends, however it ends, unless it calls `Lab.detach` first.
        iptables_backend: what ``iptables`` is on the nodes, ``legacy`` or ``nft``; '' what it is on this machine.
        on_progress: called with a word for each phase that was reached.

    Raises:
        LabError: a lab of that name is running, or it did not get ready; nothing of it is left.
    """
    if interrupts is None:
        with HeldInterrupts() as own:
            return start_lab(
                topology, name=name, proxy_mode=proxy_mode, attached=attached, iptables_backend=iptables_backend,
                on_progress=on_progress, interrupts=own,
            )  # fmt: skip
    with interrupts.let_in():  # the terminal's Ctrl-C ends the programs that are asked, too
        check_machine()
        _check_processes(topology)
        backend = choose_iptables_backend(iptables_backend)
    folder = claim_folder(name)
    try:
        return _start(folder, topology, proxy_mode, backend, attached, on_progress, interrupts)
    except BaseException as error:
        folder.remove()
        if isinstance(error, OSError):
            raise LabError(f"lab {name!r} could not be started: {describe_oserror(error)}") from error
        raise


def _start(
    folder: LabFolder,
    topology: Topology,
    proxy_mode: str,
    iptables_backend: str,
    attached: bool,
    on_progress: Callable[[str], None],
    interrupts: HeldInterrupts,
) -> Lab:
    # The folder may be removed by others once the lab has ended; what it said last is read here all the same.
    log = os.open(folder.path / "lab.log", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    progress, progress_writer = os.pipe()
    lifeline_reader, lifeline = os.pipe() if attached else (-1, -1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder.path / "spawner.sock"))
        listener.listen(16)
        # A socket belongs to the network namespace that it was made in: this one stays the host's.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as api:
            request = LabRequest(
                name=folder.name,
                folder=str(folder.path),
                topology=topology,
                proxy_mode=proxy_mode,
                iptables_backend=iptables_backend,
                listener_fd=listener.fileno(),
                progress_fd=progress_writer,
                lifeline_fd=lifeline_reader,
                api_fd=api.fileno(),
            )
            pid = _fork_first_process(folder, request)
    os.close(progress_writer)
    if lifeline_reader >= 0:
        os.close(lifeline_reader)
    try:
        started = time.time()
        names = tuple(node.name for node in topology.nodes)
        folder.write_record(LabRecord(folder.name, pid, started, topology.name, names, proxy_mode, iptables_backend))
        with interrupts.let_in():
            _wait_until_ready(folder, progress, log, on_progress)
    except BaseException:
        os.close(log)
        if lifeline >= 0:
            os.close(lifeline)
        end_process_tree(pid, folder.name)
        raise
    finally:
        os.close(progress)
    folder.unlock()
    return Lab(folder.path, pid, topology, lifeline=lifeline, log=log)


def _fork_first_process(folder: LabFolder, request: LabRequest) -> int:
    """Fork the lab's PID 1; returns its pid as the host sees it."""
    parameters = os.memfd_create("lab", 0)
    os.write(parameters, pickle.dumps(request))
    os.lseek(parameters, 0, os.SEEK_SET)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWPID)  # of children only
        try:
            pid = os.fork()
            if pid == 0:
                _be_first_process(folder, request, parameters)
        finally:
            linux.setns(own, linux.CLONE_NEWPID)
    finally:
        os.close(own)
        os.close(parameters)
    return pid


def _be_first_process(folder: LabFolder, request: LabRequest, parameters: int) -> NoReturn:
    try:
        os.setsid()
        os.umask(0o022)  # files of a pod's /etc are for all of its users to read, whoever has started the lab
        log = os.open(folder.path / "lab.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, number in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, number)
        keep = [folder.lock_fd, parameters, request.listener_fd, request.progress_fd, request.api_fd]
        if request.lifeline_fd >= 0:
            keep.append(request.lifeline_fd)
        linux.close_descriptors_except(*keep)
        for fd in keep:
            os.set_inheritable(fd, True)
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS)
        # A systemd host's / is shared: without this our mounts would show up there.
        linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        linux.mount("sysfs", "/sys", "sysfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        private = folder.path / "private"
        private.mkdir(mode=0o700)
        linux.mount("tmpfs", str(private), "tmpfs", linux.MS_NODEV, "mode=0700,nr_inodes=0")
        linux.sethostname(folder.name)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        os.chdir("/")
        os.execvp("tini", ["tini", "--", sys.executable, "-m", "testbed.lab.boot", str(parameters)])
    except BaseException as error:
        report(request.progress_fd, error=f"could not isolate the lab: {error}", status=3)
    finally:
        os._exit(3)


def _wait_until_ready(folder: LabFolder, progress: int, log: int, on_progress: Callable[[str], None]) -> None:
    within_s = patient(READY_WITHIN_S)
    deadline = time.monotonic() + within_s
    pending = b""
    phase = "isolation"
    while True:
        if not select.select([progress], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise LabError(
                f"lab {folder.name!r} was not ready within {within_s:g} s; the last phase reached was {phase!r}"
                f"{_warnings(folder) if phase == 'api' else ''}{end_of_log(log)}"
            )
        data = os.read(progress, 65536)
        if not data:
            raise LabError(f"lab {folder.name!r} died while starting, after phase {phase!r}{end_of_log(log)}")
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise _Refused(message["error"], message.get("status", 3))
            if message.get("ready"):
                return
            phase = message["phase"]
            on_progress(phase)


def _warnings(folder: LabFolder) -> str:
    """Return what the lab's own programs could not do, by its events, each on a line of its own."""
    client = ApiClient(str(folder.path / "api" / "api.sock"), timeout_s=2)
    try:
        events, _ = client.list("events", "kube-system")
    except (TestbedError, OSError):
        return ""
    finally:
        client.close()
    warnings = {event["message"]: event["involvedObject"]["name"] for event in events if event["type"] == "Warning"}
    return "".join(f"\n    {name}: {message}" for message, name in list(warnings.items())[-_MOST_WARNINGS:])


class _Refused(TestbedError):
    """What the lab's own processes said when they gave up."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def stop_lab(name: str | None) -> str:
    """End a lab and everything in it, and return its name. Once begun, that is not interrupted.

    Raises:
        LabError: there is no such lab, or it did not end in time.
    """
    record = find_record(name)
    with HeldInterrupts():
        end_process_tree(record.pid, record.name)
        list_records()  # removes the folder of every lab whose lock nobody holds any more
    return record.name


def end_process_tree(pid: int, name: str) -> None:
    """Kill a lab's first process and wait until the kernel has ended every other one with it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # A PID namespace's first process is not gone before all others are.
        within_s = patient(_END_WITHIN_S)
        if not select.select([pidfd], [], [], within_s)[0]:
            raise LabError(f"lab {name!r}: its processes (first: {pid}) did not end within {within_s:g} s of SIGKILL")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # if it was our own child
    finally:
        os.close(pidfd)
