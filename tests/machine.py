"""This machine once more, for tests that take something away from it: a copy-on-write view with its own /run and /tmp.

::

    with Machine(tmp_path) as machine:
        machine.sh("rm /usr/sbin/conntrack")
        ended = machine.testbed("up", "x")

What is done in there ends with it, labs and all: it has a PID namespace whose first process ends with us, however we end.
Network and host name are the real ones.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from testbed.kernel import linux
from testbed.kernel.rootfs import overlay_options

ROOT = Path(__file__).parents[1]
_NSENTER = shutil.which("nsenter") or "nsenter"  # whatever PATH the program is to have


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``err`` without colours."""

    status: int
    out: str
    err: str


class Machine(contextlib.AbstractContextManager["Machine"]):
    """A process that holds the view; ``project`` is where this project is in it, ``env`` what commands find set."""

    def __init__(self, folder: Path) -> None:
        self.project = ROOT
        self.env = {name: value for name, value in os.environ.items() if name not in ("XDG_RUNTIME_DIR", "KUBECONFIG")}
        self._holder = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._first = int(self._holder.stdout.readline())

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()

    def run(
        self, *argv: str, env: Mapping[str, str | None] = {}, before: Callable[[], object] | None = None,
        cwd: Path | str | None = None, timeout_s: float = 120,
    ) -> Ended:  # fmt: skip
        """Run a program in there; ``before`` is called in its process first, a None in ``env`` unsets a variable."""
        enter = [_NSENTER, f"--target={self._first}", "--mount", "--pid", f"--wdns={cwd or self.project}", "--"]
        merged = {**self.env, **env}
        done = subprocess.run(
            [*enter, *argv], capture_output=True, check=False, timeout=timeout_s, preexec_fn=before, stdin=subprocess.DEVNULL,
            env={name: value for name, value in merged.items() if value is not None},
        )  # fmt: skip
        return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def sh(self, script: str) -> str:
        """Run a shell script that must succeed, and return what it writes."""
        done = self.run("sh", "-ec", script, cwd="/")
        assert done.status == 0, f"{script}: {done.err}"
        return done.out

    def testbed(
        self, *argv: str, env: Mapping[str, str | None] = {}, before: Callable[[], object] | None = None
    ) -> Ended:
        """Run our command line in there."""
        return self.run(self.python, "-m", "testbed", *argv, env=env, before=before)

    @property
    def python(self) -> str:
        return str(self.project / os.path.relpath(sys.executable, ROOT)) if _is_ours(sys.executable) else sys.executable


def _is_ours(path: str) -> bool:
    return Path(path).is_relative_to(ROOT)


def processes_below(first: int) -> list[int]:
    """Return a process and all that descend from it, as this PID namespace numbers them."""
    found: list[int] = []
    heads = [first]
    while heads:
        found += heads
        below: list[int] = []
        for head in heads:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                below += map(int, Path(f"/proc/{head}/task/{head}/children").read_text().split())
        heads = below
    return found


def children_named(name: str, parent: int) -> list[int]:
    """Return the children of a process with a name; theirs are left out: a fork has its parent's name for a while."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                        found.append(int(pid))
    return found


def limit(kind: int, soft: int, hard: int | None = None) -> Callable[[], None]:
    """Return what sets a resource limit, for ``before``."""
    return lambda: resource.setrlimit(kind, (soft, soft if hard is None else hard))


def without_capability(number: int) -> Callable[[], None]:
    """Return what takes a capability away for good, for ``before``."""
    mask = linux.capability_mask(frozenset(linux.CAPABILITIES)) & ~(1 << number)

    def drop() -> None:
        linux.limit_bounding_set(mask)
        linux.set_capabilities(mask)

    return drop


def _hold(folder: str) -> None:
    """Fork the first process of a machine, tell its number, and end when it does."""
    made, making = os.pipe()
    linux.unshare(linux.CLONE_NEWPID)  # of children only
    pid = os.fork()
    if pid == 0:
        linux.set_parent_death_signal(signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are its children
        _make(folder)
        os.close(making)
        os.read(0, 1)  # the end of whoever uses it
        os._exit(0)
    os.close(making)
    os.read(made, 1)
    sys.stdout.write(f"{pid}\n")
    sys.stdout.flush()
    os.waitpid(pid, 0)


def _make(folder: str) -> None:
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", folder, "tmpfs", 0, "mode=0755")
    for part in ("upper", "work", "root"):
        os.mkdir(f"{folder}/{part}")
    root = f"{folder}/root"
    linux.mount("overlay", root, "overlay", 0, overlay_options("/", f"{folder}/upper", f"{folder}/work"))
    linux.mount("proc", f"{root}/proc", "proc")
    for path in ("/sys", "/dev"):
        linux.mount(path, root + path, "", linux.MS_BIND | linux.MS_REC)
    for path, mode in (("/run", "0755"), ("/tmp", "1777")):
        linux.mount("tmpfs", root + path, "tmpfs", 0, f"mode={mode}")
    for number, path in enumerate(_needed()):
        upper, work = f"{folder}/upper-{number}", f"{folder}/work-{number}"
        for made in (upper, work, root + path):
            os.makedirs(made, exist_ok=True)
        linux.mount("overlay", root + path, "overlay", 0, overlay_options(path, upper, work))
    os.chdir(root)
    linux.pivot_root(".", ".")
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")


def _needed() -> Sequence[str]:
    """Return folders of ours that are not in an overlay over /: on file systems of their own, or where it has new ones."""
    device = os.stat("/").st_dev
    ours = dict.fromkeys((str(ROOT), sys.prefix, sys.base_prefix))
    return [
        path
        for path in ours
        if os.stat(path).st_dev != device or Path(path).is_relative_to("/tmp") or Path(path).is_relative_to("/run")
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.set_parent_death_signal(signal.SIGKILL)
    _hold(sys.argv[1])
