"""What `./dev vagrant-check` decides, and how it ends; the Vagrantfile's choices. The real boot is ./dev vagrant-check itself."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "tools"))

import vagrant_box  # noqa: E402
import vagrant_check  # noqa: E402
from vagrant_steps import StepFailed, Steps  # noqa: E402

DEBIAN = """\
Debian bookworm http://mirror.example/debian/
Debian bookworm-updates http://mirror.example/debian/
Debian bookworm-security http://mirror.example/debian-security/
nodesource nodistro https://deb.nodesource.com/node_20.x/
"""


@pytest.mark.parametrize(
    ("targets", "wanted", "main", "security"),
    [
        (DEBIAN, "", "http://mirror.example/debian", "http://mirror.example/debian-security"),
        ("Ubuntu noble http://archive.ubuntu.com/ubuntu/\n", "", "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"),
        ("Debian trixie http://mirror.example/debian/\n", "", "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"),
        ("Debian bookworm file:/srv/debian/\n", "", "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"),
        (DEBIAN, "http://other.example/debian/", "http://other.example/debian", "http://mirror.example/debian-security"),
        ("", "http://other.example/debian", "http://other.example/debian", "http://other.example/debian-security"),
    ],
    ids=["this machine's", "Ubuntu", "another release", "files", "as told", "as told, on Ubuntu"],
)  # fmt: skip
def test_where_packages_come_from(targets: str, wanted: str, main: str, security: str) -> None:
    """This machine's mirror of the VM's release, else Debian's own; what is asked for wins."""
    assert vagrant_box.choose_mirror(targets, wanted) == vagrant_box.Mirror(main=main, security=security)


def test_what_apt_is_told() -> None:
    """How mirrors are reached from here goes into the box; what is about this machine's own packages does not."""
    dump = (
        'Acquire "";\nAcquire::http "";\nAcquire::http::Proxy "http://proxy:3128";\nAcquire::https::CAInfo "/etc/ssl/x.pem";\n'
        'Acquire::Check-Valid-Until "false";\nAcquire::Languages "none";\nAcquire::AllowInsecureRepositories "0";\n'
    )
    assert vagrant_box.apt_site_settings(dump) == (
        'Acquire::http::Proxy "http://proxy:3128";\nAcquire::https::CAInfo "/etc/ssl/x.pem";\n'
        'Acquire::Check-Valid-Until "false";\n'
    )


@pytest.mark.parametrize(
    ("listing", "has_own_authorities", "config"),
    [
        ("", False, "[global]\n"),
        ("", True, "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n"),
        ("global.index-url='https://pypi.example/simple'\n:env:.default-timeout='180'\n", False,
         "[global]\nindex-url = https://pypi.example/simple\ntimeout = 180\n"),
        ("global.extra-index-url='file:///opt/simple https://b.example/simple'\nglobal.find-links='/opt/wheels'\n", False,
         "[global]\nextra-index-url = https://b.example/simple\n"),
        ("global.extra-index-url='file:///opt/simple'\nuser.cert='/home/me/ca.pem'\n", False, "[global]\n"),
    ],
    ids=["nothing", "own authorities", "an index", "folders stay here", "files stay here"],
)  # fmt: skip
def test_what_pip_is_told(listing: str, has_own_authorities: bool, config: str) -> None:
    """Indexes that the VM can reach, and the system's authorities where the site has its own."""
    assert vagrant_box.pip_site_settings(listing, has_own_authorities=has_own_authorities) == config


def test_boot_sectors() -> None:
    """GRUB's code, one active Linux partition behind it, the signature, then core.img from sector 1 on."""
    core = b"C" * 3000
    written = vagrant_box.boot_sectors(b"B" * 512, core, 1000)
    assert written[:440] == b"B" * 440
    assert written[440:446] == b"TBED\0\0"
    active, kind, first, sectors = struct.unpack("<B3xB3xII", written[446:462])
    assert (active, kind, first, sectors) == (0x80, 0x83, 2048, 1000)
    assert written[462:510] == bytes(48)
    assert written[510:512] == b"\x55\xaa"
    assert written[512:] == core


def test_boot_sectors_that_do_not_fit() -> None:
    """core.img must end before the partition begins."""
    with pytest.raises(ValueError, match=r"core.img has 1048577 bytes, and 1048064 are free before the partition"):
        vagrant_box.boot_sectors(bytes(512), bytes(2**20 + 1), 1)


def test_box_is_registered_under_a_public_name(tmp_path: Path) -> None:
    """The metadata names the file, as `vagrant box add` reads it."""
    box = tmp_path / "a box.box"
    vagrant_box.register_metadata("debian/bookworm64", box, tmp_path / "metadata.json")
    document = json.loads((tmp_path / "metadata.json").read_text())
    assert document["name"] == "debian/bookworm64"
    assert document["versions"][0]["providers"] == [{"name": "libvirt", "url": box.as_uri()}]


# ── running and ending ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    """Steps with their logs in a folder."""
    return Steps(logs=tmp_path)


def test_a_step_that_passes(steps: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    """Its output is returned and kept; what it was and how long it took is told."""
    with steps.step("say hello"):
        assert steps.run(["echo", "hello"], limit_s=10, log="hello") == "hello\n"
    assert (steps.logs / "hello.log").read_text() == "$ echo hello\nhello\n"
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "▸ say hello"
    assert out.splitlines()[1].startswith("✓ say hello ")
    assert (steps.logs / "summary.log").read_text() == out
    assert [timing.title for timing in steps.timings] == ["say hello"]


def test_a_step_that_fails(steps: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the command to paste, the status, the log and its end, without colours."""
    with pytest.raises(StepFailed) as failed, steps.step("list"):
        steps.run(["sh", "-c", "printf '\\033[31mno way\\033[0m\\n'; exit 3"], limit_s=10, log="list")
    message = str(failed.value)
    assert message.startswith("sh -c ")
    assert f"ended with status 3; its log {steps.logs / 'list.log'} ends with\n    no way" in message
    assert capsys.readouterr().out.splitlines()[1].startswith("✗ list ")


def test_a_step_that_takes_too_long(steps: Steps, eventually: Callable[..., object]) -> None:
    """It is ended with all it started, and the last thing it said is told."""
    with pytest.raises(StepFailed, match=r"did not end within 1 s; last line of .*/slow\.log: begun"):
        steps.run(["sh", "-c", "echo begun; sleep 97531 & wait"], limit_s=1, log="slow")

    def is_gone() -> bool:
        done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, timeout=60, check=True)
        return "sleep 97531" not in done.stdout.splitlines()

    eventually(is_gone)


def test_scratch_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    """A run that was killed -9 leaves a folder, which the next one removes; that of one at work stays."""
    dead = tmp_path / f"{vagrant_check.PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    with vagrant_check._scratch_folder(tmp_path) as first:
        assert not dead.exists()
        with vagrant_check._scratch_folder(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def check(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "tools" / "vagrant_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scenario", "nope"], "there is no scenario 'nope' in scenarios/"),
        (["--scenario", "../x"], "there is no scenario '../x' in scenarios/"),
        (["--scratch", "/nowhere"], "--scratch: there is no folder '/nowhere'"),
        (["--cpus", "0"], "the VM needs a CPU and 1024 MiB"),
        (["--proxy-mode", "x"], "argument --proxy-mode: invalid choice: 'x'"),
    ],
)
def test_bad_arguments(arguments: list[str], problem: str) -> None:
    """They are told in one line, with status 2, before anything is made."""
    ended = check(*arguments)
    assert ended.returncode == 2
    assert problem in ended.stderr.splitlines()[-1]


def test_missing_tools(tmp_path: Path) -> None:
    """What is not installed is named; status 3."""
    ended = check("--scratch", str(tmp_path), "--logs", str(tmp_path), PATH=str(tmp_path))
    assert ended.returncode == 3
    assert "not installed: debootstrap, vagrant, libvirtd" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupted(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    """Ctrl-C and SIGTERM remove what was made, and are told; status 130."""
    if missing := vagrant_check._missing():
        pytest.skip("; ".join(missing))
    folder = tmp_path / "tools"
    folder.mkdir()
    # its arguments: variant, packages, release, folder, mirror
    (folder / "debootstrap").write_text('#!/bin/sh\nmkdir "$4"; sleep 97532\n')
    (folder / "debootstrap").chmod(0o755)
    scratch, logs = tmp_path / "scratch", tmp_path / "logs"
    scratch.mkdir()
    command = [
        sys.executable,
        str(PROJECT / "tools" / "vagrant_check.py"),
        "--scratch",
        str(scratch),
        "--logs",
        str(logs),
    ]
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            eventually(lambda: list(scratch.glob("*/root")) or process.poll(), within_s=20)
            process.terminate()
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "vagrant-check: interrupted (SIGTERM)" in out
    assert "nothing is left behind" in out
    assert list(scratch.iterdir()) == []
    assert len(list(logs.glob("*/debootstrap.log"))) == 1


# ── the Vagrantfile ─────────────────────────────────────────────────────────────────────────────────────────────────

#: Stands for Vagrant: it writes down what is set, for one provider and one kind of processor.
RUBY = """
require "json"
require "rbconfig"
RbConfig::CONFIG["host_cpu"] = ARGV[1]
class Recorder
  def initialize(seen) = @seen = seen
  def provider(name, &block) = (block.call(Recorder.new(@seen["provider"] ||= {}), self_config) if name == ARGV[0])
  def self_config = $config
  def vm = $vm
  def synced_folder(from, to, **options) = (@seen["folders"] ||= []) << [from, to, options]
  def provision(kind, **options) = @seen["provision"] = [kind, options]
  def method_missing(name, *values) = name.to_s.end_with?("=") ? @seen[name.to_s.chomp("=")] = values[0] : super
end
class Config
  def vm = $vm
end
module Vagrant
  module Errors; class VagrantError < StandardError; end; end
  def self.configure(_version)
    $seen = {}
    $vm, $config = Recorder.new($seen), Config.new
    yield $config
  end
end
load ARGV[2]
puts $seen.to_json
"""


def vagrantfile(provider: str, cpu: str, env: Mapping[str, str] | None = None) -> Any:
    """Return what the Vagrantfile sets, or the text of the error."""
    if shutil.which("ruby") is None:
        pytest.skip("ruby is not installed (it comes with vagrant)")
    done = subprocess.run(
        ["ruby", "-e", RUBY, provider, cpu, str(PROJECT / "Vagrantfile")], capture_output=True, text=True, timeout=30,
        check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    ("provider", "cpu", "box", "provider_settings"),
    [
        ("virtualbox", "x86_64", "debian/bookworm64", {"cpus": 2, "memory": 4096}),
        ("virtualbox", "arm64", "bento/debian-12", {"cpus": 2, "memory": 4096}),
        ("libvirt", "x86_64", "debian/bookworm64", {"cpus": 2, "memory": 4096}),
        ("libvirt", "aarch64", "cloud-image/debian-12", {"cpus": 2, "memory": 4096}),
        ("qemu", "x86_64", "cloud-image/debian-12", {"smp": "2", "memory": "4096M", "arch": "x86_64"}),
        ("qemu", "arm64", "cloud-image/debian-12", {"smp": "2", "memory": "4096M", "arch": "aarch64"}),
    ],
)
def test_which_box(provider: str, cpu: str, box: str, provider_settings: Mapping[str, Any]) -> None:
    """Every provider has a box for either kind of processor, and the size of the VM."""
    seen = vagrantfile(provider, cpu)
    assert seen["box"] == box
    assert provider_settings.items() <= seen["provider"].items()


def test_what_is_set_by_the_environment() -> None:
    """CPUs, memory, box and the kind of folder."""
    env = {"TESTBED_VM_CPUS": "4", "TESTBED_VM_MEMORY": "8192", "TESTBED_VM_BOX": "my/box", "TESTBED_VM_SYNC": "9p"}
    seen = vagrantfile("libvirt", "x86_64", env)
    assert (seen["provider"], seen["box"]) == ({"cpus": 4, "memory": 8192}, "my/box")
    assert seen["folders"][1] == [".", "/home/vagrant/testbed", {"type": "9p"}]


@pytest.mark.parametrize("text", ["0", "two", "-1", "", "1.5"])
def test_sizes_that_are_none(text: str) -> None:
    """They are refused with their name, before a VM is made."""
    assert f'TESTBED_VM_CPUS="{text}" is not a whole number above 0' in vagrantfile(
        "libvirt", "x86_64", {"TESTBED_VM_CPUS": text}
    )


def test_the_project_in_the_vm() -> None:
    """It is copied without what belongs to this machine, and provisioned by the one script."""
    seen = vagrantfile("libvirt", "x86_64")
    assert seen["folders"][0] == [".", "/vagrant", {"disabled": True}]
    source, target, options = seen["folders"][1]
    assert (source, target, options["type"]) == (".", "/home/vagrant/testbed", "rsync")
    assert {".venv", ".git", "reports"} <= set(options["rsync__exclude"])
    assert seen["provision"] == ["shell", {"path": "tools/provision.sh", "args": [target]}]
