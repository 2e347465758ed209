"""Being in another network namespace for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from testbed.kernel import linux


@contextmanager
def inside_network(fd: int) -> Iterator[None]:
    """Have this thread be in another network namespace for the length of a block; it must be its process's first."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(fd, linux.CLONE_NEWNET)
        try:
            yield
        finally:
            linux.setns(own, linux.CLONE_NEWNET)
    finally:
        os.close(own)
