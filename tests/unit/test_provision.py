"""What tools/provision.sh does to a machine, and ./dev in one: files, calls, and nothing the second time.

It runs in a root of its own: an overlay over this machine's, whose written part is thrown away. The real thing, with apt and pip,
is tests/kernel/test_provision_in_debian.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[2]
PROVISION = PROJECT / "tools" / "provision.sh"
SCRIPTS = [PROVISION, PROJECT / "dev", PROJECT / ".ci" / "run"]
FILES = ["/etc/modprobe.d/testbed.conf", "/etc/modules-load.d/testbed.conf", "/etc/testbed/venv"]
# "$1" is the folder of the root, the rest is run in it
ENTER = """
mount -t tmpfs tmpfs "$1" && mkdir "$1/upper" "$1/work" "$1/root" &&
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root" &&
mount -t tmpfs tmpfs "$1/root/run" && mount --rbind /proc "$1/root/proc" && mount --rbind /dev "$1/root/dev" &&
mount --rbind SHARED "$1/root/mnt" && root="$1/root" && shift && exec chroot "$root" sh -c "$@"
"""


class Ended(NamedTuple):
    """How a program ended."""

    status: int
    out: str
    err: str


def run(*argv: str | Path) -> Ended:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    """Bash can read every script, and shellcheck, where it is installed, finds nothing."""
    assert run("bash", "-n", script) == (0, "", "")
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian package shellcheck)")
    assert run("shellcheck", script) == (0, "", "")


def test_steps_can_be_printed() -> None:
    """--print gives a script with every step, in order, and does none of them."""
    ended = run(PROVISION, "--print", "/srv/a project/testbed")
    assert (ended.status, ended.err) == (0, "")
    assert subprocess.run(["bash", "-n"], input=ended.out, text=True, timeout=10, check=False).returncode == 0
    lines = ended.out.splitlines()
    steps = [line for line in lines if line.startswith(("cat >", "modprobe", "chmod")) or line.endswith("setup ")]
    assert [line.partition(" ip_vs ")[0] for line in steps] == [
        "cat >/etc/testbed/venv <<EOF",
        "cat >/etc/modules-load.d/testbed.conf <<EOF",
        "cat >/etc/modprobe.d/testbed.conf <<EOF",
        "modprobe -a",
        r"chmod a+x /srv/a\ project ",
        "chmod a+x /srv ",
        r"/srv/a\ project/testbed/dev setup ",
    ]
    assert {"ip_vs", "ip_vs_rr", "ip_vs_sh", "ip_vs_mh", "sch_netem", "dummy"} <= set(lines)


def test_files_below_another_root(tmp_path: Path) -> None:
    """--root writes files alone, and none a second time."""
    first = run(PROVISION, "--root", tmp_path, "/home/vagrant/testbed")
    assert first.status == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert [f"/{name}" for name in written] == FILES
    assert (tmp_path / "etc/testbed/venv").read_text() == "/opt/testbed/venv\n"
    modules = (tmp_path / "etc/modules-load.d/testbed.conf").read_text().splitlines()
    assert modules[1:] == sorted(set(modules[1:]), key=modules.index)  # no module twice
    assert (tmp_path / "etc/modprobe.d/testbed.conf").read_text().splitlines()[-1] == "options dummy numdummies=0"
    assert first.err.count("writes ") == len(FILES)
    assert run(PROVISION, "--root", tmp_path, "/home/vagrant/testbed").err == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--all"], "there is no option '--all'; see --help"),
        (["--root"], "--root needs a folder"),
        (["--root", "/nowhere"], "--root: there is no folder '/nowhere'"),
        (["/a", "/b"], "one project, not both '/a' and '/b'"),
        (["testbed"], "the project's folder is given from / on, not 'testbed'"),
        (["/nowhere"], "there is no /nowhere/dev: is the project's folder mounted there?"),
    ],
)
def test_what_is_refused(arguments: Sequence[str], problem: str) -> None:
    """A mistake is told in one line, before anything is done."""
    if os.geteuid() != 0 and arguments == ["/nowhere"]:
        problem = "needs root: run it with sudo"
    assert run(PROVISION, *arguments) == (2, "", f"provision: {problem}\n")


def in_overlay(tmp_path: Path, script: str) -> Ended:
    """Run a shell script in an overlay over this machine's root; /mnt is ``tmp_path``."""
    if os.geteuid() != 0:
        pytest.skip("needs root (an overlay as root file system)")
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    enter = ENTER.replace("SHARED", shlex.quote(str(tmp_path)))
    return run("unshare", "--mount", "--propagation", "private", "sh", "-c", enter, "sh", place, script)


def fake_project(tmp_path: Path) -> Path:
    """Return a project whose ./dev only writes down how it was called, seen at /mnt/home/me/testbed in the overlay."""
    project = tmp_path / "home" / "me" / "testbed"
    project.mkdir(parents=True)
    (project / "dev").write_text('#!/bin/sh\necho "$0 $*" >>/mnt/calls\n')
    (project / "dev").chmod(0o755)
    (tmp_path / "home").chmod(0o700)
    return project


def test_provisioning_a_machine(tmp_path: Path) -> None:
    """Files are written, the way to the project opened, ./dev setup called; in a chroot no module is loaded; twice is once."""
    fake_project(tmp_path)
    command = f"{shlex.quote(str(PROVISION))} /mnt/home/me/testbed"
    ended = in_overlay(
        tmp_path, f"{command} && echo again >&2 && {command} && cat /etc/testbed/venv && ls /etc/modules-load.d"
    )
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[0] == "/opt/testbed/venv"
    assert "testbed.conf" in ended.out
    first, _, second = ended.err.partition("again\n")
    assert first.count("writes ") == len(FILES)
    assert "writes " not in second
    assert "provision: this system is not booted (by systemd): the modules come when it is\n" in first
    assert "modprobe -a" not in ended.err
    assert (tmp_path / "calls").read_text() == "/mnt/home/me/testbed/dev setup\n" * 2
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o711
    assert ended.err.splitlines()[-1] == "provision: ready: cd /mnt/home/me/testbed && sudo ./dev demo"
    assert not Path("/etc/testbed").exists() or PROJECT.is_relative_to("/home/vagrant")  # this machine was left alone


def test_a_failing_setup_fails_provisioning(tmp_path: Path) -> None:
    """Then `vagrant up` fails as well."""
    (fake_project(tmp_path) / "dev").write_text("#!/bin/sh\nexit 7\n")
    ended = in_overlay(tmp_path, f"{shlex.quote(str(PROVISION))} /mnt/home/me/testbed")
    assert ended.status == 7
    assert "ready" not in ended.err


FAKE_PYTHON = '#!/bin/sh\necho "$@" >>/mnt/python-calls\n'


@pytest.mark.parametrize(
    ("prepare", "venv"),
    [
        ("mkdir -p /etc/testbed; echo /opt/testbed/venv >/etc/testbed/venv", "/opt/testbed/venv"),
        ("export TESTBED_VENV=/opt/other", "/opt/other"),
        ("rm -rf /etc/testbed", "/mnt/project/.venv"),
    ],
    ids=["of a provisioned VM", "of the environment", "of a host"],
)
def test_each_machine_has_its_own_venv(tmp_path: Path, prepare: str, venv: str) -> None:
    """./dev uses the virtual environment of the machine that it runs on, and leaves that of the other one alone."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("dev", "setup.cfg", "pyproject.toml"):
        shutil.copy(PROJECT / name, project / name)
    for folder in ("/opt/testbed/venv", "/opt/other", "/mnt/project/.venv"):
        prepare += f"; mkdir -p {folder}/bin; cp /mnt/python {folder}/bin/python"
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    # what setup would install is not what is tested
    prepare += "; printf '#!/bin/sh\\nexit 1\\n' >/usr/bin/apt-cache; printf '#!/bin/sh\\n' >/usr/bin/apt-get"
    command = "/mnt/project/dev setup && readlink /usr/local/bin/testbed && ls -d /opt/*/stamp /opt/testbed/venv/stamp"
    ended = in_overlay(tmp_path, f"{prepare}; {command}; ls -a /mnt/project/.venv")
    assert ended.out.splitlines()[0] == f"{venv}/bin/testbed", ended.err
    stamps = [line for line in ended.out.splitlines() if line.endswith("stamp")]
    assert stamps == ["stamp" if venv == "/mnt/project/.venv" else f"{venv}/stamp"]
    assert "-m pip install" in (tmp_path / "python-calls").read_text()
