"""Being in other namespaces for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from testbed.kernel import linux


def inside_network(fd: int) -> AbstractContextManager[None]:
    """Have this thread be in another network namespace for the length of a block; it must be its process's first."""
    return _inside(fd, "net", linux.CLONE_NEWNET)


def inside_mounts(fd: int) -> AbstractContextManager[None]:
    """Have this process, which must have one thread, be in another mount namespace for the length of a block."""
    return _inside(fd, "mnt", linux.CLONE_NEWNS)


@contextmanager
def _inside(fd: int, name: str, kind: int) -> Iterator[None]:
    own = os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(fd, kind)
        try:
            yield
        finally:
            linux.setns(own, kind)
    finally:
        os.close(own)
