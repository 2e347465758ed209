"""How patient to be: the one place that decides how much longer a deadline is where everything is slower.

Deadlines are written for a kernel on real hardware. In the nested kernel a system call costs several times as much, on one
processor, so there every deadline is six times as long; on another slow machine (an emulated one) the environment says how many
times. What a user's file says about time is kept to the letter everywhere else; nothing waits longer than it must, because a
deadline is not a pause.
"""

from __future__ import annotations

import os

from testbed.errors import InputError

#: Set, to anything, in the environment of everything that runs in a nested kernel.
NESTED = "TESTBED_NESTED"

#: How many times as long deadlines are on this machine, a number from 1 on; unset: 1, or in a nested kernel 6.
PATIENCE = "TESTBED_PATIENCE"

_NESTED_FACTOR = 6.0


def is_nested() -> bool:
    """Say whether this process runs in a nested kernel of ours."""
    return bool(os.environ.get(NESTED))


def patient(seconds: float) -> float:
    """Return the deadline to use here for one that was chosen for real hardware.

    Raises:
        InputError: the environment's factor is not a number from 1 on.
    """
    text = os.environ.get(PATIENCE, "")
    if not text:
        return seconds * _NESTED_FACTOR if is_nested() else seconds
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise InputError(f"{PATIENCE}={text!r} is not a number from 1 to 1000")
    return seconds * factor
