"""What both programs answer on their metrics port."""

from __future__ import annotations

from collections.abc import Callable

from testbed.programs.answers import Answer
from testbed.programs.proxy_status import ProxyMetrics


def answer_faces(metrics: ProxyMetrics) -> Callable[[str], Answer]:
    """Return what answers on the metrics port: /metrics, /healthz, /readyz."""

    def answer(path: str) -> Answer:
        if path == "/metrics":
            return Answer(200, metrics.render(), "text/plain; version=0.0.4; charset=utf-8")
        if path in ("/healthz", "/readyz"):
            return Answer(200, "ok")
        return Answer(404, "404 page not found\n")

    return answer
