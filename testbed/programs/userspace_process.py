"""Starts the process that carries userspace mode's traffic, tells it what to serve, and starts it again when it ends.

The listening sockets belong to kube-proxy, and the process gets copies of them. So when it dies, its connections break, but
no port is dead: what comes in waits in the kernel until the next process is there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from testbed.errors import LabError
from testbed.kernel import linux
from testbed.model.service import ServicePortName
from testbed.programs.userspace_loop import MESSAGE_BYTES, Notice, serve

#: A process that ends at once is started again after this long, and each time later.
_BACK_OFF_FIRST_S: Final = 0.05
_BACK_OFF_LAST_S: Final = 1.0
_LIVED_LONG_S: Final = 10.0
#: How long it may take to take a message.
_ANSWER_S: Final = 10.0
#: As upstream's, proxier.go: 64 * 1000.
OPEN_FILES: Final = 64_000
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h


@dataclass(slots=True)
class _Served:
    listener: socket.socket
    endpoints: tuple[str, ...] = ()
    affinity_s: int = 0


class CopyProcess:
    """The process, and all that it must be told when it is started again.

    Args:
        udp_idle_s: After how long without datagrams a UDP client is forgotten.
        on_notice: Called with what it has to say, on a thread of this object.
        seed: Makes the order of endpoints the same in each run; None: by chance.
        open_files: The limit of descriptors that it is to have.
    """

    def __init__(
        self,
        *,
        udp_idle_s: float,
        on_notice: Callable[[Notice], None],
        seed: int | None = None,
        open_files: int = OPEN_FILES,
    ) -> None:
        self._udp_idle_s = udp_idle_s
        self._on_notice = on_notice
        self._seed = seed
        self._open_files = open_files
        self._lock = threading.Lock()  # of all below
        self._served: dict[ServicePortName, _Served] = {}
        self._channel: socket.socket | None = None
        self._is_stopping = False
        self.pid = 0

    def start(self) -> None:
        """Start the process and the thread that looks after it.

        Raises:
            LabError: it does not start.
        """
        started = threading.Event()
        problems: list[OSError] = []
        # Its parent is the thread that looks after it: when that ends, however it ends, the kernel ends the process.
        threading.Thread(target=self._look_after, args=(started, problems), name="userspace", daemon=True).start()
        started.wait()
        if problems:
            raise LabError(f"the process that copies userspace mode's traffic does not start: {problems[0]}")

    def stop(self) -> None:
        """End the process; its connections break."""
        with self._lock:
            self._is_stopping = True
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)

    def open(self, name: ServicePortName, listener: socket.socket) -> None:
        """Have a listening socket served. It stays the caller's.

        A service port that has one already gets the new one beside it, until `leave`: whose turn it is, and affinity, go on.
        """
        with self._lock:
            self._served.setdefault(name, _Served(listener)).listener = listener
            self._send(["open", name], [listener.fileno()])

    def set(self, name: ServicePortName, endpoints: Sequence[str], affinity_s: int) -> None:
        """Say which endpoints (``address:port``) a service port has; what is known already costs nothing."""
        with self._lock:
            served = self._served[name]
            if (served.endpoints, served.affinity_s) != (tuple(endpoints), affinity_s):
                served.endpoints, served.affinity_s = tuple(endpoints), affinity_s
                self._send(["set", name, served.endpoints, affinity_s])

    def leave(self, name: ServicePortName) -> None:
        """Have all listening sockets of a service port but its newest served no longer; TCP connections go on."""
        with self._lock:
            self._send(["leave", name])

    def close(self, name: ServicePortName) -> None:
        """Have a service port served no longer; TCP connections go on."""
        with self._lock:
            if self._served.pop(name, None) is not None:
                self._send(["close", name])

    def purge(self) -> None:
        """Have session affinity that is over forgotten."""
        with self._lock:
            self._send(["purge", None])

    # -- behind the lock -----------------------------------------------------------------------------------------------

    def _send(self, message: list[Any], descriptors: Sequence[int] = ()) -> None:
        if self._channel is None:
            return  # it is being started, and will be told everything
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], list(descriptors))
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)  # it hangs: the next one will be told
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has just ended

    def _fork(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, option, 4 * MESSAGE_BYTES)
        ours.settimeout(_ANSWER_S)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads hold: the child takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._be_process(theirs, parent)
        theirs.close()
        self._channel = ours
        for name, served in self._served.items():
            self._send(["open", name], [served.listener.fileno()])
            self._send(["set", name, served.endpoints, served.affinity_s])
        return ours

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _look_after(self, started: threading.Event, problems: list[OSError]) -> None:
        back_off_s = _BACK_OFF_FIRST_S
        while not self._is_stopping:
            try:
                with self._lock:
                    channel = self._fork()
            except OSError as error:
                if not started.is_set():
                    problems.append(error)
                    started.set()
                    return
                time.sleep(_BACK_OFF_LAST_S)
                continue
            began_s = time.monotonic()
            self._listen(channel, started)
            with self._lock:
                self._channel = None
                pid, self.pid = self.pid, 0
            channel.close()
            _, status = os.waitpid(pid, 0)
            started.set()
            if self._is_stopping:
                return
            back_off_s = (
                _BACK_OFF_FIRST_S
                if time.monotonic() - began_s > _LIVED_LONG_S
                else min(_BACK_OFF_LAST_S, back_off_s * 2)
            )
            self._on_notice(
                Notice(
                    "Warning", "UserspaceProxyDied",
                    f"the process that copies connections ended ({_ending(status)}): they are broken, new ones wait; "
                    "it is being started again",
                )
            )  # fmt: skip
            time.sleep(back_off_s)

    def _listen(self, channel: socket.socket, started: threading.Event) -> None:
        while True:
            try:
                data = channel.recv(MESSAGE_BYTES)
            except TimeoutError:
                continue
            except OSError:
                return
            if not data:
                return
            notice = Notice(*json.loads(data))
            if notice.reason == "ready":
                started.set()
            else:
                self._on_notice(notice)

    # -- the process ---------------------------------------------------------------------------------------------------

    def _be_process(self, channel: socket.socket, parent: int) -> NoReturn:
        """Become the process. Only this thread is in it, so what others may hold (locks, buffers) is left alone."""
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            linux.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(0)  # it died before that was set
            linux.close_descriptors_except(channel.fileno())
            linux.set_process_name("userspace-proxy")
            set_open_files(self._open_files)
            gc.freeze()
            seed = int.from_bytes(os.urandom(4), "big") if self._seed is None else self._seed
            serve(channel, udp_idle_s=self._udp_idle_s, seed=seed)
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)


def set_open_files(wanted: int) -> int:
    """Have this process open so many descriptors at most, or as many as it may; return how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft, hard in ((wanted, max(wanted, most)), (min(wanted, most), most)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return soft
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
