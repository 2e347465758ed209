"""Commands and labs that are interrupted or killed at any moment: nothing is left, nothing is mixed up, the next command works.

The moments are a plan, made from a seed; a failure prints it, and TESTBED_KILL_SEED=SEED repeats the plan. A moment is a share
of what the command takes undisturbed, counted from where our own code begins: what the Python interpreter says about a Ctrl-C
while it starts is not ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from testbed.kernel.pace import patient
from testbed.kernel.processes import Target, call_in, run_in
from testbed.lab.folder import state_root

pytestmark = [pytest.mark.root]

ROOT = Path(__file__).resolve().parents[2]
MARK = "TESTBED_KILLED_BY"
"""In the environment of every process that one of our commands starts, and that they start."""

BEGIN = """\
import os, signal
from testbed.__main__ import _leave, main
signal.signal(signal.SIGINT, _leave)
os.write({fd}, b"x")
os.close({fd})
main()
"""
"""main() puts the same handler where Python's own is; what is interrupted from the `x` on must be answered by it."""
INTERRUPTED, REFUSED, FAILED = 130, 3, 1
USUAL_SEED = 1
LINKS_OF_LABS = re.compile(r"br-lan|cni0|kube-ipvs0|veth[0-9a-f]{8}|(node[0-9]+|client)-eth0")
"""Of a lab's own namespaces: none may be seen among the host's."""

SCENARIO = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {name: NAME}
spec:
  topology: three-nodes
  proxyModes: [iptables]
  steps:
    - apply: pods.yaml
    - wait: {deployment: default/web, for: available, within: 60s}
    - expect: {from: client, get: 'http://192.168.93.11:30777/', answeredBy: default/app=web, within: 30s}
    - exec: {in: node1, run: 'true'}
    - expect: {from: client, get: 'http://192.168.93.12:30777/', times: 50, answeredBy: default/app=web, within: 30s}
"""

PODS = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, nodePort: 30777}]}
"""


@dataclass(frozen=True)
class Blow:
    """What is done to which command, and when: a share of the time that the command takes."""

    command: str
    victim: str
    share: float


CTRL_C = "terminal"
"""SIGINT to the foreground process group; every other victim gets SIGKILL."""
COMMAND = "command"
FATAL = ("tini", "spawner", "control")
"""Processes, by their names, whose end is the lab's; tini is the first one."""
OTHERS = ("kube-proxy", "pause", "forker", "coredns")
"""Processes that a lab goes on without: of programs there is soon another one, and pause holds the namespaces of a node."""

COMMANDS = {"up": 3.0, "run": 3.0, "bench": 2.0, "capture": 2.0, "down": 2.0}
"""How often each is chosen."""


def plan(seed: int, count: int, processes: Sequence[str]) -> list[Blow]:
    """Return blows: every command in turn as often as its weight says, Ctrl-C every other time."""
    chance = random.Random(seed)
    rounds = [command for command, weight in COMMANDS.items() for _ in range(int(weight))]
    blows = []
    while len(blows) < count:
        chance.shuffle(rounds)
        for command in rounds:
            victims = [COMMAND, *processes]
            victim = CTRL_C if chance.random() < 0.5 else chance.choice(victims)
            blows.append(Blow(command, victim, chance.random()))
    return blows[:count]


@dataclass
class Running:
    """A command under way, as the leader of a process group of its own, like one that was typed."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def said(self) -> str:
        return f"\n--- out:\n{self.out.read_text()}\n--- err:\n{self.err.read_text()}"


@dataclass
class Bench:
    """Starts commands in a folder of their own, and knows what they have left."""

    folder: Path
    mark: str = field(default_factory=lambda: f"{os.getpid()}-{time.monotonic_ns()}")

    def __post_init__(self) -> None:
        self.name = f"kill-{os.getpid()}"
        (self.folder / "tmp").mkdir()
        (self.folder / "scenario.yaml").write_text(SCENARIO.replace("NAME", self.name))
        (self.folder / "pods.yaml").write_text(PODS)
        self._begun = 0
        self.before = self.host_state()

    def begin(self, *words: str) -> Running:
        """Start a command; returns when our own code has begun."""
        self._begun += 1  # each has files of its own: a failure shows what that command said
        out, err = (self.folder / f"{self._begun}-{words[0]}.{which}" for which in ("out", "err"))
        reading, writing = os.pipe()
        argv = [sys.executable, "-c", BEGIN.format(fd=writing), *words]
        env = {**os.environ, MARK: self.mark, "TMPDIR": str(self.folder / "tmp"), "PYTHONPATH": str(ROOT)}
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env, process_group=0, pass_fds=[writing],
                cwd=self.folder,
            )  # fmt: skip
        os.close(writing)
        assert os.read(reading, 1) == b"x", err.read_text()
        os.close(reading)
        return Running(process, out, err)

    def run(self, *words: str) -> float:
        """Run a command to its good end; return how long that took."""
        running = self.begin(*words)
        began = time.monotonic()
        assert running.process.wait(timeout=patient(120)) == 0, f"{words}{running.said()}"
        return time.monotonic() - began

    def words(self, command: str) -> list[str]:
        return {
            "up": ["up", self.name],
            "run": ["run", "scenario.yaml", "--report", "report"],
            "bench": ["bench", "latency", "--modes", "iptables", "--paths", "direct,clusterip", "--services", "10",
                      "--duration", "0.2s", "--samples", "3", "--no-report"],
            "capture": ["capture", "-l", self.name, "all", "--duration", "1s", "-w", "capture.pcapng"],
            "down": ["down", self.name],
        }[command]  # fmt: skip

    def processes(self) -> dict[int, str]:
        """Return everything that a command of ours has started and that has not ended: pid -> name."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self.mark}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                        found[int(entry.name)] = (entry / "comm").read_text().strip()
        return found

    def labs(self) -> list[str]:
        """Return the folders in the registry that our commands have left; what lives without our mark is somebody else's."""
        root = state_root()
        return sorted(entry.name for entry in (root.iterdir() if root.is_dir() else ()) if self._is_ours(entry))

    def _is_ours(self, folder: Path) -> bool:
        if folder.name != self.name and not folder.name.startswith("bench-iptables"):
            return False
        try:
            pid = json.loads((folder / "lab.json").read_bytes())["pid"]
            return pid in self.processes() or not Path(f"/proc/{pid}").exists()
        except (OSError, ValueError):
            return folder.exists()

    def host_state(self) -> dict[str, str]:
        """Return what of the host's a lab of ours could leave behind; mounts and links of others come and go."""
        ours = (f"{state_root()}/{self.name}", f"{state_root()}/bench-iptables", str(self.folder))
        mounts = [line.split(" ", 3)[3] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return {
            "links": " ".join(sorted(name for name in os.listdir("/sys/class/net") if LINKS_OF_LABS.fullmatch(name))),
            "mounts": "\n".join(sorted(mount for mount in mounts if any(folder in mount for folder in ours))),
        }

    def left(self) -> dict[str, object]:
        """Return what there is that was not there before the first command."""
        now = self.host_state()
        found: dict[str, object] = {name: text for name, text in now.items() if text != self.before[name]}
        if self.labs():
            found["labs"] = self.labs()
        if self.processes():
            found["processes"] = self.processes()
        if tmp := os.listdir(self.folder / "tmp"):
            found["temporary files"] = tmp
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A folder and its commands; what a failed test has left is ended with it."""
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        for pid in made.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def strike(bench: Bench, running: Running, blow: Blow) -> bool:
    """Strike a victim as soon as there is one; False when the command has ended before."""
    if blow.victim == CTRL_C:
        in_time = running.process.poll() is None  # before the blow, which may end it at once
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGINT)
        return in_time
    if blow.victim == COMMAND:
        running.process.kill()
        return True
    deadline = time.monotonic() + patient(20)
    while True:
        victims = [pid for pid, name in bench.processes().items() if name == blow.victim]
        if victims:
            victim = random.Random(blow.share).choice(sorted(victims))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            return True
        if running.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"no {blow.victim} within 20 s"
        time.sleep(0.002)


def allowed(blow: Blow, stdout: str, stderr: str) -> set[int]:
    """Return the statuses that a command may end with. 0: the blow came too late, or what it hit was not needed."""
    if blow.victim == COMMAND:
        return {-signal.SIGKILL, 0}
    if blow.victim == CTRL_C:
        # capture is made to be ended by Ctrl-C, once it listens
        return {INTERRUPTED, 0} if blow.command != "capture" or "listening at" in stderr else {INTERRUPTED}
    if blow.victim in FATAL:
        return {0, REFUSED}
    # a program is started again; a node whose holder is gone is a broken one, as `run` and `bench` may see
    return {0, REFUSED, FAILED} if blow.command in ("run", "bench") else {0, REFUSED}


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def try_blow(bench: Bench, blow: Blow, usual_s: Mapping[str, float], eventually: Callable[..., object]) -> None:
    """Start a command, strike, and look at its end, at what it says and at what is left."""
    if blow.command in ("capture", "down"):
        bench.run("up", bench.name)
    running = bench.begin(*bench.words(blow.command))
    time.sleep(blow.share * usual_s[blow.command])  # the moment that the plan has chosen
    in_time = strike(bench, running, blow)
    try:
        status = running.process.wait(timeout=patient(60))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it has not ended 60 s later{running.said()}") from None
    stdout, stderr = running.out.read_text(), running.err.read_text()
    assert status in (allowed(blow, stdout, stderr) if in_time else {0}), f"status {status}{running.said()}"
    for unwanted in ("Traceback", "Exception ignored", "Error in sys."):
        assert unwanted not in stderr + stdout, running.said()
    if status == INTERRUPTED:
        assert last_line(stderr).startswith("interrupted") or "INCOMPLETE: interrupted" in stdout, running.said()
    if status == REFUSED:
        assert last_line(stderr), running.said()
    if status == INTERRUPTED and blow.command != "capture":
        # it cleans up before it ends; `down` that was interrupted early has left the lab as it was
        assert blow.command == "down" or bench.left() == {}, f"{bench.left()}{running.said()}"

    def is_over() -> bool:
        """The lab's processes let go of it when the kernel has ended them; what lives on legitimately is stopped."""
        running.process.poll()
        bench.run("ls")
        for name in bench.labs():
            with contextlib.suppress(AssertionError):  # it has ended meanwhile
                bench.run("down", name)
        return bench.left() == {}

    try:
        eventually(is_over, within_s=20)
    except AssertionError:
        raise AssertionError(f"left: {bench.left()}{running.said()}") from None


def try_all(bench: Bench, blows: list[Blow], seed: int, eventually: Callable[..., object]) -> None:
    usual_s = {"up": bench.run("up", bench.name), "down": bench.run("down", bench.name)}
    # of the others the beginning says enough of how fast this machine is
    usual_s |= {"run": 3 * usual_s["up"], "bench": 3 * usual_s["up"], "capture": 0.8 * usual_s["up"]}
    for number, blow in enumerate(blows):
        try:
            try_blow(bench, blow, usual_s, eventually)
        except AssertionError as error:
            again = f"TESTBED_KILL_SEED={seed}, {number} of {len(blows)}, {blow}, usual {usual_s}"
            raise AssertionError(f"{again}: {error}") from None
    bench.run("up", bench.name)
    bench.run("down", bench.name)
    assert bench.left() == {}


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The environment's; else a new one with --slow, and always the same without: what fails once is to fail again."""
    if text := os.environ.get("TESTBED_KILL_SEED"):
        return int(text)
    chosen = random.SystemRandom().randrange(1 << 32) if request.config.getoption("--slow") else USUAL_SEED
    print(f"TESTBED_KILL_SEED={chosen}")
    return chosen


@pytest.mark.parametrize("how", ["run", "call"])
def test_an_interrupt_between_a_fork_and_its_pid(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is killed and waited for: as a zombie it would keep its PID namespace, a lab's, from ending."""
    fork, children = os.fork, []

    def interrupted_fork() -> int:
        pid = fork()
        if pid:
            children.append(pid)
            signal.raise_signal(signal.SIGINT)  # Python raises when the call has returned
        return pid

    place = Target(name="here", pidfd=os.pidfd_open(os.getpid()), env=dict(os.environ))
    monkeypatch.setattr(os, "fork", interrupted_fork)
    with pytest.raises(KeyboardInterrupt):
        if how == "run":
            run_in(place, ["sleep", "60"], timeout_s=60)
        else:
            call_in(place, time.sleep, 60, timeout_s=60)
    place.close()
    (child,) = children
    with pytest.raises(ChildProcessError):  # it has been waited for
        os.waitpid(child, os.WNOHANG)


@pytest.mark.timeout(300)
def test_a_dozen_moments(bench: Bench, seed: int, eventually: Callable[..., object]) -> None:
    """Every command twice or three times, half of them by Ctrl-C."""
    try_all(bench, plan(seed, 12, FATAL), seed, eventually)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_moments(bench: Bench, seed: int, eventually: Callable[..., object]) -> None:
    """The same, a hundred times, also to processes that a lab goes on without."""
    try_all(bench, plan(seed, 100, FATAL + OTHERS), seed, eventually)
