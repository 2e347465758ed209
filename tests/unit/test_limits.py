"""Which limit of processes holds for this one, read from files as the kernel has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.kernel.limits import spare_processes


def group(folder: Path, most: str | None, now: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if most is not None:
        (folder / "pids.max").write_text(f"{most}\n")
        (folder / "pids.current").write_text(f"{now}\n")


@pytest.mark.parametrize(
    ("cgroup", "root", "kind", "options"),
    [
        pytest.param("0::/a/b", "/", "cgroup2", "rw", id="version 2"),
        pytest.param("8:cpu,pids:/a/b\n0::/", "/", "cgroup", "rw,cpu,pids", id="version 1"),
        pytest.param("0::/docker/x/a/b", "/docker/x", "cgroup2", "rw", id="a container's part of the tree"),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, cgroup: str, root: str, kind: str, options: str) -> None:
    """Of the group and all above it the one with the least room is named; one without a limit is not."""
    mounted = tmp_path / "mounted"
    (tmp_path / "cgroup").write_text(f"{cgroup}\n")
    (tmp_path / "mountinfo").write_text(
        f"1 2 0:3 / /proc rw - proc proc rw\n4 2 0:5 {root} {mounted} rw shared:1 - {kind} {kind} {options}\n"
        f"6 2 0:7 /elsewhere /nothing rw - {kind} {kind} {options}\n"
    )
    group(mounted, None, 0)
    group(mounted / "a", "max", 7)
    group(mounted / "a/b", "max", 5)
    assert spare_processes(tmp_path) is None
    group(mounted / "a", "20", 7)
    assert spare_processes(tmp_path) == (13, mounted / "a")
    group(mounted / "a/b", "6", 5)
    assert spare_processes(tmp_path) == (1, mounted / "a/b")
    group(mounted / "a/b", "100", 5)
    assert spare_processes(tmp_path) == (13, mounted / "a")


def test_without_control_groups(tmp_path: Path) -> None:
    """There is no limit where none is mounted."""
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "mountinfo").write_text("1 2 0:3 / /proc rw - proc proc rw\n")
    assert spare_processes(tmp_path) is None


def test_this_process() -> None:
    """The kernel's own files are understood."""
    spare = spare_processes()
    assert spare is None or spare[0] > 0
