"""What every test may use: the long-form switch, root checks, and waiting for something without sleeping."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TypeVar

import hypothesis
import pytest
from nested import hand_over

from testbed.kernel.pace import patient

T = TypeVar("T")

# An example's time says how busy the machine is, not what is right.
hypothesis.settings.register_profile("testbed", deadline=None)
hypothesis.settings.load_profile("testbed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long forms as well")
    parser.addoption("--update-golden", action="store_true", help="write what comes out now into the golden files")


def pytest_configure() -> None:
    """Hear Ctrl-C, and have programs under test hear it, also where a shell has put us into the background deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root, for network namespaces"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long form: ./dev test --slow"))
    hand_over(config, items)


def eventually(check: Callable[[], T], *, within_s: float = 30.0) -> T:
    """Return the first true answer of ``check``; fail with the last answer when time is over.

    The time is a deadline and no pause: long, so that only what never comes fails on a busy machine.
    """
    deadline = time.monotonic() + patient(within_s)
    while True:
        seen = check()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {within_s:g} s; last seen: {seen!r}")
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., object]:
    return eventually
