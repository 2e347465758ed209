"""Tests that need what this kernel lacks run in the nested one: all of a session's in one boot, each a test of its own.

A test marked ``ipvs`` runs where it is on a kernel that has ip_vs. On another the outer pytest hands all of them, by their
ids, to a second pytest inside ``testbed vm``, which sends each report back as soon as there is one; a skip or a failure
looks as if the test had run here. Fixtures run inside only. The nested kernel has one processor: it starts before the
first test, and its tests run beside the ones here.

Run as a program (``python nested.py``) it is that second pytest: ids come from standard input, reports go to standard
output, and what it says itself to standard error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

import pytest

from testbed.kernel import linux
from testbed.kernel.modules import why_no_ipvs
from testbed.kernel.pace import is_nested, patient

MARKER = "ipvs"
MEMORY = "3G"
MACHINE = [sys.executable, "-m", "testbed", "vm", "--memory", MEMORY, "--"]
_NESTED_FACTOR = 6
_PIPE_BYTES = 1 << 20
_BOOT_S = 120  # what the first test waits for beside itself: the kernel, pytest, the collection


class NestedTests:
    """The outer pytest's side: runs no marked test itself, and reports what was found about each inside."""

    def __init__(self, ids: set[str], options: list[str]) -> None:
        self._ids = ids
        self._options = options
        self._vm: subprocess.Popen[str] | None = None
        self._log: Any = None
        self._found: dict[str, list[Any]] = {}
        self._done: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the nested kernel for those that were not deselected."""
        ids = [item.nodeid for item in session.items if item.nodeid in self._ids]
        if ids and not session.config.option.collectonly:
            self._vm = self._start(session.config, ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.nodeid not in self._ids:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        if self._vm is not None:
            self._vm.send_signal(signal.SIGKILL)  # with it goes everything inside
            self._vm.wait()

    def _start(self, config: pytest.Config, ids: list[str]) -> subprocess.Popen[str]:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # lives as long as the machine
        command = [*MACHINE, sys.executable, __file__, *self._options]
        vm = subprocess.Popen(
            command, cwd=config.rootpath, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        assert vm.stdin and vm.stdout
        # room for all reports: they are read when the last test from here is over
        fcntl.fcntl(vm.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with contextlib.suppress(BrokenPipeError), vm.stdin:  # it may end at once; what it said is shown with each test
            vm.stdin.write(json.dumps(ids))
        return vm

    def _reports_of(self, item: pytest.Item) -> list[Any]:
        """Wait until a test has been reported whole, or nothing more will come."""
        assert self._vm is not None and self._vm.stdout is not None
        while item.nodeid not in self._done:
            line = self._vm.stdout.readline()
            if not line:
                return [*self._found.pop(item.nodeid, []), self._lost(item)]
            message = json.loads(line)
            if "done" in message:
                self._done.add(message["done"])
            else:
                report = item.config.hook.pytest_report_from_serializable(config=item.config, data=message)
                if isinstance(report.longrepr, list):  # where and why a test was skipped: JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                self._found.setdefault(report.nodeid, []).append(report)
        return self._found.pop(item.nodeid, [])

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        self._log.seek(0)
        said = self._log.read()[-4000:]
        text = f"the nested kernel's pytest ended without a word about this test; it said:\n{said}"
        return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), "failed", text, "call")


def _end_with_parent() -> None:
    linux.set_parent_death_signal(signal.SIGKILL)


def hand_over(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the marked tests run in the nested kernel, or skip them, where this kernel cannot run them."""
    if is_nested():
        for item in items:
            timeout_s = _timeout_of(item)
            if timeout_s:
                item.add_marker(pytest.mark.timeout(patient(timeout_s)), append=False)
        return
    marked = [item for item in items if item.get_closest_marker(MARKER)]
    if not marked or os.geteuid() != 0 or not why_no_ipvs():
        return
    if shutil.which("linux.uml") is None:
        skip = pytest.mark.skip(reason=f"{why_no_ipvs()}, and no nested kernel: apt-get install user-mode-linux")
        for item in marked:
            item.add_marker(skip)
        return
    # last, as nothing is set up here for them: what the test before one of them has set up would stay for the one after it
    items.sort(key=lambda item: item.get_closest_marker(MARKER) is not None)
    for item in marked:
        item.add_marker(pytest.mark.timeout((_timeout_of(item) or 120) * _NESTED_FACTOR + _BOOT_S), append=False)
    options = [name for name in ("--slow",) if config.getoption(name)]
    config.pluginmanager.register(NestedTests({item.nodeid for item in marked}, options), "nested-tests")


def _timeout_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    return float(item.config.getini("timeout") or 0)


class _Reporter:
    """The inner pytest's side: one line of JSON for each report, and one when a test is over."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self._config is not None
        self._say(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._say({"done": nodeid})

    def _say(self, message: object) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


@contextlib.contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Keep standard output for reports, and have what others write to it go to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def main() -> int:
    ids = json.load(sys.stdin)
    with _own_stdout() as out:
        arguments = ["-q", "-p", "no:cacheprovider", "--color=no", *sys.argv[1:], *ids]
        return int(pytest.main(arguments, plugins=[_Reporter(out)]))


if __name__ == "__main__":
    sys.exit(main())
