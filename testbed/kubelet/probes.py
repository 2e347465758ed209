"""When a probe runs and what its results mean. Pure; the agent does the probing.

Source: pkg/kubelet/prober/worker.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FIRST_RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTiming:
    """A probe's numbers, with Kubernetes' defaults."""

    initial_delay_s: float
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int


def timing_of(probe: Mapping[str, Any]) -> ProbeTiming:
    return ProbeTiming(
        initial_delay_s=probe.get("initialDelaySeconds") or 0,
        period_s=probe.get("periodSeconds") or 10,
        timeout_s=probe.get("timeoutSeconds") or 1,
        success_threshold=probe.get("successThreshold") or 1,
        failure_threshold=probe.get("failureThreshold") or 3,
    )


class ProbeState:
    """Counts results in a row and says when the verdict changes.

    The verdict begins as ``begins_as``: False for readiness and startup, True for liveness.
    """

    def __init__(self, timing: ProbeTiming, *, begins_as: bool) -> None:
        self._timing = timing
        self._run = 0
        self._last: bool | None = None
        self._never_succeeded = True
        self._early_tries = 0
        self.verdict = begins_as

    def observe(self, succeeded: bool) -> bool:
        """Take one result; return whether the threshold for it has been reached (again)."""
        self._run = self._run + 1 if succeeded == self._last else 1
        self._last = succeeded
        if succeeded:
            self._never_succeeded = False
        threshold = self._timing.success_threshold if succeeded else self._timing.failure_threshold
        if self._run < threshold:
            return False
        self.verdict = succeeded
        return True

    @property
    def is_hurrying(self) -> bool:
        """Whether tries come more often than once a period: it has not succeeded yet."""
        return self._never_succeeded

    def next_delay_s(self, *, hurry: bool) -> float:
        """Return the time until the next probe.

        With ``hurry`` (readiness and startup), a probe that has never succeeded is tried again after 0.1, 0.2, 0.4 … s:
        waiting out the period would only make starting slower, and no result of it can make anything worse. Only the
        tries that a period would have had are told in events.
        """
        if not hurry or not self._never_succeeded:
            return self._timing.period_s
        self._early_tries += 1
        return min(self._timing.period_s, _FIRST_RETRY_S * 2.0 ** (self._early_tries - 1))


def http_verdict(status: int) -> tuple[bool, str]:
    """Return whether an answer's status means healthy, and the kubelet's words when it does not."""
    return (True, "") if 200 <= status < 400 else (False, f"HTTP probe failed with statuscode: {status}")
