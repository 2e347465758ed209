"""What a running kube-proxy says of itself: health, and counters for /metrics. Holds no thread and reads no clock.

Source: kubernetes pkg/proxy/healthcheck/proxier_health.go, pkg/proxy/metrics/metrics.go (v1.30).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from testbed.model.service import NodeView

_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"
_BUCKETS_S = tuple(0.001 * 2**k for k in range(15))
_BUCKETS_OF: Mapping[str, Sequence[float]] = {
    "network_programming_duration_seconds": (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
}


class ProxyHealth:
    """Healthy as long as no change has waited longer than ``timeout_s`` for a sync. Used from several threads."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._queued_s: float | None = None
        self._updated_s = 0.0
        self._eligible = True
        self._refused: tuple[str, ...] = ()

    def queued(self, now_s: float) -> None:
        with self._lock:
            if self._queued_s is None:
                self._queued_s = now_s

    def updated(self, now_s: float) -> None:
        with self._lock:
            self._queued_s, self._updated_s = None, now_s

    def refused(self, names: Iterable[str]) -> None:
        """Take note of the service ports whose rules the kernel does not take. While there are any, they wait for a sync."""
        with self._lock:
            self._refused = tuple(names)

    def saw_node(self, node: NodeView) -> None:
        with self._lock:
            self._eligible = not node.is_deleting and _AUTOSCALER_TAINT not in node.taints

    def is_healthy(self, now_s: float) -> bool:
        with self._lock:
            return self._queued_s is None or now_s - self._queued_s < self._timeout_s

    def healthz(self, now_s: float) -> tuple[int, str]:
        """Return status and body of /healthz, which also asks whether the node is to receive traffic."""
        with self._lock:
            eligible = self._eligible
        status = 200 if self.is_healthy(now_s) and eligible else 503
        return status, f'{{{self._times(now_s)}, "nodeEligible": {str(eligible).lower()}}}'

    def livez(self, now_s: float) -> tuple[int, str]:
        return (200 if self.is_healthy(now_s) else 503), f"{{{self._times(now_s)}}}"

    def _times(self, now_s: float) -> str:
        with self._lock:
            updated = self._updated_s
        updated = now_s if self.is_healthy(now_s) else updated
        text = f'"lastUpdated": "{_go_time(updated)}","currentTime": "{_go_time(now_s)}"'
        with self._lock:
            return f'{text}, "refused": {json.dumps(self._refused)}' if self._refused else text


def _go_time(now_s: float) -> str:
    moment = datetime.fromtimestamp(now_s, UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond * 1000:09d} +0000 UTC"


@dataclass
class Histogram:
    bounds_s: Sequence[float] = _BUCKETS_S
    counts: list[int] = field(default_factory=list)
    total: int = 0
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.bounds_s)

    def observe(self, value_s: float) -> None:
        self.total += 1
        self.sum_s += value_s
        for index, bound in enumerate(self.bounds_s):
            self.counts[index] += value_s <= bound

    def render(self, name: str) -> list[str]:
        lines = [f"# TYPE {name} histogram"]
        lines += [
            f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in zip(self.bounds_s, self.counts, strict=True)
        ]
        return [
            *lines,
            f'{name}_bucket{{le="+Inf"}} {self.total}',
            f"{name}_sum {self.sum_s:.9g}",
            f"{name}_count {self.total}",
        ]


class ProxyMetrics:
    """Counters, gauges and histograms under upstream's names."""

    def __init__(self, prefix: str = "kubeproxy_") -> None:
        self._prefix = prefix
        self._lock = threading.Lock()
        self._histograms: dict[str, Histogram] = {}
        self._values: dict[str, dict[str, float]] = {}
        self._kinds: dict[str, str] = {}

    def observe(self, name: str, value_s: float) -> None:
        with self._lock:
            self._histograms.setdefault(name, Histogram(_BUCKETS_OF.get(name, _BUCKETS_S))).observe(value_s)

    def count(self, name: str, /, by: float = 1, **labels: str) -> None:
        with self._lock:
            self._kinds[name] = "counter"
            series = self._values.setdefault(name, {})
            key = _labels(labels)
            series[key] = series.get(key, 0) + by

    def set(self, name: str, value: float, /, **labels: str) -> None:
        with self._lock:
            self._kinds[name] = "gauge"
            self._values.setdefault(name, {})[_labels(labels)] = value

    def replace(self, name: str, series: Iterable[tuple[Mapping[str, str], float]]) -> None:
        """Make these, of labels and value, the only series of a gauge."""
        with self._lock:
            self._kinds[name] = "gauge"
            self._values[name] = {_labels(labels): value for labels, value in series}

    def drop(self, name: str, /, **labels: str) -> None:
        """Forget a series: what it counted is no longer there."""
        with self._lock:
            self._values.get(name, {}).pop(_labels(labels), None)

    def value(self, name: str, /, **labels: str) -> float:
        with self._lock:
            return self._values.get(name, {}).get(_labels(labels), 0)

    def samples(self, name: str) -> int:
        """Return how many values a histogram has seen."""
        with self._lock:
            return self._histograms[name].total if name in self._histograms else 0

    def render(self) -> str:
        """Return the text exposition format, sorted by name."""
        with self._lock:
            lines: list[str] = []
            for name in sorted(self._values.keys() | self._histograms.keys()):
                if name in self._histograms:
                    lines += self._histograms[name].render(f"{self._prefix}{name}")
                    continue
                lines.append(f"# TYPE {self._prefix}{name} {self._kinds[name]}")
                lines += [
                    f"{self._prefix}{name}{key} {value:.15g}" for key, value in sorted(self._values[name].items())
                ]
            return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}" if labels else ""
