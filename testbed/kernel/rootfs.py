"""A container's own file system: a fresh overlay over the machine's, with what must not be shared replaced.

::

    overlay(lower=/, upper, work in the lab's tmpfs)     written parts are the container's alone
    ├── proc, sys        new mounts: of the container's PID and network namespace
    ├── dev              tmpfs with null zero full random urandom tty, pts, shm
    ├── run, tmp         empty: opaque folders of the upper layer
    ├── etc/hosts …      written into upper before the mount
    └── volumes          bind mounts

The root is entered with pivot_root, not chroot: nsenter and setns land outside a chroot. An overlay over /
leaves out file systems mounted below /, so those that programs need (``keep``) are bound in, read-only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.kernel import linux

_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEVICE_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

_READ_ONLY_PROC = ("bus", "fs", "irq", "sys", "sysrq-trigger")
"""What containerd shows read-only: readonlyPaths of its default specification."""


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory or file to show at ``target`` inside; ``source`` is a path outside."""

    source: str
    target: str
    read_only: bool


def write_upper(upper: str, files: Mapping[str, str]) -> None:
    """Put files (absolute path -> text) into an overlay's upper layer, with the modes that their folders have below it.

    Scripts, which begin with ``#!``, can be executed.
    """
    for path, text in files.items():
        relative = os.path.normpath("/" + path).lstrip("/")
        folder = ""
        for part in Path(relative).parent.parts:
            folder = f"{folder}/{part}"
            if not os.path.isdir(upper + folder):
                os.mkdir(upper + folder, 0o755)
                if os.path.isdir(folder):
                    os.chmod(upper + folder, stat.S_IMODE(os.stat(folder).st_mode))
        with open(f"{upper}/{relative}", "w") as file:
            file.write(text)
            if text.startswith("#!"):
                os.fchmod(file.fileno(), 0o755)


def enter_root(
    folder: str, *, lower: str = "/", binds: Iterable[Bind] = (), keep: Iterable[str] = (), proc: bool = True,
    privileged: bool = False,
) -> None:  # fmt: skip
    """Make the overlay in ``folder`` (upper/ and work/ are there already) the root of this mount namespace.

    The calling process must be alone in a mount namespace of its own, and in the network namespace that /sys is to show
    and, with ``proc``, the PID namespace that /proc is to show. Only with ``privileged`` can kernel settings be written
    (/proc/sys and the like, /sys), as with containerd. Raises OSError naming the mount that failed.
    """
    root = f"{folder}/root"
    os.mkdir(root)
    for path, mode in (("run", 0o755), ("tmp", 0o1777)):
        # Opaque (overlayfs.rst): what the machine has there does not show. Mounts would cost memory in every pod.
        upper = f"{folder}/upper/{path}"
        os.makedirs(upper, exist_ok=True)
        os.chmod(upper, mode)
        os.setxattr(upper, "trusted.overlay.opaque", b"y")
    data = f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work"
    linux.mount("overlay", root, "overlay", 0, data)
    if proc:
        mount_proc(f"{root}/proc", privileged=privileged)
    read_only = 0 if privileged else linux.MS_RDONLY
    linux.mount("sysfs", f"{root}/sys", "sysfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC | read_only)
    _make_dev(f"{root}/dev")
    for path in keep:
        if not os.path.exists(root + path):
            os.makedirs(root + path)
            linux.mount(path, root + path, "", linux.MS_BIND | linux.MS_REC)
            _make_read_only(root + path)
    trees = [(linux.open_tree(bind.source), bind) for bind in binds]
    os.chdir(root)
    linux.pivot_root(".", ".")  # the old root now lies over the new one
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    # Only now, so that a link inside the container cannot lead a mount point out of it.
    for fd, bind in sorted(trees, key=lambda pair: pair[1].target):
        _make_mount_point(bind.target, is_folder=stat.S_ISDIR(os.fstat(fd).st_mode))
        linux.move_mount(fd, bind.target)
        os.close(fd)
        if bind.read_only:
            _make_read_only(bind.target)


def mount_proc(path: str, *, privileged: bool) -> None:
    """Mount a /proc of the calling process's PID namespace; unless ``privileged``, nothing of the kernel is set there."""
    linux.mount("proc", path, "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    if not privileged:
        for name in _READ_ONLY_PROC:
            inside = f"{path}/{name}"
            try:
                linux.mount(inside, inside, "", linux.MS_BIND | linux.MS_REC)
            except FileNotFoundError:  # a kernel without it
                continue
            _make_read_only(inside, linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


def _make_dev(path: str) -> None:
    linux.mount("tmpfs", path, "tmpfs", linux.MS_NOSUID, "mode=0755")
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"{path}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"{path}/{name}", 0o666)
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{path}/{name}")
    for name, mode in (("pts", 0o755), ("shm", 0o1777)):
        os.mkdir(f"{path}/{name}")
        os.chmod(f"{path}/{name}", mode)
    linux.mount(
        "devpts", f"{path}/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"
    )


def _make_mount_point(path: str, *, is_folder: bool) -> None:
    if os.path.exists(path):
        return
    if is_folder:
        os.makedirs(path)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()


def _make_read_only(target: str, flags: int = 0) -> None:
    linux.mount("", target, "", linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | flags)
