"""Where labs leave their traces on the host: one folder each, locked for as long as the lab lives.

::

    /run/testbed/NAME/     0700
        lock               flock'ed by the lab's processes: the kernel lets go of it when the last one dies
        lab.json           what `testbed ls` shows
        lab.log            what the lab's processes complain about
        spawner.sock       requests of command lines
        api/api.sock       the Kubernetes API
        private/           the lab's own tmpfs, seen from inside only
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from testbed.errors import InputError, LabError

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
        LabError: a lab of that name is running.
    """
    path = state_root() / check_name(name)
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = _lock(path)
        if folder is None:
            raise LabError(
                f"a lab named {name!r} is running already; stop it with `testbed down {name}` or choose another name"
            )
        if folder is not _GONE:
            break
    for entry in path.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (path / "api").mkdir(mode=0o700)
    return folder


_GONE = LabFolder(Path(), -1)


def _lock(path: Path) -> LabFolder | None:
    """Lock a folder: None when a lab holds it, `_GONE` when it was removed under our hands."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return _GONE
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
    return sorted(_living_records(), key=lambda record: record.name)


def _living_records() -> Iterator[LabRecord]:
    root = state_root()
    for path in root.iterdir() if root.is_dir() else ():
        folder = _lock(path)
        if folder is _GONE:
            continue
        if folder is not None:
            folder.remove()
            continue
        try:
            record = json.loads((path / "lab.json").read_text())
        except FileNotFoundError:
            continue  # being started, or being stopped
        known = {field.name: record[field.name] for field in fields(LabRecord)}  # another version's may say more
        yield LabRecord(**{**known, "nodes": tuple(known["nodes"])})


def find_record(name: str | None) -> LabRecord:
    """Return the named lab, or the only one there is.

    Raises:
        LabError: no such lab, or no name given and not exactly one lab.
    """
    records = list_records()
    found = [record for record in records if name in (None, record.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(record.name for record in records)
    if name is not None:
        raise LabError(f"no lab named {name!r} is running; running: {names or 'none'}")
    if not records:
        raise LabError("no lab is running; start one with `testbed up`")
    raise LabError(f"several labs are running ({names}); name one")
