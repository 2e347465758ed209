"""What is asked of a nested kernel and what follows from it; no kernel is booted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import pytest

import testbed.cli.vm
import testbed.vm.machine as machine
from testbed.cli.main import cli
from testbed.errors import InputError, MissingFeature
from testbed.kernel.pace import NESTED, patient
from testbed.vm import wire
from testbed.vm.plan import VmRequest, choose_memory, explain_end, guest_plan, last_messages, uml_command
from testbed.vm.session import Ended


def request(**fields: Any) -> VmRequest:
    return VmRequest(**{"argv": ("true",), "cwd": "/", "env": {}, **fields})


def test_uml_command() -> None:
    """UML boots from the host's files, read-only, without a file or a console of its own, and runs our init."""
    command = uml_command(
        "linux.uml", memory_mib=512, line_fd=7, folder="/private", init=["/private/python", "guest.py"]
    )
    assert command == [
        "linux.uml", "mem=512M", "uml_dir=/private", "umid=testbed", "rootfstype=hostfs", "rootflags=/", "ro",
        "con0=null,fd:1", "con=null", "ssl0=fd:7", "ssl=null", "noreboot", "panic=-1", "devtmpfs.mount=0", "loglevel=5",
        "init=/private/python", "--", "guest.py",
    ]  # fmt: skip


def test_the_plan_carries_every_byte() -> None:
    """Arguments that are not UTF-8, hold quotes or line ends arrive as they are; the environment gets what is missing."""
    argv = ("printf", "a'b\"c\n$(id)", "\udcff")
    plan = json.loads(guest_plan(request(argv=argv, env={"A": "b\nc", "INVOCATION_ID": "x"}), modules="/modules/1"))
    assert plan["argv"] == list(argv)
    assert plan["env"] == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "A": "b\nc", NESTED: "1",
    }  # fmt: skip


def test_frames_survive_any_cut() -> None:
    """Frames come out the same however the line cuts them."""
    sent = wire.frame(wire.STDOUT, b"abc") + wire.number(wire.EXIT, 7) + wire.window(24, 80) + wire.frame(wire.READY)
    expected = [(wire.STDOUT, b"abc"), (wire.EXIT, b"\0\0\0\7"), (wire.WINDOW, b"\0\x18\0\x50"), (wire.READY, b"")]
    for size in range(1, len(sent) + 1):
        frames = wire.Frames()
        seen = [found for at in range(0, len(sent), size) for found in frames.feed(sent[at : at + size])]
        assert seen == expected
    assert wire.read_window(expected[2][1]) == (24, 80)


@pytest.mark.parametrize(("wanted", "available", "given"), [(None, 8000, 2048), (None, 1000, 750), (512, 600, 512)])
def test_memory(wanted: int | None, available: int, given: int) -> None:
    """Two GiB, or less on a small machine, or what is asked for."""
    assert choose_memory(wanted, available) == given


@pytest.mark.parametrize(("wanted", "available", "words"), [(None, 200, "200 MiB available"), (4096, 1000, "--memory")])
def test_too_little_memory(wanted: int | None, available: int, words: str) -> None:
    """A machine without so much memory refuses before it boots, with both figures."""
    with pytest.raises(MissingFeature, match=words):
        choose_memory(wanted, available)


def test_what_a_kernel_said_last() -> None:
    """The reason of a panic is shown, the addresses on the stack are not; who was killed for memory is named."""
    text = "one\nKernel panic - not syncing: x\nStack:\n 606944ba 607e7fcd 82c8bc60\nCall Trace:\n [<606944ba>] ? y+0x0\n\n"
    assert last_messages(text) == ["one", "Kernel panic - not syncing: x"]
    killed = "Out of memory: Killed process 12 (python) total-vm:1\n"
    assert explain_end(killed, 256) == (
        "the nested kernel ran out of its 256 MiB and killed python; give it more with --memory"
    )
    assert explain_end(text, 256) == ""


@pytest.mark.parametrize(("text", "mib"), [("512M", 512), ("2G", 2048), ("1.5GiB", 1536), ("300", 300)])
def test_sizes(text: str, mib: int) -> None:
    """Sizes are written as people write them."""
    assert testbed.cli.vm.parse_memory(text) == mib


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("1h", 3600)])
def test_times(text: str, seconds: float) -> None:
    """Times are written as people write them."""
    assert testbed.cli.vm.parse_timeout(text) == seconds


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[VmRequest]:
    """What would have been run, on a machine that could."""
    requests: list[VmRequest] = []

    def run(request: VmRequest) -> Ended:
        requests.append(request)
        return Ended(5, b"")

    monkeypatch.setattr(testbed.cli.vm, "check_machine", lambda: None)
    monkeypatch.setattr(testbed.cli.vm, "available_memory_mib", lambda: 8000)
    monkeypatch.setattr(testbed.cli.vm, "run_command", run)
    return requests


def invoke(*arguments: str) -> int:
    return (
        click.testing.CliRunner()
        .invoke(cli, ["vm", *arguments], standalone_mode=False, catch_exceptions=False)
        .return_value
    )  # type: ignore[no-any-return]


@pytest.mark.parametrize("separator", [["--"], []])
def test_our_options_end_at_the_command(ran: list[VmRequest], separator: list[str], tmp_path: Path) -> None:
    """Options after the first other word are the command's."""
    assert (
        invoke("--memory", "1G", "--timeout", "5s", "--share", str(tmp_path), *separator, "ls", "--memory", "x", "--")
        == 5
    )
    (asked,) = ran
    assert asked.argv == ("ls", "--memory", "x", "--")
    assert (asked.memory_mib, asked.timeout_s, asked.shares) == (1024, 5.0, (str(tmp_path),))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], "nothing to run", id="no command"),
        pytest.param(["--bogus", "--", "ls"], "there is no option '--bogus'", id="unknown option"),
        pytest.param(["--", ""], "the name of a program is empty", id="empty name"),
        pytest.param(["--memory", "much", "--", "ls"], "--memory 'much': write it like 512M or 2G", id="memory"),
        pytest.param(["--memory", "", "--", "ls"], "--memory ''", id="empty memory"),
        pytest.param(["--memory", "10M", "--", "ls"], "needs 256M at least", id="too little memory"),
        pytest.param(["--timeout", "0", "--", "ls"], "--timeout '0': write it like 90s", id="no time"),
        pytest.param(["--share", "/nowhere", "--", "ls"], "--share '/nowhere': there is no such folder", id="share"),
        pytest.param(["--share", "/run", "--", "ls"], "has its own inside", id="share of what is its own"),
    ],
)
def test_bad_input(ran: list[VmRequest], arguments: list[str], words: str) -> None:
    """What is typed wrong is said before anything boots."""
    with pytest.raises(InputError, match=words):
        invoke(*arguments)
    assert not ran


def test_missing_uml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without UML is told which package has it; a user without root, to become root."""
    monkeypatch.setattr(machine.os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine.shutil, "which", lambda program: None)
    with pytest.raises(MissingFeature, match=r"linux\.uml, tini not found.*apt-get install user-mode-linux tini"):
        machine.check_machine()
    monkeypatch.setattr(machine.os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="needs root"):
        machine.check_machine()


def test_deadlines_are_longer_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times in the nested kernel, as they are elsewhere."""
    monkeypatch.delenv(NESTED, raising=False)
    assert patient(10) == 10
    monkeypatch.setenv(NESTED, "1")
    assert patient(10) == 60
