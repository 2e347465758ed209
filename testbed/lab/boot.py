"""The lab's first own process, below tini: forks the control process and becomes the spawner.

Started as ``python -m testbed.lab.boot FD``: the descriptor holds a pickled `LabRequest`. Only the standard library and
Mininet are loaded here, because every pod's process is forked from this one and carries what it has loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback

from testbed.errors import TestbedError
from testbed.kernel import linux
from testbed.lab.forker import Forker, start_forker
from testbed.lab.request import LabRequest, report

OPEN_FILES = 65536
"""Of the spawner and of control, each: about ten for a pod."""


def main() -> int:
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        request: LabRequest = pickle.loads(file.read())  # noqa: S301  # written by the process that started us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if request.lifeline_fd >= 0:
        _set_fatal(request.lifeline_fd, True)
    _choose_open_files()
    try:
        forker = start_forker(request.api_fd)
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            _be_control(request, theirs)
    except OSError as error:  # processes or descriptors have run out
        return _report_oserror(request, "could not start the lab's processes", error)
    theirs.close()
    return _be_spawner(request, ours, forker)


def _report_oserror(request: LabRequest, what: str, error: OSError) -> int:
    """Tell whoever starts the lab what failed, and return the status to end with."""
    from testbed.lab.folder import describe_oserror

    report(request.progress_fd, error=f"{what}: {describe_oserror(error)}", status=3)
    return 3


def _choose_open_files() -> None:
    """Have room for the descriptors of a thousand pods, whatever the caller's limit is.

    Nor more than that: programs that close all there could be take minutes over a thousand million.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < OPEN_FILES:
        with contextlib.suppress(ValueError, OSError):  # beyond fs.nr_open, or without CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))


def _set_fatal(lifeline: int, is_fatal: bool) -> None:
    """Say whether the kernel ends this process, and so the lab, as soon as whoever starts it is gone.

    The pipe sends SIGIO when its last writer goes (fcntl(2), O_ASYNC), whose default is to end. `Spawner.serve`, later, looks
    by itself; all who have inherited the descriptor share the flag.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL) & ~os.O_ASYNC
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | (os.O_ASYNC if is_fatal else 0))
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit(1)


def _be_control(request: LabRequest, spawner: socket.socket) -> None:
    status = 1
    try:
        linux.set_process_name("control")
        linux.set_parent_death_signal(signal.SIGKILL)
        # aiohttp loads every certificate authority for its client when it is imported, 0.2 s for what we never use.
        os.environ |= {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}
        from testbed.lab.control import run_control

        run_control(request, spawner)
        status = 0
    except TestbedError as error:
        report(request.progress_fd, error=str(error), status=error.exit_status)
    except BaseException as error:
        traceback.print_exc()
        report(
            request.progress_fd, error=f"the control process failed: {error!r}; see {request.folder}/lab.log", status=3
        )
    finally:
        sys.stderr.flush()
        os._exit(status)


def _be_spawner(request: LabRequest, control: socket.socket, forker: Forker) -> int:
    linux.set_process_name("spawner")
    os.close(request.api_fd)
    from testbed.lab.spawner import Spawner, preload

    try:
        spawner = Spawner(request.topology, request.folder, control, forker, request.iptables_backend)
        spawner.network.build_topology()
        spawner.start_outside_dns()
        report(request.progress_fd, phase="network")
        preload(request.proxy_mode)
    except TestbedError as error:
        report(request.progress_fd, error=str(error), status=error.exit_status)
        return error.exit_status
    except OSError as error:
        return _report_oserror(request, "could not make the lab's network", error)
    # The control process reports from here on; holding the pipe would hide its death from whoever waits.
    os.close(request.progress_fd)
    lifeline = [request.lifeline_fd] if request.lifeline_fd >= 0 else []
    for fd in lifeline:
        _set_fatal(fd, False)
    spawner.serve(socket.socket(fileno=request.listener_fd), until=lifeline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
