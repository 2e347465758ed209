"""hostPath volumes: paths of a node, without a way for a pod to change the machine's own files.

::

    /etc, /run, the API's socket     the node's own: pods share them with the node and with each other
    /proc, /sys, /dev                the kernel's: read-only, and no device opens, unless the container is privileged
    the lab's own folder             refused
    everything else                  an overlay over the machine's, one for each node and folder: what a pod writes there,
                                     other pods of that node see, and the machine does not

An overlay shows one file system: what is mounted below the folder is left out. No volume shows what is in the lab's
folder, whose sockets obey whoever can open them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import InputError, KernelError
from testbed.kernel import linux
from testbed.kernel.netns import inside_mounts
from testbed.kernel.rootfs import make_upper_folder, overlay_options
from testbed.kubelet.runtime import Volume

_OWN = ("/etc", "/run")  # what OutsideHost.set_up has mounted for each machine
_KERNEL = ("/proc", "/sys", "/dev")

#: type -> whether a mode is one, and the kubelet's word for it (kubernetes pkg/volume/hostpath/host_path.go, v1.30)
_KINDS = {
    "Directory": (stat.S_ISDIR, "directory"),
    "File": (stat.S_ISREG, "file"),
    "Socket": (stat.S_ISSOCK, "socket file"),
    "CharDevice": (stat.S_ISCHR, "character device"),
    "BlockDevice": (stat.S_ISBLK, "block device"),
}


@dataclass(frozen=True, slots=True)
class HostPath:
    """A path of the node as containers get it; ``is_kernels``: it is no file system that could be copied on write."""

    source: str
    is_kernels: bool


class HostPaths:
    """What the hostPath volumes of a lab's nodes are made of. For a process with one thread: it enters the node's mounts."""

    def __init__(self, lab_folder: str, private_folder: str) -> None:
        self._lab_folder = os.path.realpath(lab_folder)
        self._private = private_folder
        self._copies: dict[tuple[str, str], str] = {}  # node, folder -> where its overlay is mounted, in the node

    def find(self, node: str, node_pidfd: int, volume: Volume) -> HostPath:
        """Return where a hostPath volume is found in the node's mount namespace; what its type says is made is made.

        Raises:
            InputError: it is the lab's own.
            KernelError: it is not what its type says, or the kernel makes no overlay of it.
        """
        with inside_mounts(node_pidfd):
            path = os.path.realpath(volume.host_path)
            if _is_below(path, self._lab_folder) and not _is_below(path, f"{self._lab_folder}/api"):
                raise InputError(f"volume {volume.name!r}: hostPath {volume.host_path!r} is the lab's own")
            is_kernels = any(_is_below(path, folder) for folder in _KERNEL)
            is_own = _is_below(path, self._lab_folder) or any(_is_below(path, folder) for folder in _OWN)
            source = path if is_own or is_kernels else self._copied(node, path, volume)
            _make_or_check(source, volume, makes_folder=not is_kernels)
            return HostPath(source, is_kernels)

    def _copied(self, node: str, path: str, volume: Volume) -> str:
        """Return the path in an overlay over the folder that it is, or else over the nearest one above it that is there."""
        folder = path
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        known = self._copies.get((node, folder))
        if known is None:
            known = self._copies[node, folder] = self._copy(node, folder, volume)
        return os.path.normpath(f"{known}/{os.path.relpath(path, folder)}")

    def _copy(self, node: str, folder: str, volume: Volume) -> str:
        place = f"{self._private}/hosts/{node}/copies/{len(self._copies)}"
        upper, work, root = (f"{place}/{part}" for part in ("upper", "work", "root"))
        for part in (upper, work, root):
            os.makedirs(part, exist_ok=True)
        # The upper folder's owner and mode are what the overlay shows of its root.
        seen = os.stat(folder)
        os.chown(upper, seen.st_uid, seen.st_gid)
        os.chmod(upper, stat.S_IMODE(seen.st_mode))
        if _is_below(self._lab_folder, folder):
            hidden = os.path.relpath(self._lab_folder, folder)
            make_upper_folder(upper, f"/{hidden}", lower=folder, is_opaque=True)
        try:
            linux.mount("overlay", root, "overlay", linux.MS_NODEV, overlay_options(folder, upper, work))
        except OSError as error:
            raise KernelError(
                f"volume {volume.name!r}: hostPath {volume.host_path!r} cannot be mounted copy-on-write: an overlay over "
                f"{folder} is refused ({error.strerror})"
            ) from error
        return root


def _is_below(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _make_or_check(source: str, volume: Volume, *, makes_folder: bool) -> None:
    """Make what is not there, as far as the type allows: a folder for no type, as container runtimes do."""
    wanted = volume.host_type
    if not os.path.lexists(source):
        if wanted == "FileOrCreate":
            Path(source).touch(0o644)
        elif wanted == "DirectoryOrCreate" or (not wanted and makes_folder):
            os.makedirs(source)
    kind = _KINDS.get(wanted.removesuffix("OrCreate"))
    if kind is not None and not (os.path.exists(source) and kind[0](os.stat(source).st_mode)):
        raise KernelError(
            f'MountVolume.SetUp failed for volume "{volume.name}" : hostPath type check failed: {volume.host_path} is not a '
            f"{kind[1]}"
        )
