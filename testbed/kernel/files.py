"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from testbed.errors import KernelError


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: on a full disk what was there before stays, and nothing half written is left.

    Raises:
        KernelError: it cannot be written; the message names it.
    """
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses in the block into a KernelError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise KernelError(f"{path}: cannot be written: {error.strerror or error}") from error
