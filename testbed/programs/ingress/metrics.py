"""Counts requests by what nginx tells of each over a socket, under upstream's names.

nginx sends one JSON line a request as a datagram (``access_log syslog:``); when this process is slow the kernel drops
datagrams rather than hold up nginx, so counts may fall short, but never a request.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from typing import Any, Final

from testbed.dataplane.ingress.render import METRICS_ADDRESS

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BYTES: Final = tuple(float(10**power) for power in range(1, 8))
_HISTOGRAMS: Final = {
    "request_duration_seconds": ("request_time", _SECONDS),
    "response_duration_seconds": ("response_time", _SECONDS),
    "connect_duration_seconds": ("connect_time", _SECONDS),
    "header_duration_seconds": ("header_time", _SECONDS),
    "request_size": ("request_length", _BYTES),
    "response_size": ("response_length", _BYTES),
}
_MAX_SERIES: Final = 20_000
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"})

Labels = tuple[tuple[str, str], ...]


class RequestMetrics:
    """Counters and histograms of requests."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lock = threading.Lock()
        self._requests: dict[Labels, int] = {}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}  # count below each bound, then sum and count

    def listen(self, address: tuple[str, int] = METRICS_ADDRESS) -> None:
        """Take datagrams from nginx, from a thread of its own."""
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        made.bind(address)
        threading.Thread(target=self._read, args=(made,), name="metrics", daemon=True).start()

    def _read(self, made: socket.socket) -> None:
        while True:
            self.take(made.recv(65536))

    def take(self, datagram: bytes) -> None:
        """Count one request; what is no line of ours is left out."""
        begin = datagram.find(b"{")
        try:
            said = json.loads(datagram[begin:]) if begin >= 0 else None
        except ValueError:
            return
        if isinstance(said, dict) and said.get("ingress"):
            self._count(said)

    def _count(self, said: Mapping[str, Any]) -> None:
        texts = {
            name: str(said.get(name, "")) for name in ("ingress", "namespace", "service", "host", "path", "canary")
        }
        method = str(said.get("method", ""))
        labels = {**texts, "method": method if method in _METHODS else "OTHER", "status": str(said.get("status", ""))}
        key = tuple(sorted(labels.items()))
        with self._lock:
            if key not in self._requests and len(self._requests) >= _MAX_SERIES:
                return
            self._requests[key] = self._requests.get(key, 0) + 1
            for name, (field, bounds) in _HISTOGRAMS.items():
                value = last_number(str(said.get(field, "")))
                if value is not None:
                    row = self._histograms.setdefault((name, key), [0.0] * (len(bounds) + 2))
                    for index, bound in enumerate(bounds):
                        row[index] += value <= bound
                    row[-2] += value
                    row[-1] += 1

    def render(self) -> str:
        """Return the text exposition format."""
        with self._lock:
            lines = [f"# TYPE {self._prefix}requests counter"] if self._requests else []
            for labels, count in sorted(self._requests.items()):
                lines.append(f"{self._prefix}requests{_shown(labels)} {count}")
            name = ""
            for (histogram, labels), row in sorted(self._histograms.items()):
                if histogram != name:
                    name = histogram
                    lines.append(f"# TYPE {self._prefix}{name} histogram")
                bounds = (*(f"{bound:g}" for bound in _HISTOGRAMS[name][1]), "+Inf")
                for bound, below in zip(bounds, (*row[:-2], row[-1]), strict=True):
                    lines.append(f"{self._prefix}{name}_bucket{_shown((*labels, ('le', bound)))} {below:.15g}")
                lines.append(f"{self._prefix}{name}_sum{_shown(labels)} {row[-2]:.9g}")
                lines.append(f"{self._prefix}{name}_count{_shown(labels)} {row[-1]:.15g}")
        return "".join(f"{line}\n" for line in lines)


def last_number(text: str) -> float | None:
    """Return the last of the times that nginx lists when it tried several peers; None when there is none."""
    part = text.replace(":", ",").rpartition(",")[2].strip()
    try:
        return float(part)
    except ValueError:
        return None


def nginx_metrics(status: Mapping[str, int], prefix: str) -> str:
    """Return nginx's own counters (stub_status) under upstream's names."""
    if not status:
        return ""
    connections, totals = f"{prefix}nginx_process_connections", f"{prefix}nginx_process_connections_total"
    lines = [f"# TYPE {connections} gauge"]
    lines += [
        f'{connections}{{state="{state}"}} {status[state]}' for state in ("active", "reading", "waiting", "writing")
    ]
    lines += [f"# TYPE {totals} counter"]
    lines += [f'{totals}{{state="{state}"}} {status[state]}' for state in ("accepted", "handled")]
    lines += [f"# TYPE {prefix}nginx_process_requests_total counter"]
    lines += [f"{prefix}nginx_process_requests_total {status['requests']}"]
    return "".join(f"{line}\n" for line in lines)


def _shown(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}"
