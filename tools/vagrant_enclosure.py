"""Namespaces with a libvirt of their own, which reach the outside through user-mode networking.

libvirtd adds LIBVIRT_* chains and bridges, turns on ip_forward, fills /run/libvirt and /var/lib/libvirt. Here it does so in
network, mount and PID namespaces that end with us, also when we are killed -9; the host sees two processes more and a folder::

    host namespaces                        enclosure
    slirp4netns ── tap0 10.0.2.100 ──────▶ libvirtd: virbr1, NAT ── vnet0 ── VM
       its own sockets, as any program     /run empty, /var/lib/libvirt and /etc/libvirt in the scratch folder

slirp4netns forwards from sockets of its own, so neither a veth pair, nor NAT, nor ip_forward is needed outside.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant_steps import WITH_US, StepFailed, Steps

_READY_WITHIN_S = 30.0
_DNS = "10.0.2.3"  # slirp4netns forwards what is asked there to the host's resolver
_TAP = "tap0"
# As root without a security driver: the scratch folder is ours alone, and no profile knows it. Without cgroups: there are none.
_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
remember_owner = 0
"""
_LIBVIRTD_CONF = """\
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enclosure:
    """Namespaces that are kept by a process. ``pid`` is that process, seen from outside."""

    pid: int

    def command(self, argv: Sequence[str | Path], *, cwd: Path = Path("/")) -> list[str]:
        """Return the command that runs another one inside; nsenter itself would start it in /."""
        inside = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i", "--", "env", "-C", str(cwd)]
        return [*inside, *(str(word) for word in argv)]


@contextlib.contextmanager
def open_enclosure(steps: Steps, scratch: Path) -> Iterator[Enclosure]:
    """Make the namespaces, connect them to the outside, start libvirt; end everything that runs in them at the end."""
    with contextlib.ExitStack() as stack:
        kinds = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--propagation", "private"]
        holder = stack.enter_context(
            _running([*WITH_US, "unshare", *kinds, "--kill-child=KILL", "--", "tini", "-s", "--", "sleep", "infinity"])
        )
        enclosure = Enclosure(pid=_only_child(holder.pid))
        for argv in (*_mounts(scratch), ["ip", "link", "set", "lo", "up"]):
            steps.run(enclosure.command(argv), limit_s=10, log="enclosure")
        stack.enter_context(_outside_network(steps, enclosure.pid))
        for argv in (["virtlogd", "-d"], ["libvirtd", "-d"], ["virsh", "-c", "qemu:///system", "version"]):
            steps.run(enclosure.command(argv), limit_s=60, log="enclosure")
        # a pool called default is what vagrant-libvirt puts its images into
        virsh = ["virsh", "-c", "qemu:///system"]
        images = "/var/lib/libvirt/images"
        for argv in (
            ["pool-define-as", "default", "dir", "--target", images],
            ["pool-build", "default"],
            ["pool-start", "default"],
        ):
            steps.run(enclosure.command([*virsh, *argv]), limit_s=30, log="enclosure")
        yield enclosure


def _mounts(scratch: Path) -> Iterator[list[str]]:
    """Put folders of ours in the place of what libvirt writes to, and our resolver in that of the host."""
    settings = scratch / "etc-libvirt"
    settings.mkdir()
    (settings / "qemu.conf").write_text(_QEMU_CONF)
    (settings / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
    (settings / "virtlogd.conf").write_text("")
    (settings / "network.conf").write_text("")
    for target in ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"):
        source = settings if target == "/etc/libvirt" else scratch / target.strip("/").replace("/", "-")
        source.mkdir(exist_ok=True)
        Path(target).mkdir(parents=True, exist_ok=True)
        yield ["mount", "--bind", str(source), target]
    resolver = scratch / "resolv.conf"
    resolver.write_text(f"nameserver {_DNS}\n")
    # where it is a link into /run, its target is made anew in the new /run
    current = Path(os.path.realpath("/etc/resolv.conf"))
    yield ["mount", "-t", "tmpfs", "tmpfs", "/run"]
    if current.is_relative_to("/run"):
        yield ["install", "-D", "-m", "644", str(resolver), str(current)]
    else:
        yield ["mount", "--bind", str(resolver), str(current)]
    yield ["mount", "-t", "sysfs", "sysfs", "/sys"]


@contextlib.contextmanager
def _outside_network(steps: Steps, pid: int) -> Iterator[None]:
    """Give a network namespace a way out: tap0 with an address, a default route and DNS behind it."""
    reader, writer = os.pipe()
    try:
        with (steps.logs / "slirp4netns.log").open("ab") as log:
            argv = [*WITH_US, "slirp4netns", "--configure", "--mtu=1500", f"--ready-fd={writer}", str(pid), _TAP]
            with _running(argv, stdout=log.fileno(), pass_fds=(writer,)):
                os.close(writer)
                writer = -1
                os.set_blocking(reader, False)
                _wait_for(lambda: _read_some(reader), "slirp4netns did not get ready")
                yield
    finally:
        for descriptor in (reader, writer):
            if descriptor >= 0:
                os.close(descriptor)


def _read_some(descriptor: int) -> bool:
    try:
        return bool(os.read(descriptor, 1))
    except BlockingIOError:
        return False


@contextlib.contextmanager
def _running(
    argv: Sequence[str], stdout: int = subprocess.DEVNULL, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Have a program running, in a session of its own; kill it at the end."""
    process = subprocess.Popen(
        list(argv), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout, start_new_session=True, pass_fds=pass_fds
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


def _only_child(pid: int) -> int:
    """Return the one child of a process, once it has one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    _wait_for(
        lambda: bool(children.read_text().split()), "unshare did not start: are you root, and are namespaces allowed?"
    )
    return int(children.read_text().split()[0])


def _wait_for(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise StepFailed(f"{problem} within {_READY_WITHIN_S:.0f} s")
        time.sleep(0.05)
