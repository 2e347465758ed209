"""``testbed vm``, as a user sees it: real boots, so each test asks one machine as much as it can."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import testbed.vm.machine as machine
from testbed.vm.session import TIMED_OUT

WHY_NOT = (
    ""
    if shutil.which(machine.PROGRAM) and machine.modules_folder()
    else "no linux.uml (apt-get install user-mode-linux)"
)
pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(WHY_NOT) or bool(os.environ.get("TESTBED_NESTED")), reason=WHY_NOT or "is in one already"),
]
VM = (sys.executable, "-m", "testbed", "vm")
BYTES = bytes(range(256)) * 40


def run_vm(*arguments: str, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*VM, *arguments], input=stdin, capture_output=True, timeout=280, check=False, **options)  # type: ignore[call-overload,no-any-return]


_LOOK = """
cat; cat "$1/input" >&2
{
  pwd; echo "$FROM_OUTSIDE"; id -u; echo "$HOME"; uname -r; date +%s
  cat /proc/sys/net/netfilter/nf_conntrack_max
  cat /sys/class/net/lo/operstate; ls /dev/pts/ptmx /dev/shm -d
  stat -f -c %T /sys/fs/cgroup /run
  for module in ip_vs_rr ip_vs_mh dummy sch_netem ip_set_hash_ipport; do modprobe "$module" && echo "$module"; done
} >"$2/seen"
echo changed >/etc/hostname; echo changed >"$1/input"; rm -f /usr/bin/env
exit 7
"""


def test_what_a_command_meets_and_leaves(tmp_path: Path) -> None:
    """Input, output, errors and status pass unchanged; it is a machine with IPVS; only the shared folder keeps changes."""
    shared = tmp_path / "shared with a blank"
    shared.mkdir()
    (tmp_path / "input").write_bytes(BYTES)
    hostname = Path("/etc/hostname").read_bytes()
    done = run_vm(
        "--share", str(shared), "--", "sh", "-c", _LOOK, "sh", str(tmp_path), str(shared), stdin=BYTES[::-1],
        cwd=tmp_path, env={**os.environ, "FROM_OUTSIDE": "a b\n'c'", "HOME": "/root"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stdout == BYTES[::-1]
    assert done.stderr == BYTES
    seen = (shared / "seen").read_text().splitlines()
    release = machine.modules_folder().name  # type: ignore[union-attr]
    assert seen[:6] == [str(tmp_path), "a b", "'c'", "0", "/root", release]
    assert abs(int(seen[6]) - time.time()) < 60
    assert seen[7:] == [
        "262144", "unknown", "/dev/pts/ptmx", "/dev/shm", "cgroup2fs", "tmpfs",
        "ip_vs_rr", "ip_vs_mh", "dummy", "sch_netem", "ip_set_hash_ipport",
    ]  # fmt: skip
    assert (tmp_path / "input").read_bytes() == BYTES
    assert Path("/etc/hostname").read_bytes() == hostname
    assert Path("/usr/bin/env").exists()


def _descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and theirs."""
    try:
        children = set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return set()
    return children.union(*map(_descendants, children))


def _is_uml(pid: int) -> bool:
    try:
        return b"linux.uml" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.fixture
def loop() -> Iterator[subprocess.Popen[bytes]]:
    """A command inside that counts signals and says so."""
    script = 'trap "echo int" INT; trap "echo term; exit 9" TERM; echo up; while :; do sleep 0.1; done'
    with subprocess.Popen([*VM, "--", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as vm:
        assert vm.stdout
        assert vm.stdout.readline() == b"up\n"
        yield vm
        vm.kill()


def test_signals_reach_the_command_and_nothing_is_left(
    loop: subprocess.Popen[bytes], eventually: Callable[..., object]
) -> None:
    """Ctrl-C and SIGTERM are for the command inside, which may go on, or end with a status of its own."""
    assert loop.stdout
    loop.send_signal(signal.SIGINT)
    assert loop.stdout.readline() == b"int\n"
    started = _descendants(loop.pid)
    assert any(map(_is_uml, started))
    loop.send_signal(signal.SIGTERM)
    assert loop.stdout.readline() == b"term\n"
    assert loop.wait(60) == 9
    eventually(lambda: not any(map(_is_uml, started)))


def test_sigkill_leaves_nothing(loop: subprocess.Popen[bytes], eventually: Callable[..., object]) -> None:
    """After SIGKILL of testbed vm none of UML's processes is left, and none of its files."""
    before = set(os.listdir("/dev/shm")), Path.home().joinpath(".uml").exists()
    started = _descendants(loop.pid)
    loop.kill()
    loop.wait(10)
    eventually(lambda: not any(map(_is_uml, started)))
    assert (set(os.listdir("/dev/shm")), Path.home().joinpath(".uml").exists()) == before


def test_time_is_up(tmp_path: Path) -> None:
    """A command that takes too long ends with 124 and a word why; what it wrote into a shared folder is there."""
    script = f"echo early >{tmp_path}/result; echo up; sleep 1000"
    began = time.monotonic()
    done = run_vm("--timeout", "15s", "--share", str(tmp_path), "--", "sh", "-c", script)
    assert done.returncode == TIMED_OUT
    assert done.stderr.decode() == "testbed vm: time is up (15 s): everything in the nested kernel was ended\n"
    assert time.monotonic() - began >= 15
    if done.stdout:  # it had booted by then
        assert (tmp_path / "result").read_text() == "early\n"


def test_memory_is_up() -> None:
    """A program that the nested kernel has no memory for is named, with the option that gives more."""
    done = run_vm("--memory", "256M", "--", "tail", "/dev/zero")  # without a line, it keeps all of it
    assert done.returncode == 137
    assert "ran out of its 256 MiB and killed tail; give it more with --memory" in done.stderr.decode()


def test_panic() -> None:
    """When the nested kernel dies, the last it said is shown, and the status is 3."""
    script = "echo before; read go; echo c >/proc/sysrq-trigger; sleep 60"
    command = [*VM, "--", "sh", "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as vm:
        assert vm.stdout and vm.stdout.readline() == b"before\n"  # what is on its way when a kernel dies is lost
        _, said = vm.communicate(b"go\n", timeout=90)
    assert vm.returncode == 3, said
    assert "error: the nested kernel ended before the command did; the last it said:" in said.decode()
    assert "sysrq triggered crash" in said.decode()


def test_terminal(eventually: Callable[..., object]) -> None:
    """On a terminal the command has one, of the same size; what is typed is echoed, and Ctrl-C interrupts."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    subprocess.run(["stty", "rows", "31", "cols", "97"], stdin=theirs, check=True)
    script = "test -t 0 && test -t 1 && test -t 2 && stty size; read line; echo got-$line; exec sleep 1000"
    seen = bytearray()

    def shows(text: bytes) -> Callable[[], bool]:
        def look() -> bool:
            with contextlib.suppress(BlockingIOError):
                seen.extend(os.read(ours, 4096))
            return text in seen

        return look

    with subprocess.Popen([*VM, "--", "sh", "-c", script], stdin=theirs, stdout=theirs, stderr=theirs) as vm:
        try:
            eventually(shows(b"31 97\r\n"), within_s=120)
            os.write(ours, b"typed\n")
            eventually(shows(b"typed\r\ngot-typed\r\n"), within_s=60)
            os.write(ours, b"\x03")
            assert vm.wait(60) == 130
        finally:
            vm.kill()
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        pytest.param(["no-such-program"], 127, "testbed vm: no-such-program: command not found", id="unknown"),
        pytest.param(
            ["/etc/passwd"],
            126,
            "testbed vm: /etc/passwd: Permission denied",
            id="not executable",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_commands_that_cannot_run(command: list[str], status: int, words: str) -> None:
    """A command that is not there, or is no program, ends as in a shell."""
    done = run_vm("--", *command)
    assert (done.returncode, done.stderr.decode().strip(), done.stdout) == (status, words, b"")
