"""A running lab as command lines and scenarios see it: its API, and its places to run things in."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from testbed.api.client import ApiClient
from testbed.errors import LabError, TestbedError
from testbed.kernel import linux
from testbed.kernel.interrupts import HeldInterrupts
from testbed.kernel.processes import (
    Completed,
    Target,
    become,
    call_in,
    execute,
    fork_in,
    reset_signals,
    run_in,
    wait_until_ended,
)
from testbed.lab.folder import LabRecord, find_record, state_root
from testbed.lab.frames import request
from testbed.model.topology import Topology

T = TypeVar("T")


_LOG_BYTES = 16384
_LOG_LINES = 10


def end_of_log(fd: int) -> str:
    """Return the last lines of an open log (-1: none), each indented on a line of its own."""
    if fd < 0:
        return ""
    data = os.pread(fd, _LOG_BYTES, max(0, os.fstat(fd).st_size - _LOG_BYTES))
    return "".join(f"\n    {line}" for line in data.decode(errors="replace").splitlines()[-_LOG_LINES:])


class Lab(AbstractContextManager["Lab"]):
    """A running lab. As a context manager it gives back its connections; an attached lab then ends."""

    def __init__(
        self, folder: Path, pid: int, topology: Topology | None = None, *, lifeline: int = -1, log: int = -1
    ) -> None:
        """``lifeline`` ends the lab when it is closed, ``log`` is an open lab.log, both ours to close (-1: none)."""
        self.folder = folder
        self.pid = pid
        self.api = ApiClient(str(folder / "api" / "api.sock"))
        self._topology = topology
        self._lifeline = lifeline
        self._log = log
        self._first_process = -1
        with contextlib.suppress(ProcessLookupError):
            self._first_process = os.pidfd_open(pid)

    @classmethod
    def find(cls, name: str | None) -> Lab:
        """Return the named lab, or the only one; LabError otherwise."""
        return cls.of(find_record(name))

    @classmethod
    def of(cls, record: LabRecord) -> Lab:
        return cls(state_root() / record.name, record.pid)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kubeconfig(self) -> Path:
        """The file with which kubectl and other clients reach the lab from the host."""
        return self.folder / "kubeconfig"

    @property
    def topology(self) -> Topology:
        if self._topology is None:
            self._topology = self._ask("topology")
        return self._topology

    @property
    def iptables_backend(self) -> str:
        """Which iptables the nodes use: ``legacy`` or ``nft``; '' when it is not known."""
        return find_record(self.name).iptables_backend

    def detach(self) -> None:
        """Let the lab live on when this process ends."""
        if self._lifeline >= 0:
            self._ask("detach")
            os.close(self._lifeline)
            self._lifeline = -1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.api.close()
        for fd in (self._log, self._first_process):
            if fd >= 0:
                os.close(fd)
        self._log = self._first_process = -1
        if self._lifeline >= 0:
            from testbed.lab.folder import list_records
            from testbed.lab.start import end_process_tree

            end_process_tree(self.pid, self.name)
            os.close(self._lifeline)
            self._lifeline = -1
            list_records()

    def why_ended(self, *, within_s: float = 0.0) -> str:
        """Return what is known of the lab's end, with the last lines of its log; '' while it runs.

        Args:
            within_s: how long to wait for an end that may be under way.
        """
        poll = select.poll()
        if self._first_process >= 0:
            poll.register(self._first_process, select.POLLIN)
            if not poll.poll(within_s * 1000):
                return ""
        return f"the lab ended: lab {self.name!r} was stopped, or a process of it has died{end_of_log(self._log)}"

    # -- places ----------------------------------------------------------------------------------------------------

    def target(self, where: str) -> Target:
        """Return a node, an outside host or NAMESPACE/POD[/CONTAINER] as a place to run things; close it after use.

        Raises:
            InputError: there is no such place; the message lists those there are.
            NotPresent: the pod has no running container.
        """
        answer, fds = self._ask_with_fds("target", where=where)
        found: Target = answer
        return replace(found, pidfd=fds[0])

    def call(self, where: str, function: Callable[..., T], *args: Any, timeout_s: float) -> T:
        """Return ``function(*args)`` as seen from inside a place (`processes.call_in`)."""
        target = self.target(where)
        try:
            return call_in(target, function, *args, timeout_s=timeout_s)
        finally:
            target.close()

    def run(self, where: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Run a program in a place and collect what it writes (`processes.run_in`)."""
        target = self.target(where)
        if not target.env:
            target = replace(target, env=dict(os.environ))
        try:
            return run_in(target, argv, stdin=stdin, timeout_s=timeout_s)
        finally:
            target.close()

    def run_in_foreground(self, where: str, argv: Sequence[str]) -> int:
        """Run a program in a place on our own terminal, and return its exit status.

        It is our child in our session, so Ctrl-C, job control and window sizes are its own; it ends when we do.
        """
        target = self.target(where)
        env = {**target.env, "TERM": os.environ.get("TERM", "dumb")} if target.env else dict(os.environ)
        target = replace(target, env=env)

        def child() -> int:
            linux.set_parent_death_signal(signal.SIGHUP)
            linux.close_range(3)
            reset_signals()
            become(target)
            return execute(argv, target.env)

        pids: list[int] = []

        def pass_on(number: int, _frame: FrameType | None) -> None:
            for pid in pids:
                os.kill(pid, number)

        # The terminal sends the first two to the child as well; the third is passed on.
        reactions: dict[int, Any] = {
            signal.SIGINT: signal.SIG_IGN,
            signal.SIGQUIT: signal.SIG_IGN,
            signal.SIGTERM: pass_on,
        }
        before = {number: signal.getsignal(number) for number in reactions}
        try:
            for number, reaction in reactions.items():
                signal.signal(number, reaction)
            with HeldInterrupts() as interrupts:
                pids.append(fork_in(target, child))
                return wait_until_ended(pids[0], interrupts, timeout_s=None)
        finally:
            target.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def network(self, where: str) -> int:
        """Return a descriptor, ours to close, of the network namespace of a node, an outside host or NAMESPACE/POD.

        Raises:
            InputError: there is no such place.
        """
        return self._ask_with_fds("network", where=where)[1][0]

    @property
    def first_process(self) -> int:
        """A pidfd of the lab's first process, which is readable when the lab has ended; -1 when it had before."""
        return self._first_process

    def set_link(self, where: str, up: bool) -> None:
        """Plug or unplug the LAN link of a node or outside host."""
        self._ask("set_link", where=where, up=up)

    def set_power(self, node: str, on: bool) -> None:
        """Switch a node off (its kubelet, its pods, its link) or on again.

        Raises:
            ApiError: 404, there is no such node.
        """
        self.api.set_power(node, on=on)

    def signal_pod(self, namespace: str, name: str, signal_number: int) -> None:
        """Send a signal to the first process of each of a pod's containers."""
        self._ask("signal_pod", pod=f"{namespace}/{name}", signal_number=signal_number)

    def run_cli(self, fds: Sequence[int] = (0, 1, 2)) -> int:
        """Run Mininet's CLI on the given terminal; return its exit status."""
        return int(self._ask_with_fds("cli", fds)[0])

    # -- the spawner -----------------------------------------------------------------------------------------------

    def _ask(self, operation: str, **arguments: Any) -> Any:
        return self._ask_with_fds(operation, **arguments)[0]

    def _ask_with_fds(self, operation: str, fds: Sequence[int] = (), **arguments: Any) -> tuple[Any, list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(str(self.folder / "spawner.sock"))
            except OSError as error:
                raise LabError(f"lab {self.name!r} does not answer: {error.strerror}; see `testbed ls`") from error
            (_, value), received = request(connection, (0, operation, arguments), fds)
        if isinstance(value, TestbedError | OSError):
            raise value
        return value, received
