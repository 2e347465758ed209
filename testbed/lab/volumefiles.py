"""The files of a ConfigMap, Secret or projected volume as a kubelet lays them out, so that all of them change in one step.

::

    ..2024_01_01_00_00_00.1234567890/color      the files
    ..data -> ..2024_01_01_00_00_00.1234567890  replaced by a rename: the one step
    color -> ..data/color                       what a program opens

Source: kubernetes pkg/volume/util/atomic_writer.go (v1.30).
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

_DATA = "..data"
_NEW_DATA = "..data_tmp"


def write_atomically(
    folder: Path, files: Mapping[str, str], modes: Mapping[str, int], default_mode: int, group: int | None = None
) -> None:
    """Make a volume hold exactly these files.

    Args:
        files: Normal relative path -> text, bytes that are not UTF-8 as surrogate escapes. No path begins with ``..``.
        modes: Path -> permissions, for those that have other ones than ``default_mode``.
        group: Who owns the files and may read them in any case (volume_linux.go, SetVolumeOwnership); None for nobody.
    """
    data = folder / _DATA
    old = os.readlink(data) if data.is_symlink() else ""
    wanted = {os.path.normpath(path): text.encode(errors="surrogateescape") for path, text in files.items()}
    if old and _read(folder / old) == wanted:
        return
    stamp = time.strftime("..%Y_%m_%d_%H_%M_%S.", time.gmtime())
    new = folder / f"{stamp}{secrets.randbelow(2**32)}"
    new.mkdir(mode=0o755)
    for path, content in wanted.items():
        if "/" in path:
            (new / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).write_bytes(content)
    for path in files:
        file = new / os.path.normpath(path)
        if group is not None:
            os.chown(file, -1, group)
        file.chmod(modes.get(path, default_mode) | (0o440 if group is not None else 0))
    os.symlink(new.name, folder / _NEW_DATA)
    os.rename(folder / _NEW_DATA, data)
    visible = {path.partition("/")[0] for path in wanted}
    there = {name for name in os.listdir(folder) if not name.startswith("..")}
    for name in visible - there:
        os.symlink(f"{_DATA}/{name}", folder / name)
    for name in there - visible:
        os.unlink(folder / name)
    if old:
        shutil.rmtree(folder / old)


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
