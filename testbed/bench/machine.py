"""The machine as a benchmark meets it: what is written beside the figures, and who uses its processors."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import platform
import re
import resource
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from testbed import __version__
from testbed.bench.parse import parse_cpu_line
from testbed.bench.results import Machine

_SIOCETHTOOL = 0x8946
_FEATURES = {  # linux/ethtool.h: ETHTOOL_G…; the names are those of `ethtool -k`
    "rx-checksumming": 0x14,
    "tx-checksumming": 0x16,
    "scatter-gather": 0x18,
    "tcp-segmentation-offload": 0x1E,
    "generic-segmentation-offload": 0x23,
    "generic-receive-offload": 0x2B,
}
_VERSION_OF = {
    "iperf3": ("iperf3", "--version"),
    "wrk": ("wrk", "-v"),
    "iptables": ("iptables", "--version"),
    "nft": ("nft", "--version"),
    "nginx": ("nginx", "-v"),
}
_LOOK_S = 0.5


def describe_machine(machine_id: str) -> Machine:
    """Return what is known of this machine; looks for half a second at who uses it."""
    load = os.getloadavg()[0]
    busy = _busy_share()
    return Machine(
        id=machine_id,
        kernel=os.uname().release,
        kernel_version=os.uname().version,
        architecture=os.uname().machine,
        cpus=len(os.sched_getaffinity(0)),
        cpu_model=_cpu_model(),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20),
        conntrack_max=_conntrack_max(),
        offloads={},
        versions={"testbed": __version__, "python": platform.python_version(), **_versions()},
        load_before=round(load, 2),
        busy_before=round(busy, 3),
        load_during=[],
    )


def _busy_share() -> float:
    before = cpu_ticks()
    time.sleep(_LOOK_S)
    after = cpu_ticks()
    return (after["busy"] - before["busy"]) / max(1, after["all"] - before["all"])


def cpu_ticks() -> dict[str, int]:
    return parse_cpu_line(Path("/proc/stat").read_text())


def _cpu_model() -> str:
    found = re.search(r"^(?:model name|host)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _conntrack_max() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for name, argv in _VERSION_OF.items():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
            version = re.search(r"\d+(\.\d+)+[^\s,)]*", done.stdout + done.stderr)
            found[name] = version[0] if version else "unknown"
    return found


def read_offloads(interface: str = "eth0") -> dict[str, bool]:
    """Runs in a place: return which offloads an interface has on."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for name, number in _FEATURES.items():
            value = array.array("I", [number, 0])  # struct ethtool_value
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            with contextlib.suppress(OSError):
                fcntl.ioctl(control, _SIOCETHTOOL, request)
                found[name] = bool(value[1])
    return found


class CpuMeter:
    """CPU seconds of our child processes (the client), of some other processes (the server), and of the whole machine."""

    def __init__(self, server_pids: list[int]) -> None:
        self._server_pids = server_pids
        self._begin = self._now()
        self._end = self._begin

    def _now(self) -> tuple[float, float, dict[str, int]]:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        server = sum(map(process_seconds, self._server_pids))
        return usage.ru_utime + usage.ru_stime, server, cpu_ticks()

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> dict[str, float]:
        """Return client, server, softirq and machine CPU seconds; server only where the kernel tells them."""
        tick = 1 / os.sysconf("SC_CLK_TCK")
        client, server, ticks = self._begin
        client_end, server_end, ticks_end = self._end
        found = {
            "client_cpu": client_end - client,
            "softirq_cpu": (ticks_end["softirq"] - ticks["softirq"]) * tick,
            "machine_cpu": (ticks_end["busy"] - ticks["busy"]) * tick,
        }
        return {**found, "server_cpu": server_end - server} if self._server_pids else found


@contextlib.contextmanager
def measured_cpu(server_pids: list[int]) -> Iterator[CpuMeter]:
    """Meter the CPU time of a block."""
    meter = CpuMeter(server_pids)
    yield meter
    meter.stop()


def process_seconds(pid: int) -> float:
    """Return how long a process has run on CPUs; 0 when it is gone.

    /proc/PID/schedstat counts nanoseconds (of the main thread: our servers have one); /proc/PID/stat hundredths of seconds.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        if nanoseconds := int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]):
            return nanoseconds / 1e9
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def pids_beside(pidfd: int) -> list[int]:
    """Return the processes that share the PID namespace of one."""
    info = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    first = re.search(r"^Pid:\s*(\d+)", info, re.MULTILINE)
    if not first:
        return []
    namespace = os.stat(f"/proc/{first[1]}/ns/pid").st_ino
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                    found.append(int(entry))
    return sorted(found)
