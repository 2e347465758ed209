"""``python -m testbed``, and where the ``testbed`` command starts: Ctrl-C is answered in one line also while we import."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(_number: int, _frame: FrameType | None) -> None:
    # No exception: an import may be inside code that would only print it.
    os.write(2, b"\ninterrupted; nothing was started\n")
    os._exit(130)


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from testbed.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
