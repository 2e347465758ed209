"""Boot the project's Vagrantfile with a box built on the spot, run scenarios in the VM, and remove everything.

`./dev vagrant-check` calls this as root. It needs neither a hypervisor (QEMU emulates a processor where there is none) nor
Vagrant Cloud: the box is made by debootstrap and registered under the name of the public one, so that the Vagrantfile finds it
unchanged. All of it lives in one scratch folder and in namespaces that end with this process (vagrant_enclosure.py).

Exit status: 0 all as wanted, 1 something was not, 2 bad arguments, 3 this machine cannot do it, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant_box import (
    BOX_PACKAGES,
    debootstrap,
    find_mirror,
    make_bootable,
    make_image,
    pack_box,
    register_metadata,
    save_time,
)
from vagrant_enclosure import Enclosure, open_enclosure
from vagrant_steps import StepFailed, Steps, interrupt_on

PROJECT = Path(__file__).resolve().parent.parent
PREFIX = "testbed-vagrant-check-"
BOX_NAME = "debian/bookworm64"  # what the Vagrantfile asks for with libvirt on amd64
TOOLS = ("debootstrap", "vagrant", "libvirtd", "virtlogd", "virsh", "qemu-system-x86_64", "qemu-img", "mkfs.ext4",
         "grub-mkimage", "slirp4netns", "rsync", "ssh", "tini", "setpriv", "unshare", "nsenter")  # fmt: skip
MODULES = ("ip_vs", "ip_vs_rr", "ip_vs_sh", "sch_netem", "dummy")
# For an emulated processor on a machine that is busy with other things: there apt and pip took half an hour and more.
UP_LIMIT_S = 7200.0
RELOAD_LIMIT_S = 1800.0
SCENARIO_LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for. ``box``: a file that is used if it exists, and made if it does not; None: one that is thrown away."""

    mode: str
    scenarios: tuple[str, ...]
    driver: str
    cpus: int
    memory_mb: int
    scratch: Path
    logs: Path
    box: Path | None
    cache: Path | None


def main(argv: Sequence[str]) -> int:
    """Do it; return the exit status."""
    plan = _parse(argv)
    if problems := _missing():
        print("; ".join(problems), file=sys.stderr)
        return 3
    interrupt_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    plan.logs.mkdir(parents=True)
    # what is set here for other VMs is not what is checked
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VAGRANT_", "TESTBED_VM_", "LIBVIRT_"))
    }
    steps = Steps(logs=plan.logs, env=env)
    before = host_traces()
    status = 1
    try:
        with _scratch_folder(plan.scratch) as scratch:
            box = _box(steps, plan, scratch)
            with open_enclosure(steps, scratch) as enclosure:
                _vagrant(steps, plan, scratch, box, enclosure)
        status = 0
    except (StepFailed, OSError, ValueError) as error:
        steps.say(f"vagrant-check: {error}")
    except KeyboardInterrupt as interrupt:
        steps.say(f"vagrant-check: interrupted ({interrupt})")
        status = 130
    if left := sorted(host_traces() - before):
        steps.say(f"vagrant-check: left behind: {', '.join(left)}")
        status = status or 1
    else:
        steps.say("nothing is left behind: no process, link, chain, mount, pool, box or folder")
    for timing in steps.timings:
        steps.say(f"  {timing.duration_s:6.0f} s  {timing.title}")
    steps.say(f"vagrant-check {'passed' if status == 0 else 'FAILED'}; logs: {plan.logs}")
    return status


# ── before and after ────────────────────────────────────────────────────────────────────────────────────────────────


def _parse(argv: Sequence[str]) -> Plan:
    parser = argparse.ArgumentParser(
        prog="./dev vagrant-check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--proxy-mode", default="ipvs", choices=("ipvs", "iptables", "nftables", "userspace"),
                        help="of scenarios/quickstart in the VM; default ipvs")  # fmt: skip
    parser.add_argument("--scenario", action="append", metavar="NAME", default=[],
                        help="another scenario to run there, besides quickstart and delay; may be repeated")  # fmt: skip
    parser.add_argument("--driver", default="auto", choices=("auto", "kvm", "qemu"),
                        help="qemu emulates the processor; auto takes kvm where the processor has it")  # fmt: skip
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="where the scratch folder is made; 8 GB")
    parser.add_argument(
        "--logs", type=Path, default=PROJECT / "reports" / "vagrant-check", help="each run has a folder there"
    )
    parser.add_argument("--box", type=Path, metavar="FILE", help="keep the box there, or use the one that is there")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the packages of debootstrap there")
    given = parser.parse_args(argv)
    names = tuple(dict.fromkeys(given.scenario))
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or not (PROJECT / "scenarios" / name).is_dir():
            parser.error(f"there is no scenario {name!r} in scenarios/")
    if not given.scratch.is_dir():
        parser.error(f"--scratch: there is no folder {str(given.scratch)!r}")
    if given.cpus < 1 or given.memory < 1024:
        parser.error("the VM needs a CPU and 1024 MiB")
    return Plan(
        mode=given.proxy_mode, scenarios=names, driver=_choose_driver(given.driver), cpus=given.cpus,
        memory_mb=given.memory, scratch=given.scratch.resolve(), logs=given.logs.resolve() / time.strftime("%Y%m%d-%H%M%S"),
        box=given.box and given.box.resolve(), cache=given.cache and given.cache.resolve(),
    )  # fmt: skip


def _choose_driver(wanted: str) -> str:
    """Return kvm where /dev/kvm opens and the processor says that it can: there are kernels with the one and not the other."""
    if wanted != "auto":
        return wanted
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "kvm" if flags & {"vmx", "svm"} and os.access("/dev/kvm", os.R_OK | os.W_OK) else "qemu"


def _missing() -> list[str]:
    """Return why this machine cannot do it."""
    problems = []
    if os.geteuid() != 0:
        problems.append("vagrant-check needs root (debootstrap, namespaces)")
    if platform.machine() != "x86_64":
        problems.append(f"vagrant-check builds a box for amd64; this machine is {platform.machine()}")
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        problems.append(f"not installed: {', '.join(absent)}; `./dev vagrant-check` installs what is missing")
    return problems


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """Have a folder, and remove it at the end; those whose makers were killed before they could are removed first."""
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (old / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held: its maker is at work
            shutil.rmtree(old)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder)


def host_traces() -> set[str]:
    """Return what libvirt, debootstrap and QEMU would leave on the host: links, chains, settings, folders, mounts, processes."""
    traces = {
        f"link {path.name}" for path in Path("/sys/class/net").iterdir() if re.match(r"virbr|vnet|tap", path.name)
    }
    for command in (["iptables-save"], ["ip6tables-save"]):
        saved = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        traces |= {f"chain {word}" for word in re.findall(r"^:(LIBVIRT_\S+)", saved, re.MULTILINE)}
    traces |= {f"ip_forward={Path('/proc/sys/net/ipv4/ip_forward').read_text().strip()}"}
    folders = [Path("/run/libvirt"), Path.home() / ".vagrant.d", PROJECT / ".vagrant"]
    folders += Path("/var/lib/libvirt").glob("*/*")
    traces |= {f"folder {path}" for path in folders if path.exists()}
    traces |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if PREFIX in line}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if PREFIX in line:
                traces.add(f"process {process.name} ({line.strip()[:60]})")
    return traces


# ── the box ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _box(steps: Steps, plan: Plan, scratch: Path) -> Path:
    """Return a box, built in the scratch folder or kept from before."""
    if plan.box is not None and plan.box.exists():
        steps.say(f"the box is {plan.box}, made before")
        return plan.box
    root, image_folder = scratch / "root", scratch / "image"
    image_folder.mkdir()
    mirror = find_mirror()
    with steps.step(f"a Debian 12 root from {mirror.main}"):
        debootstrap(steps, root, BOX_PACKAGES, mirror, plan.cache)
    with steps.step("a disk image that boots it"):
        make_bootable(steps, root, mirror)
        if plan.driver == "qemu":
            save_time(root)
        image = make_image(steps, root, image_folder)
        shutil.rmtree(root)
    box = plan.box or scratch / "testbed.box"
    with steps.step(f"a box with it, driver {plan.driver}"):
        unfinished = box.with_name(f"{box.name}.part")
        pack_box(image, plan.driver, unfinished)
        unfinished.rename(box)
        shutil.rmtree(image_folder)
    return box


# ── Vagrant ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Vagrant:
    """Vagrant, run in the enclosure, with a home and a folder of machines of its own."""

    steps: Steps
    enclosure: Enclosure
    env: Mapping[str, str]

    def __call__(self, *words: str | Path, limit_s: float, log: str, show: bool = False) -> str:
        """Run a vagrant command; return what it printed."""
        argv = self.enclosure.command(["vagrant", *words], cwd=PROJECT)
        return self.steps.run(argv, limit_s=limit_s, log=log, env=self.env, show=show)

    def ssh(self, command: str, *, limit_s: float, log: str, show: bool = True) -> str:
        """Run a command line in the VM; return what it printed."""
        return self("ssh", "-c", command, limit_s=limit_s, log=log, show=show)


def _vagrant(steps: Steps, plan: Plan, scratch: Path, box: Path, enclosure: Enclosure) -> None:
    """Go through the life of the VM, as its user would."""
    home = scratch / "home"
    home.mkdir()
    env = {
        "HOME": str(home), "VAGRANT_HOME": str(home / "vagrant.d"), "VAGRANT_DOTFILE_PATH": str(home / "machines"),
        "VAGRANT_DEFAULT_PROVIDER": "libvirt", "VAGRANT_CHECKPOINT_DISABLE": "1", "VAGRANT_NO_COLOR": "1",
        "TESTBED_VM_CPUS": str(plan.cpus), "TESTBED_VM_MEMORY": str(plan.memory_mb),
    }  # fmt: skip
    vagrant = Vagrant(steps=steps, enclosure=enclosure, env=env)
    with steps.step("vagrant validate"):
        vagrant("validate", limit_s=120, log="validate")
    with steps.step(f"vagrant box add, as {BOX_NAME}"):
        register_metadata(BOX_NAME, box, scratch / "metadata.json")
        vagrant("box", "add", "--provider", "libvirt", scratch / "metadata.json", limit_s=300, log="box-add")
    with steps.step("vagrant up, which provisions"):
        vagrant("up", limit_s=UP_LIMIT_S, log="up")
    with steps.step("vagrant reload: what is loaded at boot"):
        vagrant("reload", limit_s=RELOAD_LIMIT_S, log="reload")
        loaded = vagrant.ssh("uname -sr; lsmod", limit_s=120, log="modules", show=False)
        steps.say(f"  {loaded.splitlines()[0]}; loaded: {', '.join(_loaded(loaded))}")
        if absent := [module for module in MODULES if module not in _loaded(loaded)]:
            raise StepFailed(
                f"after a reload the VM has not loaded {', '.join(absent)}; see {steps.logs / 'modules.log'}"
            )
    with steps.step("vagrant ssh -c 'testbed --version'"):
        vagrant.ssh("cd testbed && sudo testbed --version", limit_s=300, log="version")
    # where the processor is emulated, deadlines are longer
    sudo = "sudo TESTBED_PATIENCE=10" if plan.driver == "qemu" else "sudo"
    with steps.step(f"./dev demo in {plan.mode} mode, on the VM's own kernel"):
        vagrant.ssh(
            f"cd testbed && {sudo} ./dev demo --proxy-mode {plan.mode}", limit_s=SCENARIO_LIMIT_S, log="quickstart"
        )
    for name in ("delay", *plan.scenarios):
        with steps.step(f"scenarios/{name}"):
            vagrant.ssh(f"cd testbed && {sudo} testbed run scenarios/{name}", limit_s=SCENARIO_LIMIT_S, log=name)
    with steps.step("a capture in the VM, read on the host, as docs/vagrant.md has it"):
        vagrant.ssh(f"{sudo} testbed up capture", limit_s=300, log="capture")
        ping = "sudo testbed exec -l capture client -- ping -c 100 -i 0.5 192.168.93.11 >/dev/null"
        dump = "sudo testbed exec -l capture node1 -- tcpdump -i any -U -c 4 -w - icmp 2>/dev/null"
        argv = enclosure.command(["vagrant", "ssh", "--no-tty", "-c", f"{ping} & {dump}"], cwd=PROJECT)
        capture = scratch / "node1.pcap"
        to_file = ["sh", "-c", 'file=$1; shift; exec "$@" >"$file"', "sh", str(capture)]
        steps.run([*to_file, *argv], limit_s=300, log="capture", env=env)
        read = steps.run(["tcpdump", "-nr", capture], limit_s=30, log="capture", show=True)
        if read.count("ICMP echo") != 4:
            raise StepFailed(f"the capture holds something else than 4 ICMP packets: see {steps.logs / 'capture.log'}")
        vagrant.ssh("sudo testbed down capture", limit_s=120, log="capture")
    with steps.step("vagrant provision again changes nothing"):
        again = vagrant("provision", limit_s=RELOAD_LIMIT_S, log="provision-again")
        if "writes " in again or "installing" in again:
            raise StepFailed(f"provisioning twice is not the same as once: see {steps.logs / 'provision-again.log'}")
    with steps.step("vagrant destroy, vagrant box remove"):
        vagrant("destroy", "-f", limit_s=300, log="destroy")
        vagrant("box", "remove", "--all", BOX_NAME, limit_s=120, log="destroy")


def _loaded(lsmod: str) -> list[str]:
    """Return the modules of ours that ``lsmod`` lists."""
    names = {line.split()[0] for line in lsmod.splitlines() if line.strip()}
    return [module for module in MODULES if module in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
