"""Programs that do nothing until they are told to end: the client image (for ``exec``) and pause."""

from __future__ import annotations

import signal

_ENDING = (signal.SIGTERM, signal.SIGINT)


def wait_for_end() -> int:
    """Sleep until SIGTERM or SIGINT, then return 0.

    The first process of a PID namespace never ends by the default action of a signal that it does not wait for.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    signal.sigwait(_ENDING)
    return 0
