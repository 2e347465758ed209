"""How tests of the nested kernel are reported, with an ordinary process in the place of the nested kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

_CONFTEST = """
import os, sys
sys.path.insert(0, {tests!r})
import nested
nested.why_no_ipvs = lambda: "" if os.environ.get("INSIDE") else "no ip_vs"
nested.shutil.which = lambda program: program
nested.MACHINE = ["env", "INSIDE=1"]
def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true")
def pytest_configure(config):
    config.addinivalue_line("markers", "ipvs: x")
def pytest_collection_modifyitems(config, items):
    nested.hand_over(config, items)
"""
_TESTS = """
import os, pytest
def test_outside(): assert "INSIDE" not in os.environ
@pytest.mark.ipvs
@pytest.mark.parametrize("number", [1, 2])
def test_inside(number): assert os.environ["INSIDE"] and number == 1
@pytest.mark.ipvs
def test_skips(): pytest.skip("a reason")
@pytest.mark.ipvs
def test_ends(): print("last words", flush=True); os._exit(9)
@pytest.mark.ipvs
def test_never_runs(): pass
"""


def test_each_is_reported_as_itself(tmp_path: Path) -> None:
    """Passes, failures and skips inside are those of the test outside, with their texts; what is not reported failed."""
    (tmp_path / "conftest.py").write_text(_CONFTEST.format(tests=str(Path(__file__).parents[1])))
    (tmp_path / "test_it.py").write_text(_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rs",
        "-s",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "INSIDE"))}
    done = subprocess.run(
        [*command, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    ends = dict(re.findall(r"^test_it.py::(\S+) (PASSED|FAILED|SKIPPED)", done.stdout, re.MULTILINE))
    assert ends == {
        "test_outside": "PASSED", "test_inside[1]": "PASSED", "test_inside[2]": "FAILED", "test_skips": "SKIPPED",
        "test_ends": "FAILED", "test_never_runs": "FAILED",
    }, done.stdout + done.stderr  # fmt: skip
    assert "assert ('1' and 2 == 1)" in done.stdout
    assert "a reason" in done.stdout
    assert "ended without a word about this test; it said:" in done.stdout
