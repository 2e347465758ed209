"""Environment → command → what the user sees: it works, or one message says what is wrong and what to do, and nothing is left.

Each environment is this machine once more (tests/machine.py), with something taken away.
"""

# ruff: noqa: E501  # tables

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from machine import ROOT, Ended, Machine, limit

from testbed.dataplane.corefile import parse_corefile, render_dnsmasq
from testbed.errors import MissingFeature
from testbed.kernel.limits import spare_processes
from testbed.kernel.pace import is_nested, patient
from testbed.lab import boot, start
from testbed.lab.cluster_dns import corefile

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
OPEN_FILES = resource.RLIMIT_NOFILE

SCENARIO = """
apiVersion: testbed/v1
kind: Scenario
metadata: {name: s}
spec:
  topology: three-nodes
  proxyModes: [iptables]
  steps:
    - name: “quotes” – and a dash
      kubectl: {run: get nodes, prints: node1}
    - expect: {from: node1, resolve: kubernetes.default.svc.cluster.local, answers: [10.96.0.1], within: 10s}
"""
BENCHMARK = """
apiVersion: testbed/v1
kind: Benchmark
metadata: {name: b}
spec:
  topology: bench
  proxyModes: [iptables]
  measure: [throughput: {paths: [clusterip]}, connections: {paths: [clusterip]}]
"""
SHAPED = """
apiVersion: testbed/v1
kind: Topology
metadata: {name: t}
spec:
  networks: [{name: lan, cidr: 192.168.93.0/24}]
  nodes: [{name: node1, network: lan, address: 192.168.93.11}]
  links: [{between: [node1, lan], rate: 1gbit}]
"""
FILES = {"s/scenario.yaml": SCENARIO, "b/benchmark.yaml": BENCHMARK, "shaped.yaml": SHAPED}
UP, DOWN = ("up", "x"), ("down", "x")
RUN = ("run", "/files/s", "--report", "/report")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """This machine with the files above in /files."""
    with Machine(tmp_path) as made:
        for name, text in FILES.items():
            made.sh(f"mkdir -p $(dirname /files/{name}); cat > /files/{name} <<'END'{text}END\n")
        yield made


def nothing_is_left(machine: Machine) -> None:
    """No lab runs, and no folder of one is there."""
    assert machine.testbed("ls", "-o", "json").out == "[]\n"
    assert machine.sh("ls -d /run/testbed/x /tmp/*/testbed/x 2>/dev/null || true") == ""


def no_traceback(ended: Ended) -> None:
    assert "Traceback" not in ended.err and "Traceback" not in ended.out


@dataclass(frozen=True)
class Refused:
    """One environment in which a command ends with one message."""

    command: tuple[str, ...]
    status: int
    error: str  # all of it, but for {…}, which stands for anything
    prepare: str = "true"
    env: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], Any] | None = None


FULL = "mkdir {0}; mount -t tmpfs -o size=4k,mode=755 tmpfs {0}; head -c 8000 /dev/zero > {0}/fill 2>/dev/null || true"
LONG = "/tmp/" + "a" * 90
REFUSED = {
    "the state folder is full": Refused(
        UP, 3, "lab 'x' could not be started: /run/testbed/x/lab.json.new: No space left on device; make room there",
        FULL.format("/run/testbed"),
    ),
    "the state folder takes no more files": Refused(
        UP, 3, "cannot make the folder of lab 'x', /run/testbed/x: /run/testbed/x/api: No space left on device; make room there",
        "mkdir /run/testbed; mount -t tmpfs -o nr_inodes=3,mode=755 tmpfs /run/testbed",
    ),
    "/run is read-only": Refused(
        UP, 3,
        "cannot make the folder of lab 'x', /run/testbed/x: /run/testbed: Read-only file system; "
        "`XDG_RUNTIME_DIR=FOLDER testbed up` keeps labs in another folder where /run is read-only",
        "mount -o remount,ro /run",
    ),
    "the other folder has too long a name": Refused(
        UP, 2,
        f"labs cannot be kept in {LONG}/testbed: the names of sockets there would be too long for the kernel (107 bytes); "
        "set XDG_RUNTIME_DIR to a shorter path",
        f"mkdir {LONG}; mount -o remount,ro /run", {"XDG_RUNTIME_DIR": LONG},
    ),
    "the other folder cannot be in KUBECONFIG": Refused(
        UP, 2, "labs cannot be kept in /tmp/a:b/testbed: a ':' separates files in KUBECONFIG; set XDG_RUNTIME_DIR to another folder",
        "mkdir /tmp/a:b; mount -o remount,ro /run", {"XDG_RUNTIME_DIR": "/tmp/a:b"},
    ),
    "the state folder is another user's": Refused(
        UP, 2, "/run/testbed, where labs are kept, belongs to user 65534: labs would not be safe there; remove it and try again",
        "mkdir /run/testbed; chown 65534 /run/testbed",
    ),
    "64 open files": Refused(
        UP, 3,
        "a process may have 64 files open here, and a lab's need 1024: raise the limit where it was lowered (`ulimit -Hn`, "
        "/etc/security/limits.conf, LimitNOFILE= of a systemd service)",
        before=limit(OPEN_FILES, 64),
    ),
    "reports have no room": Refused(
        RUN, 2, "cannot write reports into '/report': No space left on device",
        "mkdir /report; mount -t tmpfs -o nr_inodes=1 tmpfs /report",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(machine: Machine, name: str) -> None:
    """One message: what was tried, on what, what was found, what to do."""
    case = REFUSED[name]
    if name == "64 open files" and resource.getrlimit(OPEN_FILES)[1] < start.LEAST_OPEN_FILES:
        pytest.skip("the limit of open files is lower here already")
    machine.sh(case.prepare)
    ended = machine.testbed(*case.command, env=case.env, before=case.before)
    if name == "64 open files" and ended.status == 0:
        pytest.skip("this user may raise the limit of open files, and did")
    assert (ended.status, ended.err) == (case.status, f"error: {case.error}\n")
    assert machine.sh("ls -d /run/testbed/x 2>/dev/null || true") == ""


# --- programs that are missing -----------------------------------------------------------------------------------------

MISSING = {
    "iptables-restore": (
        UP,
        "missing: iptables-restore; install with `apt-get install iptables`, or run `./dev setup`",
    ),
    "mnexec": (UP, "missing: mnexec; install with `apt-get install mininet`, or run `./dev setup`"),
    "tc": (("up", "x", "-t", "/files/shaped.yaml"), "tc is not installed (apt-get install iproute2)"),
    "nft": (
        ("up", "x", "--proxy-mode", "nftables"),
        "proxy mode 'nftables' needs nft, which is not installed (apt-get install nftables)",
    ),
    "ipset": (
        ("up", "x", "--proxy-mode", "ipvs"),
        "proxy mode 'ipvs' needs ipset, which is not installed (apt-get install ipset ipvsadm)",
    ),
    "kubectl": (RUN, "no kubectl on PATH and none in our own environment: run `./dev setup`, or install kubectl"),
    "dig": (RUN, "missing: dig; install with `apt-get install dnsutils`, or run `./dev setup`"),
    "iperf3": (
        ("bench", "run", "/files/b", "--no-report"),
        "missing: iperf3; install with `apt-get install iperf3`, or run `./dev setup`",
    ),
    "wrk": (
        ("bench", "run", "/files/b", "--no-report"),
        "missing: wrk; install with `apt-get install wrk`, or run `./dev setup`",
    ),
    "tcpdump": (("capture", "node1"), "captures are made by tcpdump, which is not installed (apt-get install tcpdump)"),
    "linux.uml": (
        ("vm", "--", "true"),
        "linux.uml not found: the nested kernel is User-Mode Linux (apt-get install user-mode-linux tini)",
    ),
}


def test_programs_that_are_missing(machine: Machine, request: pytest.FixtureRequest) -> None:
    """Each is named with its package, before anything is started for what needs it; status 3. (--slow: all of them.)"""
    chosen = (
        MISSING
        if request.config.getoption("--slow")
        else {name: MISSING[name] for name in ("tc", "kubectl", "wrk", "linux.uml")}
    )
    needed = {
        *start._TOOLS,
        *MISSING,
        "sh",
        "cat",
        "unshare",
        "iptables",
        "iptables-nft-restore",
        "iptables-legacy-restore",
    }
    machine.sh("rm -f " + " ".join(shlex.quote(path) for path in _bundled_kubectl()))
    for program, (command, error) in chosen.items():
        folder = f"/without/{program}"
        lines = [
            f"ln -s {shutil.which(other)} {folder}/" for other in sorted(needed - {program}) if shutil.which(other)
        ]
        machine.sh(
            f"mkdir -p {folder}\n" + "\n".join(lines) + f"\nln -sf /bin/true {folder}/kubectl" * (program != "kubectl")
        )
        ended = machine.testbed(*command, env={"PATH": folder})
        assert (ended.status, ended.err) == (3, f"error: {error}\n"), program
    nothing_is_left(machine)


def _bundled_kubectl() -> list[str]:
    return [f"{sys.prefix}/bin/kubectl"]


@pytest.mark.parametrize("program", start._TOOLS)
def test_every_program_that_a_lab_needs(program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it no lab is begun."""
    for other in start._TOOLS:
        if other != program:
            (tmp_path / other).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    package = start._TOOLS[program]
    with pytest.raises(MissingFeature, match=f"^missing: {program}; install with `apt-get install {package}`"):
        start.check_machine()


# --- processes ---------------------------------------------------------------------------------------------------------


def too_few(root: str) -> str:
    """Return the pattern of what is said in a control group of 40 processes below ``root``, a pattern as well."""
    return (
        r"error: 3\d more processes and threads can be started here, and a lab of 3 nodes needs 70: raise the limit in "
        rf"{root}/testbed-test/pids\.max \(TasksMax= of a systemd unit, --pids-limit of a container\)\n"
    )


def test_too_few_processes(machine: Machine) -> None:
    """In a control group without room for a lab none is begun, and the limit is named."""
    made = machine.run("sh", "-ec", "mkdir -p /pids; mount -t cgroup -o pids none /pids; mkdir /pids/testbed-test")
    if made.status:
        pytest.skip(f"no control group of version 1 that counts processes: {made.err.strip()}")
    try:
        machine.sh("echo 40 > /pids/testbed-test/pids.max")
        command = shlex.join([machine.python, "-m", "testbed", *UP])
        ended = machine.run("sh", "-ec", f"echo $$ > /pids/testbed-test/cgroup.procs; exec {command}")
        assert (ended.status, ended.out) == (3, "")
        assert re.fullmatch(too_few("/pids"), ended.err), ended.err
        nothing_is_left(machine)
    finally:
        machine.sh("rmdir /pids/testbed-test; umount /pids")


@pytest.mark.ipvs
def test_too_few_processes_by_version_2_of_control_groups(tmp_path: Path) -> None:
    """The same where systemd of today has them; tried in the nested kernel, because a machine has its counter in one version only."""
    if not is_nested():
        pytest.skip("the control groups of this machine are its own")
    root = tmp_path / "cgroup"
    root.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", str(root)], check=True)
    group = root / "testbed-test"
    try:
        (root / "cgroup.subtree_control").write_text("+pids")
        group.mkdir()
        (group / "pids.max").write_text("40")
        done = subprocess.run(
            ["sh", "-c", 'echo $$ > "$1"; shift; exec "$@"', "-", str(group / "cgroup.procs"), sys.executable, "-m", "testbed", "up", "x"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (3, "")
        assert re.fullmatch(too_few(f"(/sys/fs/cgroup|{re.escape(str(root))})"), done.stderr), done.stderr
    finally:
        if group.exists():
            group.rmdir()
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 8, 12, 24, 40])
def test_processes_run_out_while_a_lab_starts(machine: Machine, most: int) -> None:
    """Where the limit cannot be read beforehand: one error, whichever process it was that could not start, and nothing left."""
    group = f"testbed-test-{os.getpid()}"
    made = machine.run(
        "sh",
        "-ec",
        f"mkdir -p /pids; mount -t cgroup -o pids none /pids; mkdir /pids/{group}; echo {most} > /pids/{group}/pids.max",
    )
    if made.status:
        pytest.skip(f"no control group of version 1 that counts processes: {made.err.strip()}")
    command = shlex.join([machine.python, "-m", "testbed", *UP])
    ended = machine.run(
        "sh",
        "-ec",
        f"exec 3> /pids/{group}/cgroup.procs; umount -l /pids; mount -t tmpfs none /sys/fs/cgroup; "
        f"echo $$ >&3; exec 3>&-; exec {command}",
    )
    try:
        assert ended.status == 3
        assert ended.err.startswith("error: ") and "Traceback" not in ended.err.partition("\n")[0]
        assert "Resource temporarily unavailable" in ended.err or "Back-off restarting failed container" in ended.err
        nothing_is_left(machine)
    finally:
        machine.run(
            "sh",
            "-c",
            f"mountpoint -q /pids || mount -t cgroup -o pids none /pids; rmdir /pids/{group}; umount -l /pids",
        )


@pytest.mark.parametrize(
    ("hard", "raising", "expected"),
    [
        pytest.param(1024, True, (65536, 65536), id="too low, and it can be raised"),
        pytest.param(1024, False, (1024, 1024), id="too low, and it cannot"),
        pytest.param(65536, False, (65536, 65536), id="just enough"),
        pytest.param(10**9, False, (65536, 10**9), id="a thousand million"),
    ],
)
def test_how_many_files_a_labs_processes_open(
    hard: int, raising: bool, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a thousand pods take, never so many that a program which closes all of them takes minutes."""
    limits = [(1024 if hard > 1024 else 64, hard)]

    def setrlimit(_kind: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > limits[-1][1] and not raising:
            raise ValueError("not allowed to raise maximum limit")
        limits.append(wanted)

    monkeypatch.setattr(boot.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(boot.resource, "setrlimit", setrlimit)
    boot._choose_open_files()
    assert limits[-1] == expected


# --- where it works all the same ---------------------------------------------------------------------------------------


def test_a_machine_with_much_that_is_odd(machine: Machine) -> None:
    """All at once: a path with blanks, quotes and umlauts, /run read-only, /tmp and the home full, the C locale, few open files.

    Then the pods' file system runs full, and the log; then reports do.
    """
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("this clone is below /tmp, which has no room here")
    machine.project = _copy_of_the_project(machine, "/opt/pröject with 'blanks'/test bed")
    state = "/opt/s t,ate"
    machine.sh(f"mkdir '{state}' /report; mount -t tmpfs -o size=64k,mode=755 tmpfs '{state}'")
    machine.sh("mount -o remount,ro /run; mount -t tmpfs -o size=4k tmpfs /report")
    machine.sh(
        "mkdir -p $HOME; for f in /tmp $HOME; do mount -t tmpfs -o size=4k tmpfs $f; head -c 8000 /dev/zero > $f/x 2>/dev/null || true; done"
    )
    hostile = {
        "XDG_RUNTIME_DIR": state,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "latin-1",
    }
    few = limit(OPEN_FILES, 64, start.LEAST_OPEN_FILES)

    def testbed(*argv: str, status: int = 0) -> Ended:
        ended = machine.testbed(*argv, env=hostile, before=few)
        no_traceback(ended)
        assert ended.status == status, f"{argv}: {ended.out}{ended.err}"
        return ended

    try:
        testbed(*UP)
        assert inotify_of(machine, state) == []
        assert testbed("exec", "node1", "--", "sh", "-c", "echo $0 ü", "ö").out == "ö ü\n"
        testbed("kubectl", "get", "nodes")
        assert "all is well" in testbed("doctor").out
        testbed("capture", "all", "--duration", "500ms", "-w", "/opt/a b.pcapng")
        _fill_the_pods(machine, state, testbed)
        # The state folder with the log is on a disk of 64 KiB: what the lab's processes complain about does not fit.
        machine.sh(f"head -c 80000 /dev/zero > '{state}/testbed/fill' 2>/dev/null || true")
        testbed("kubectl", "run", "late", "--image=nginx")
        testbed("kubectl", "wait", "--for=condition=Ready", "pod/late", "--timeout=60s")
        machine.sh(f"rm '{state}/testbed/fill'")
        testbed(*DOWN)
        said = testbed(*RUN, status=3)
        assert re.search(r"s +iptables +2/2 +passed", said.out)
        assert re.fullmatch(r"error: /report/\w+\.\w+: cannot be written: No space left on device\n", said.err)
        assert machine.sh("ls -A /report | grep -c '^[.]' || true") == "0\n"
        assert testbed("ls", "-o", "json").out == "[]\n"
    finally:
        machine.testbed("down", "--all", env=hostile)


def _copy_of_the_project(machine: Machine, place: str) -> Path:
    """Put the project with an environment of its own somewhere else."""
    quoted = shlex.quote(place)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    machine.sh(
        f"mkdir -p {quoted}; cp -r {shlex.quote(str(ROOT))}/testbed {shlex.quote(str(ROOT))}/topologies {quoted}/; "
        f"{shlex.quote(sys.executable)} -m venv --without-pip {quoted}/.venv; "
        f"echo {shlex.quote(sysconfig.get_paths()['purelib'])} > {quoted}/.venv/lib/{version}/site-packages/more.pth; "
        f"cp {shlex.quote(sys.prefix)}/bin/kubectl {quoted}/.venv/bin/ 2>/dev/null || true"
    )
    return Path(place)


def inotify_of(machine: Machine, state: str) -> list[str]:
    """Return the processes of the lab that hold an inotify instance, of which a user has 128 and other programs may have all."""
    done = machine.run(
        sys.executable, "-c", _INOTIFY, str(lab_pid(machine, state)), env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    )
    count, *found = done.out.split()
    assert int(count) > 10, done.err
    return found


_INOTIFY = """
import contextlib, os, sys
from machine import processes_below
pids = processes_below(int(sys.argv[1]))
print(len(pids))
for pid in pids:
    with contextlib.suppress(OSError):
        if any("inotify" in os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")):
            print(open(f"/proc/{pid}/comm").read().strip())
"""


def lab_pid(machine: Machine, state: str) -> int:
    return int(json.loads(machine.sh(f"cat '{state}/testbed/x/lab.json'"))["pid"])


def _fill_the_pods(machine: Machine, state: str, testbed: Callable[..., Ended]) -> None:
    """Let pods' written files take all of their file system: others that want some say so, and go on when it is free again."""
    pid = lab_pid(machine, state)
    private = f"{state}/testbed/x/private"
    used = int(machine.sh(f"nsenter --target {pid} --mount df --output=used -k '{private}'").split()[-1])
    machine.sh(f"nsenter --target {pid} --mount mount -o remount,size={used + 512}k '{private}'")
    testbed("kubectl", "run", "greedy", "--image=busybox", "--", "sleep", "600")
    testbed("kubectl", "wait", "--for=condition=Ready", "pod/greedy", "--timeout=60s")
    said = testbed("exec", "default/greedy", "--", "dd", "if=/dev/zero", "of=/fill", "bs=64k", "count=64", status=1)
    assert "No space left on device" in said.err
    testbed("kubectl", "run", "late", "--image=nginx")
    events = _until(
        lambda: testbed("kubectl", "get", "events", "-o", "jsonpath={.items[*].message}").out, "No space left on device"
    )
    assert "default/late" in events
    testbed("exec", "default/greedy", "--", "rm", "/fill")
    testbed("kubectl", "delete", "pod", "late", "greedy", "--now")


def _until(look: Callable[[], str], wanted: str) -> str:
    deadline = time.monotonic() + patient(60)
    while wanted not in (seen := look()):
        assert time.monotonic() < deadline, f"{wanted!r} is not in {seen!r}"
        time.sleep(0.1)
    return seen


def test_dnsmasq_without_inotify(tmp_path: Path) -> None:
    """Cluster DNS starts where no inotify instance is left: its configuration has dnsmasq ask for none."""
    config = render_dnsmasq(
        parse_corefile(corefile("cluster.local"), read_file=lambda _: ""),
        addresses=("127.0.0.1",),
        hosts_file="/dev/null",
    )
    (tmp_path / "conf").write_text(config)
    script = (
        "ip link set lo up; echo 0 > /proc/sys/user/max_inotify_instances || exit 77;"
        "timeout 2 dnsmasq --keep-in-foreground -C {}; test $? = 124"
    )
    enter = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c"]
    (tmp_path / "polling").write_text(config.replace("no-poll\n", "").replace("no-resolv\n", ""))
    done = subprocess.run([*enter, script.format(tmp_path / "conf")], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no user namespace with limits of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    polling = subprocess.run([*enter, script.format(tmp_path / "polling")], capture_output=True, text=True, check=False)
    assert "inotify" in polling.stderr  # the limit holds


WORKS: dict[str, tuple[str, dict[str, str | None], Callable[[], Any] | None]] = {
    "/tmp is full": (FULL.format("/x") + "; mount --bind /x /tmp", {}, None),
    "latin-1": ("true", {"PYTHONIOENCODING": "latin-1"}, None),
    "ascii": ("true", {"PYTHONIOENCODING": "ascii"}, None),
    "the C locale": ("true", {"LC_ALL": "C", "LANG": "C"}, None),
    "the POSIX locale without Python's remedies": ("true", {"LC_ALL": "POSIX", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, None),
    "just enough open files": ("true", {}, limit(OPEN_FILES, 64, 1024)),
    "as many open files as there may be": ("true", {}, limit(OPEN_FILES, resource.getrlimit(OPEN_FILES)[1])),
    "without ipset, nft, tcpdump, tc": ("rm -f /usr/sbin/ipset /usr/sbin/nft /usr/bin/tcpdump /usr/sbin/tcpdump /usr/sbin/tc /sbin/tc", {}, None),
    "without modprobe and unshare": ("rm -f /usr/sbin/modprobe /sbin/modprobe /usr/bin/unshare", {}, None),
    "/run read-only": ("mkdir '/opt/a b'; mount -o remount,ro /run", {"XDG_RUNTIME_DIR": "/opt/a b"}, None),
    "a umask of 077": ("true", {}, lambda: os.umask(0o077)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_what_works_all_the_same(machine: Machine, name: str) -> None:
    """Up, exec, kubectl, doctor, run, down, each with status 0."""
    prepare, env, before = WORKS[name]
    machine.sh(prepare)
    for command in (
        UP,
        ("exec", "node1", "--", "true"),
        ("kubectl", "get", "nodes"),
        ("doctor",),
        DOWN,
        RUN,
        ("validate", "/files/s"),
    ):
        ended = machine.testbed(*command, env=env, before=before)
        no_traceback(ended)
        assert ended.status == 0, f"{command}: {ended.out}{ended.err}"
    assert machine.testbed("ls", "-o", "json", env=env).out == "[]\n"


def test_the_limit_of_processes_here() -> None:
    """It is read from this machine's own control groups."""
    spare = spare_processes()
    assert spare is None or (spare[1] / "pids.max").is_file()
