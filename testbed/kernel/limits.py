"""How many more processes may be started here, by the limits of control groups: those of containers and of systemd's units."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def spare_processes(process: Path = Path("/proc/self")) -> tuple[int, Path] | None:
    """Return how many processes and threads the tightest control group lets us add, and its folder; None without a limit.

    Source: the kernel's admin-guide/cgroup-v1/pids.rst and cgroup-v2.rst, "PID".
    """
    spare: list[tuple[int, Path]] = []
    for folder in _own_groups(process):
        try:
            most, now = ((folder / f"pids.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:  # the root has none
            continue
        if most != "max":
            spare.append((int(most) - int(now), folder))
    return min(spare, default=None)


def _own_groups(process: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that count a process, each with those above it, as far as they are mounted."""
    paths: dict[str, str] = {}  # 'pids' of version 1, or '' of version 2 -> the group's path
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "pids" in controllers.split(","):
            paths["pids" if controllers else ""] = path
    for line in (process / "mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        group = paths.get("") if kind == "cgroup2" else paths.get("pids")
        if group is None or (kind != "cgroup2" and not (kind == "cgroup" and "pids" in options.split(","))):
            continue
        root, mounted = fields.split(" ")[3:5]
        if not f"{group}/".startswith(f"{root.rstrip('/')}/"):
            continue  # of another container's part of the tree
        folder = Path(mounted, group[len(root.rstrip("/")) :].lstrip("/"))
        while folder.is_relative_to(mounted):
            yield folder
            folder = folder.parent
