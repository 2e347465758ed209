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

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import InputError
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
    """A directory or file to show at ``target`` inside.

    ``source`` is a path outside, and ``below`` one that must not lead out of it: who writes in there is not to be trusted.
    """

    source: str
    target: str
    read_only: bool
    below: str = ""
    makes_folders: bool = False  # of ``below``, where they are not there
    recursive: bool = True  # with what is mounted below
    has_devices: bool = True


def overlay_options(lower: str, upper: str, work: str) -> str:
    """Return the options of an overlay; signs that mean something there are escaped (overlayfs.rst)."""

    def escaped(path: str) -> str:
        return "".join(f"\\{sign}" if sign in "\\,:" else sign for sign in path)

    return f"lowerdir={escaped(lower)},upperdir={escaped(upper)},workdir={escaped(work)}"


def write_upper(upper: str, files: Mapping[str, str]) -> None:
    """Put files (absolute path -> text) into an overlay's upper layer, with the modes that their folders have below it.

    Scripts, which begin with ``#!``, can be executed.
    """
    for path, text in files.items():
        relative = os.path.normpath("/" + path).lstrip("/")
        make_upper_folder(upper, os.path.dirname(f"/{relative}"))
        with open(f"{upper}/{relative}", "w") as file:
            file.write(text)
            if text.startswith("#!"):
                os.fchmod(file.fileno(), 0o755)


def make_upper_folder(upper: str, path: str, *, lower: str = "", is_opaque: bool = False) -> None:
    """Make a folder (an absolute path) in an upper layer, each part with the owner and mode that it has in ``lower``.

    One that is opaque hides what the lower layer has there (overlayfs.rst).
    """
    folder = ""
    for part in Path(path).parts[1:]:
        folder = f"{folder}/{part}"
        if not os.path.isdir(upper + folder):
            os.mkdir(upper + folder, 0o755)
            if os.path.isdir(lower + folder):
                seen = os.stat(lower + folder)
                os.chown(upper + folder, seen.st_uid, seen.st_gid)
                os.chmod(upper + folder, stat.S_IMODE(seen.st_mode))
    if is_opaque:
        os.setxattr(upper + folder, "trusted.overlay.opaque", b"y")


def enter_root(
    folder: str, *, lower: str = "/", binds: Iterable[Bind] = (), keep: Iterable[str] = (), hide: Iterable[str] = (),
    proc: bool = True, privileged: bool = False,
) -> None:  # fmt: skip
    """Make the overlay in ``folder`` (upper/ and work/ are there already) the root of this mount namespace.

    The calling process must be alone in a mount namespace of its own, and in the network namespace that /sys is to show
    and, with ``proc``, the PID namespace that /proc is to show. Only with ``privileged`` can kernel settings be written
    (/proc/sys and the like, /sys), as with containerd. Folders to ``hide`` are empty inside.

    Raises:
        OSError: what the kernel refused, naming the mount.
        InputError: a volume leads out of where it must stay.
    """
    root = f"{folder}/root"
    os.mkdir(root)
    upper = f"{folder}/upper"
    for path, mode in (("/run", 0o755), ("/tmp", 0o1777)):
        # Opaque: what the machine has there does not show. Mounts would cost memory in every pod.
        make_upper_folder(upper, path, is_opaque=True)
        os.chmod(upper + path, mode)
    for path in hide:
        if not path.startswith(("/run/", "/tmp/")):
            make_upper_folder(upper, path, is_opaque=True)
    no_devices = 0 if privileged else linux.MS_NODEV  # the machine may have some outside /dev
    linux.mount("overlay", root, "overlay", no_devices, overlay_options(lower, upper, f"{folder}/work"))
    if proc:
        mount_proc(f"{root}/proc", privileged=privileged)
    read_only = 0 if privileged else linux.MS_RDONLY
    linux.mount("sysfs", f"{root}/sys", "sysfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC | read_only)
    _make_dev(f"{root}/dev")
    for path in keep:
        if not os.path.exists(root + path):
            os.makedirs(root + path)
            linux.mount(path, root + path, "", linux.MS_BIND | linux.MS_REC)
            _restrict(root + path, linux.MS_RDONLY)
    trees = [(_open(bind), bind) for bind in binds]
    os.chdir(root)
    linux.pivot_root(".", ".")  # the old root now lies over the new one
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    # Only now, so that a link inside the container cannot lead a mount point out of it.
    for fd, bind in sorted(trees, key=lambda pair: pair[1].target):
        target = _make_mount_point(bind.target, is_folder=stat.S_ISDIR(os.fstat(fd).st_mode))
        linux.move_mount(fd, target)
        os.close(fd)
        flags = (linux.MS_RDONLY if bind.read_only else 0) | (
            0 if bind.has_devices else linux.MS_NODEV | linux.MS_NOSUID
        )
        if flags:
            _restrict(target, flags)


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
            _restrict(inside, linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


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


def _open(bind: Bind) -> int:
    """Return a detached mount of what is to be shown.

    Raises:
        InputError: it leads out of where it must stay.
    """
    if not bind.below:
        return linux.open_tree(bind.source, recursive=bind.recursive)
    source = os.open(bind.source, os.O_PATH | os.O_CLOEXEC)
    try:
        if bind.makes_folders:
            _make_folders_below(source, bind.below)
        found = linux.open_beneath(source, bind.below)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ELOOP):
            raise InputError(
                f"subPath {bind.below!r} leads out of the volume that is mounted at {bind.target}"
            ) from None
        raise
    finally:
        os.close(source)
    try:
        return linux.open_tree("", at=found, recursive=bind.recursive)
    finally:
        os.close(found)


def _make_folders_below(folder: int, path: str) -> None:
    """Make the folders of a path that are not there, each in one that the kernel has found below ``folder``."""
    parts = Path(path).parts
    for count in range(1, len(parts) + 1):
        try:
            os.close(linux.open_beneath(folder, "/".join(parts[:count])))
        except FileNotFoundError:
            parent = linux.open_beneath(folder, "/".join(parts[: count - 1]) or ".")
            try:
                os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
            finally:
                os.close(parent)


def _make_mount_point(path: str, *, is_folder: bool) -> str:
    """Make what a mount goes onto where it is not there, and return its path without links.

    Raises:
        InputError: it is inside /proc, whose links lead to whatever this process has open (runc's checkProcMount).
    """
    resolved = os.path.realpath(path)
    for seen in (os.path.normpath(path), resolved):
        if f"{seen}/".startswith("/proc/"):
            raise InputError(f"cannot mount at {path!r}: it is inside /proc")
    if os.path.exists(resolved):
        return resolved
    if is_folder:
        os.makedirs(resolved)
    else:
        os.makedirs(os.path.dirname(resolved), exist_ok=True)
        Path(resolved).touch()
    return resolved


def _restrict(target: str, flags: int) -> None:
    linux.mount("", target, "", linux.MS_BIND | linux.MS_REMOUNT | flags)
