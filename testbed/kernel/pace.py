"""How patient to be: the one place that decides how much longer a deadline is where everything is slower.

Deadlines are written for a kernel on real hardware. In the nested kernel a system call costs several times as much, on one
processor, so there every deadline is six times as long. What a user's file says about time is kept to the
letter everywhere else; nothing waits longer than it must, because a deadline is not a pause.
"""

from __future__ import annotations

import os

#: Set, to anything, in the environment of everything that runs in a nested kernel.
NESTED = "TESTBED_NESTED"

_NESTED_FACTOR = 6.0


def is_nested() -> bool:
    """Say whether this process runs in a nested kernel of ours."""
    return bool(os.environ.get(NESTED))


def patient(seconds: float) -> float:
    """Return the deadline to use here for one that was chosen for real hardware."""
    return seconds * _NESTED_FACTOR if is_nested() else seconds
