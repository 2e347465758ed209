"""Whether and when a container that ended is started again. Pure. Source: kubelet.go (MaxContainerBackOff), helpers.go."""

from __future__ import annotations

FIRST_BACK_OFF_S = 10.0
MAX_BACK_OFF_S = 300.0
RESET_AFTER_S = 600.0  # a container that ran this long begins anew


def should_restart(policy: str, exit_code: int) -> bool:
    """Say whether restartPolicy wants a container back that ended with this code."""
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


def next_back_off_s(previous_s: float | None, ran_s: float) -> float:
    """Return how long to wait before the next start: nothing at the first end, then 10 s, 20 s … 300 s.

    Args:
        previous_s: what was waited before the start that has now ended; None for the first start.
        ran_s: how long that start ran.
    """
    if previous_s is None or ran_s >= RESET_AFTER_S:
        return 0.0
    return min(MAX_BACK_OFF_S, max(FIRST_BACK_OFF_S, previous_s * 2))
