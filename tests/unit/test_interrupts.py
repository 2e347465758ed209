"""Interrupts that wait until something is whole: when they come through, and that none is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from testbed.kernel.interrupts import HeldInterrupts


def interrupt() -> None:
    """Have a signal come now, as from a terminal."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def own_handlers() -> None:
    """Ctrl-C raises, as in a program that has changed nothing; SIGTERM is not Python's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_it_comes_at_the_end_of_the_block() -> None:
    """What was begun is finished first."""
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        interrupt()
        done.append("finished")
    assert done == ["finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_at_once_where_it_is_let_in() -> None:
    """A window lets it in, and one that had been waiting comes at its beginning."""
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as interrupts:
        interrupt()
        with interrupts.let_in():
            done.append("waited")
    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as interrupts, interrupts.let_in():
        interrupt()
        done.append("not heard")
    assert done == []


def test_cleaning_up_after_one_is_not_interrupted_by_the_next() -> None:
    """A second Ctrl-C waits for the end of what the first has begun, and is not lost."""
    done = []

    def clean_up() -> None:
        interrupt()
        done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as interrupts:
        try:
            with interrupts.let_in():
                interrupt()
        except KeyboardInterrupt:
            clean_up()
            with pytest.raises(KeyboardInterrupt), interrupts.let_in():
                done.append("not reached")
            interrupt()
    assert done == ["cleaned up"]


def test_an_outer_block_holds_what_an_inner_one_lets_in() -> None:
    """Whoever waits inside cannot be interrupted when whoever calls it must not be."""
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        with HeldInterrupts() as inner, inner.let_in():
            interrupt()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_sigterm_is_held_where_a_command_listens_to_it() -> None:
    """A polite end of `testbed bench` waits like Ctrl-C does; one that ends a program at once is left alone."""
    with HeldInterrupts():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        signal.raise_signal(signal.SIGTERM)
        done.append("finished")
    assert done == ["finished"]


def test_what_a_shell_has_ignored_stays_ignored() -> None:
    """A program in a shell's background does not begin to hear Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with HeldInterrupts(signal.default_int_handler) as interrupts, interrupts.let_in():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_too_late() -> None:
    """Once the outcome is settled, what waits and what comes is forgotten."""
    with HeldInterrupts() as interrupts:
        interrupt()
        interrupts.end_deaf()
        interrupt()
    interrupt()


def test_other_threads_are_left_alone() -> None:
    """Signals are the first thread's: in another one the block changes nothing."""
    seen = []

    def work() -> None:
        with HeldInterrupts() as interrupts, interrupts.let_in():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [signal.default_int_handler]


IN_A_DESTRUCTOR = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from testbed.kernel.interrupts import repeat_lost_interrupts

class Falls:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

if len(sys.argv) > 2:
    repeat_lost_interrupts()
try:
    Falls()
    time.sleep(5)
    print("lost")
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.parametrize(("words", "heard"), [((), False), (("repeat",), True)])
def test_one_that_falls_into_a_destructor(words: tuple[str, ...], heard: bool) -> None:
    """Python prints it and goes on; with our hook it comes again, and nothing is printed."""
    root = str(Path(__file__).resolve().parents[2])
    script = IN_A_DESTRUCTOR if heard else IN_A_DESTRUCTOR.replace("sleep(5)", "sleep(0)")
    argv = [sys.executable, "-c", script, root, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ("heard\n" if heard else "lost\n")
    assert ("Exception ignored" in done.stderr) is not heard
