"""System calls that Python 3.11 does not offer: namespaces, mounts, capabilities, process attributes.

Every function raises OSError with the call's arguments in ``filename``, so that a failure names what was tried.
Numbers are those of linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h; the two system calls that glibc
does not wrap have the same number on every architecture that was added after 2011 or unified since (unistd.h).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_CLONE_PARENT = 0x00008000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CLONE_NUMBER = {"x86_64": 56, "aarch64": 220}.get(platform.machine(), -1)
_OPEN_TREE, _MOVE_MOUNT, _CLOSE_RANGE, _OPENAT2 = 428, 429, 436, 437
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_RESOLVE_NO_MAGICLINKS, _RESOLVE_BENEATH = 0x02, 0x08
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


def _refused(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    if _libc.unshare(flags) < 0:
        raise _refused(f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    """Enter namespaces: ``fd`` is one of /proc/PID/ns, or a pidfd, and then ``flags`` says which of the process's."""
    if _libc.setns(fd, flags) < 0:
        raise _refused(f"setns({fd}, {flags:#x})")


def clone_sibling(flags: int) -> int:
    """Fork a child of our own parent, in new namespaces (CLONE_NEW…); return its pid, or 0 in the child.

    For processes with one thread that never execute another program. Python's and glibc's own preparations for a fork
    (locks, thread states, `os.register_at_fork`) are left out: with one thread there is nothing to prepare, and each page
    that they write is a page more in every child.
    """
    pid: int = _libc_with_gil.syscall(_CLONE_NUMBER, flags | _CLONE_PARENT, None, None, None, None)
    if pid < 0:
        raise _refused(f"clone({flags:#x})")
    return pid


def getsockopt(fd: int, level: int, option: int, buffer: bytearray) -> None:
    """Read an option that is a question as well: ``buffer`` holds that, and then the answer (Python's own passes none in)."""
    length = ctypes.c_uint32(len(buffer))
    if _libc.getsockopt(fd, level, option, (ctypes.c_char * len(buffer)).from_buffer(buffer), ctypes.byref(length)) < 0:
        raise _refused(f"getsockopt({fd}, {level}, {option})")


def sethostname(name: str) -> None:
    text = name.encode()
    if _libc.sethostname(text, len(text)) < 0:
        raise _refused(f"sethostname({name!r})")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    where = (os.fsencode(source), os.fsencode(target))
    if _libc.mount(*where, fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None) < 0:
        raise _refused(f"mount({source!r} on {target!r}, {fstype or 'bind'}, {data!r})")


def umount(target: str, flags: int = MNT_DETACH) -> None:
    if _libc.umount2(os.fsencode(target), flags) < 0:
        raise _refused(f"umount({target!r})")


def pivot_root(new_root: str, put_old: str) -> None:
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], os.fsencode(new_root), os.fsencode(put_old)) < 0:
        raise _refused(f"pivot_root({new_root!r})")


def open_tree(path: str, *, at: int = _AT_FDCWD, recursive: bool = True) -> int:
    """Return a descriptor of a detached copy of what is mounted at ``path``, to be put elsewhere by `move_mount`.

    With ``path`` '' it is what the descriptor ``at`` stands for; ``recursive`` takes what is mounted below along.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0) | (0 if path else _AT_EMPTY_PATH)
    fd: int = _libc.syscall(_OPEN_TREE, at, os.fsencode(path), flags)
    if fd < 0:
        raise _refused(f"open_tree({path!r})")
    return fd


def open_beneath(folder: int, path: str, flags: int = os.O_PATH) -> int:
    """Open a path below a folder; what leads out of it, by ``..`` or by links of any kind, is refused with EXDEV or ELOOP.

    The kernel sees to it while it walks (openat2(2)), so nobody can put a link in place after it was looked at.
    """
    how = struct.pack("=3Q", flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    fd: int = _libc.syscall(_OPENAT2, folder, os.fsencode(path), how, len(how))
    if fd < 0:
        raise _refused(path)
    return fd


def move_mount(fd: int, target: str) -> None:
    if _libc.syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH) < 0:
        raise _refused(f"move_mount(to {target!r})")


def close_range(first: int, last: int = -1) -> None:
    """Close every descriptor from first to last (-1: all) in one call (glibc's wrapper came with 2.34; the call with 5.9)."""
    if _libc.syscall(_CLOSE_RANGE, first, last, 0) < 0:
        raise _refused(f"close_range({first}, {last})")


def close_descriptors_except(*keep: int) -> None:
    """Close every descriptor above 2 but the given ones."""
    first = 3
    for fd in sorted(fd for fd in keep if fd > 2):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


def set_process_name(name: str) -> None:
    """Set what `ps -o comm` shows (15 bytes)."""
    if _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0) < 0:
        raise _refused(f"prctl(PR_SET_NAME, {name!r})")


def set_parent_death_signal(signal: int) -> None:
    if _libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0) < 0:
        raise _refused("prctl(PR_SET_PDEATHSIG)")


CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE",
    "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
    "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
"""Capability names by number (linux/capability.h), without ``CAP_``."""

DEFAULT_CAPABILITIES = frozenset(
    {
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP", "NET_BIND_SERVICE",
        "SYS_CHROOT", "KILL", "AUDIT_WRITE",
    }
)  # fmt: skip
"""What container runtimes leave to a container (containerd's oci/spec.go), without MKNOD, as CRI-O and podman have it.

There, a device cgroup keeps a container from opening the disk that it has made a node for; here nothing would.
"""


def capability_mask(names: frozenset[str]) -> int:
    """Return a bit for each named capability."""
    return sum(1 << number for number, name in enumerate(CAPABILITIES) if name in names)


def limit_bounding_set(mask: int) -> None:
    """Let no program that this process or its children execute have other capabilities than these."""
    for number, name in enumerate(CAPABILITIES):
        is_there = _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1
        if is_there and not mask >> number & 1 and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            raise _refused(f"prctl(PR_CAPBSET_DROP, {name})")


def set_capabilities(mask: int, *, inheritable: int = 0) -> None:
    """Give up all but these capabilities; an exec by root gets back what the bounding set allows."""
    words = [word for part in (mask, mask, inheritable) for word in (part & 0xFFFFFFFF, part >> 32)]
    effective, permitted, inherited = words[0:2], words[2:4], words[4:6]
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = struct.pack("=6I", effective[0], permitted[0], inherited[0], effective[1], permitted[1], inherited[1])
    if _libc.capset(header, sets) < 0:
        raise _refused(f"capset({mask:#x})")


def keep_capabilities() -> None:
    """Keep the permitted capabilities over the next setuid."""
    if _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0:
        raise _refused("prctl(PR_SET_KEEPCAPS)")


def make_ambient(mask: int) -> None:
    """Have exactly these capabilities, and let programs that this process executes have them too (capabilities(7))."""
    set_capabilities(mask, inheritable=mask)
    for number, name in enumerate(CAPABILITIES):
        if mask >> number & 1 and _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0) < 0:
            raise _refused(f"prctl(PR_CAP_AMBIENT_RAISE, {name})")
