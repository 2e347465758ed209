"""Interrupts that wait while something is only half done: Ctrl-C, and SIGTERM for commands that have asked for it.

Python raises KeyboardInterrupt between any two steps, also between a fork and the moment when somebody knows the child's
pid. A child that nobody knows is never waited for, and a zombie in its PID namespace keeps a whole lab from ending. So what
must not stop halfway is done while interrupts are held, and what may take long, or belongs to the user, lets them in::

    with HeldInterrupts() as interrupts:
        pid = os.fork()                  # whatever is pressed now is heard below
        try:
            with interrupts.let_in():
                wait_for(pid)            # KeyboardInterrupt comes from here
        except BaseException:
            end(pid)                     # held again: a second Ctrl-C does not leave it half ended
            raise

They nest: what an inner block lets in, an outer one still holds. A forked child inherits the state that its parent was in
and has to set its own signals.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_AFTER_S = 0.005

Handler = Callable[[int, FrameType | None], Any]


class HeldInterrupts(AbstractContextManager["HeldInterrupts"]):
    """Holds SIGINT and SIGTERM, as far as Python handles them, for the length of a block; they come through at its end.

    Only the first thread hears signals; in others this does nothing.
    """

    def __init__(self, handler: Handler | None = None) -> None:
        """``handler``: what a signal does once it is let in, unless it is what it did before."""
        self._handler = handler
        self._before: dict[int, Handler] = {}
        self._waiting: list[int] = []
        self._is_open = False
        self._is_over = False

    def __enter__(self) -> HeldInterrupts:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in _NUMBERS:
                    before = signal.getsignal(number)
                    if callable(before):
                        self._before[number] = before
                        signal.signal(number, self._hear)
            except BaseException:  # the second one came through before it was held
                self._end()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._deliver()

    def let_in(self) -> AbstractContextManager[None]:
        """Let interrupts through for the length of a block; one that waits comes at its beginning."""
        return _Window(self)

    def end_deaf(self) -> None:
        """Forget what waits and hear nothing any more, for good: how this process ends is settled."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()
        self._waiting.clear()

    def open(self) -> None:
        self._is_open = True
        self._deliver()

    def close(self) -> None:
        self._is_open = False

    def _end(self) -> None:
        # The handlers pass everything on from here, so it does not matter when each is put back.
        self._is_over = True
        for number, before in self._before.items():
            signal.signal(number, before)

    def _deliver(self) -> None:
        if self._waiting:
            number = self._waiting[0]
            self._waiting.clear()
            self._hear(number, None)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not (self._is_open or self._is_over):
            self._waiting.append(number)
            return
        # Most handlers raise. What follows is cleaning up, and that is held, wherever exactly we were.
        self._is_open = False
        (self._handler or self._before[number])(number, frame)
        self._is_open = True


class _Window(AbstractContextManager[None]):
    def __init__(self, interrupts: HeldInterrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.close()


def repeat_lost_interrupts() -> None:
    """Have a KeyboardInterrupt come again that fell where Python can only print it: in a destructor or a weak reference's call.

    The import system has one of these at the end of every import.
    """
    show = sys.unraisablehook

    def look(what: UnraisableHookArgs) -> None:
        if what.exc_type is not KeyboardInterrupt:
            show(what)
            return
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER_S)  # not now: we are still in there

    sys.unraisablehook = look
