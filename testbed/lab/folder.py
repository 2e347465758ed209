"""Where labs leave their traces on the host: one folder each, locked for as long as the lab lives.

::

    /run/testbed/          0755; of root, or of whoever asks, and nobody else's to write, or it is not used
    /run/testbed/NAME/     0700
        lock               flock'ed by the lab's processes: the kernel lets go of it when the last one dies
        lab.json           what `testbed ls` shows
        lab.log            what the lab's processes complain about
        spawner.sock       requests of command lines
        api/api.sock       the Kubernetes API
        kubeconfig         the same over TLS on 127.0.0.1, with the administrator's certificate; 0600
        private/           the lab's own tmpfs, seen from inside only
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from testbed.errors import InputError, LabError
from testbed.kernel.pace import patient

_MOST_PATH_BYTES = 107
"""Of a Unix socket's name: sun_path has 108, with a zero byte (unix(7))."""

_LISTED_WITHIN_S = 1.0
"""How long a folder without lab.json may be locked by somebody who only looks whether its lab is dead."""
_LOOK_EVERY_S = 0.01

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class LabRecord:
    """What is known of a lab from outside. ``started`` is seconds since 1970; ``pid`` as the host sees it."""

    name: str
    pid: int
    started: float
    topology: str
    nodes: tuple[str, ...]
    proxy_mode: str
    iptables_backend: str = ""  # of a lab that an older version started: not known


def state_root() -> Path:
    """Return the folder of all labs: /run/testbed, or below XDG_RUNTIME_DIR where /run cannot be written."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path("/run") if os.access("/run", os.W_OK) or not runtime else Path(runtime)
    return base / "testbed"


def check_name(name: str) -> str:
    """Return a lab's name if it can be a folder's and a host's name; InputError otherwise."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"lab name {name!r} must be at most 32 lower-case letters, digits and '-', and begin with no '-'"
        )
    return name


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Have errors of the block name the file: those of a write to an open one do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class LabFolder:
    """A folder that this process has locked. Children that inherit ``lock_fd`` keep the lock."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd

    @property
    def name(self) -> str:
        return self.path.name

    def write_record(self, record: LabRecord) -> None:
        new = self.path / "lab.json.new"
        with named(new):
            new.write_text(json.dumps(asdict(record)))
            new.replace(self.path / "lab.json")

    def unlock(self) -> None:
        """Let go of our own hold; the lab's processes have theirs."""
        os.close(self.lock_fd)

    def remove(self) -> None:
        """Remove the folder, while it is locked, and let go of it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.unlock()


def claim_folder(name: str) -> LabFolder:
    """Return a new, empty, locked folder for a lab; what a dead lab of that name left is removed.

    Raises:
        LabError: a lab of that name is running, or its folder cannot be made.
    """
    try:
        return _claim(name)
    except OSError as error:
        where = state_root() / name
        with contextlib.suppress(OSError):
            where.rmdir()  # if it is empty
        raise LabError(f"cannot make the folder of lab {name!r}, {where}: {describe_oserror(error)}") from error


_ELSEWHERE = "`XDG_RUNTIME_DIR=FOLDER testbed up` keeps labs in another folder where /run is read-only"
_NEXT_STEPS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: _ELSEWHERE,
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "the whole machine's limit of open files is reached (sysctl fs.file-max)",
    errno.EAGAIN: "no more processes can be started: end some, or raise the limit (`ulimit -u`, pids.max of the cgroup)",
    errno.ENOMEM: "free some memory",
}
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def describe_oserror(error: OSError) -> str:
    """Return the kernel's words for what failed, with the file if there was one, and what to do where that is known."""
    reason = error.strerror or str(error)
    reason = f"{error.filename}: {reason}" if error.filename else reason
    next_step = _NEXT_STEPS.get(error.errno or 0) if error.filename or error.errno not in _OF_FILES else None
    return f"{reason}; {next_step}" if next_step else reason


def _check_owner(path: Path, *, shared: bool = False) -> None:
    """Refuse a folder that another user may have put things into: whoever can do that could pass for a lab.

    Args:
        shared: others may make entries of their own in it, as in /tmp, which are theirs to see.

    Raises:
        InputError: it is somebody else's, a link, or anybody's to write.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    elif found.st_uid not in (0, os.geteuid()):
        wrong = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o022 and not (shared and found.st_mode & stat.S_ISVTX):
        wrong = f"can be written by others (its mode is {stat.S_IMODE(found.st_mode):04o})"
    else:
        return
    raise InputError(f"{path}, where labs are kept, {wrong}: labs would not be safe there; remove it and try again")


def _claim(name: str) -> LabFolder:
    path = state_root() / check_name(name)
    if ":" in str(path):
        raise InputError(
            f"labs cannot be kept in {path.parent}: a ':' separates files in KUBECONFIG; set XDG_RUNTIME_DIR to another folder"
        )
    if len(os.fsencode(path / "api" / "api.sock")) > _MOST_PATH_BYTES:
        raise InputError(
            f"labs cannot be kept in {path.parent}: the names of sockets there would be too long for the kernel "
            f"({_MOST_PATH_BYTES} bytes); set XDG_RUNTIME_DIR to a shorter path"
        )
    deadline = time.monotonic() + patient(_LISTED_WITHIN_S)
    while True:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _check_owner(path.parent, shared=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _check_owner(path)
        folder = _lock(path)
        if folder is None and not (path / "lab.json").exists() and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            continue
        if folder is None:
            raise LabError(
                f"a lab named {name!r} is running already; stop it with `testbed down {name}` or choose another name"
            )
        if folder is not _GONE:
            break
    try:
        for entry in path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        path.chmod(0o700)
        (path / "api").mkdir(mode=0o700)
    except OSError:
        folder.remove()
        raise
    return folder


_GONE = LabFolder(Path(), -1)


def _lock(path: Path) -> LabFolder | None:
    """Lock a folder: None when a lab holds it, `_GONE` when it was removed under our hands."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return _GONE
    except PermissionError as error:
        raise InputError(
            f"lab {path.name!r} belongs to another user (its folder is {path}): run this command as root, or with sudo"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path / "lock").st_ino == os.fstat(fd).st_ino:
            return LabFolder(path, fd)
    except BlockingIOError:
        os.close(fd)
        return None
    except FileNotFoundError:
        pass
    os.close(fd)
    return _GONE


def list_records() -> list[LabRecord]:
    """Return the running labs by name; what dead ones left is removed on the way."""
    return list_labs()[0]


def list_labs() -> tuple[list[LabRecord], dict[str, str]]:
    """Return the running labs by name, and why others in the folder of labs cannot be told: name -> words."""
    root = state_root()
    records: list[LabRecord] = []
    unreadable: dict[str, str] = {}
    if not os.path.lexists(root):
        return records, unreadable
    _check_owner(root, shared=True)
    for path in sorted(root.iterdir()):
        try:
            record = _read_living(path)
        except (OSError, ValueError) as error:
            unreadable[path.name] = _why_unreadable(path, error)
            continue
        if record is not None:
            records.append(record)
    return records, unreadable


def _read_living(path: Path) -> LabRecord | None:
    """Return a running lab's record. None: it is not running any more, and its folder is gone, or not yet.

    Raises:
        OSError, ValueError: this is not the folder of a lab of ours.
    """
    if not path.is_dir() or not _NAME.fullmatch(path.name):
        raise ValueError("it is not the folder of a lab")
    if os.geteuid() == 0 and path.lstat().st_uid != 0:
        raise ValueError(f"it belongs to user {path.lstat().st_uid}, and no lab of ours does")
    folder = _lock(path)
    if folder is _GONE:
        return None
    if folder is not None:
        folder.remove()
        return None
    try:
        found = json.loads((path / "lab.json").read_bytes())
    except FileNotFoundError:
        return None  # being started, or being stopped
    return _record_of(found)


def _record_of(found: object) -> LabRecord:
    """Return what a lab.json says. One of another version of ours may say more; ValueError when it says too little."""
    if not isinstance(found, dict):
        raise ValueError("lab.json is damaged: it is no object")
    found = {"iptables_backend": "", **found}
    for name, kind in (
        ("name", str), ("pid", int), ("started", int | float), ("topology", str), ("nodes", list), ("proxy_mode", str),
        ("iptables_backend", str),
    ):  # fmt: skip
        if not isinstance(found.get(name), kind):
            raise ValueError(f"its lab.json has no {name!r} that we understand: it is damaged, or of another version")
    if found["pid"] < 2 or not all(isinstance(node, str) for node in found["nodes"]):
        raise ValueError("its lab.json is damaged")
    known = {field.name: found[field.name] for field in fields(LabRecord)}
    return LabRecord(**{**known, "nodes": tuple(found["nodes"])})


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        reason = "its lab.json is damaged"
    if (path / "lock").is_file():
        return f"{path}: {reason}; kill the first process that `fuser {path}/lock` lists to end it"
    return f"{path}: {reason}; if nobody needs it, remove it"


def free_name(wanted: str) -> str:
    """Return a lab name that is not taken: the scenario's, or that with a number."""
    taken = {record.name for record in list_records()}
    base = wanted[:28].rstrip("-.").replace(".", "-")
    number = 1
    name = base
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def find_record(name: str | None) -> LabRecord:
    """Return the named lab, or the only one there is.

    Raises:
        LabError: no such lab, or no name given and not exactly one lab.
    """
    records, unreadable = list_labs()
    found = [record for record in records if name in (None, record.name)]
    if len(found) == 1:
        return found[0]
    if name in unreadable:
        raise LabError(f"lab {name!r} cannot be used: {unreadable[name]}")
    names = ", ".join(record.name for record in records)
    if name is not None:
        raise LabError(f"no lab named {name!r} is running; running: {names or 'none'}")
    if not records:
        raise LabError("no lab is running; start one with `testbed up`")
    raise LabError(f"several labs are running ({names}); name one")
