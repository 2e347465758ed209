"""Folders of scenarios: what is run, in which order, and what shares a lab."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from testbed.cli import run
from testbed.cli.run import RunOptions
from testbed.errors import InputError, LabError, ManifestError
from testbed.manifests import find_scenarios, load_scenario
from testbed.scenario.lanes import Lane, count_lanes, split

SCENARIO = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {{name: {name}}}
spec:
  topology: {topology}
  proxyModes: [{modes}]{more}
  steps:
    - wait: {{node: {node}, for: ready}}
"""


def write(
    folder: Path, name: str, modes: str, topology: str = "three-nodes", node: str = "node1", after: str = ""
) -> Path:
    made = folder / name
    made.mkdir()
    more = f"\n  after: {after}" if after else ""
    text = SCENARIO.format(name=name, modes=modes, topology=topology, node=node, more=more)
    (made / "scenario.yaml").write_text(text)
    return made


@pytest.fixture
def course(tmp_path: Path) -> Path:
    for name, modes in (("2-b", "iptables, nftables"), ("1-a", "iptables"), ("3-c", "nftables, iptables")):
        write(tmp_path, name, modes)
    write(tmp_path, "4-d", "iptables", "tutorial", "openeuler-1")
    return tmp_path


def plan(
    given: list[Path], options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return what is run, in order: scenario, mode and what it shares a lab with, on a kernel that has everything."""
    monkeypatch.setattr(run, "_what_is_missing", lambda _mode, _topology, _use_vm: ("", ""))
    scenarios = [
        (path, load_scenario(path), run._course(one, options)) for one in given for path in find_scenarios(one)
    ]
    courses, loaded = run._with_those_before(
        [(path, course) for path, _, course in scenarios], [one for _, one, _ in scenarios]
    )
    planned, skipped = run._plan(
        [(path, scenario, course) for (path, course), scenario in zip(courses, loaded, strict=True)], options
    )
    assert not skipped
    return [(one.scenario.name, one.mode, one.lab_key) for one in planned]


def test_a_folder_of_scenarios(course: Path) -> None:
    """Its scenarios by name; a scenario's own folder is itself."""
    assert [path.name for path in find_scenarios(course)] == ["1-a", "2-b", "3-c", "4-d"]
    assert find_scenarios(course / "1-a") == [course / "1-a"]


def test_what_shares_a_lab(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a course with the same topology and mode, one after the other in the order of their names."""
    found = plan([course], RunOptions(), monkeypatch)
    assert [(name, mode) for name, mode, _ in found] == [
        ("1-a", "iptables"), ("2-b", "iptables"), ("3-c", "iptables"),
        ("2-b", "nftables"), ("3-c", "nftables"),
        ("4-d", "iptables"),
    ]  # fmt: skip
    assert [len({key for _, _, key in found[start:end]}) for start, end in ((0, 3), (3, 5), (5, 6))] == [1, 1, 1]
    assert len({key for _, _, key in found}) == 3


def test_scenarios_given_one_by_one(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a lab of its own, unless --one-lab says otherwise."""
    given = [course / "1-a", course / "2-b"]
    assert {key for _, _, key in plan(given, RunOptions(), monkeypatch)} == {()}
    assert len({key for _, _, key in plan(given, RunOptions(one_lab=True), monkeypatch)}) == 2  # one a mode


def test_of_a_mode_those_are_run_that_name_it(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --proxy-mode the others of a course are left out; a mode that none of them names is refused."""
    options = RunOptions(modes=("nftables",))
    assert [name for name, _, _ in plan([course], options, monkeypatch)] == ["2-b", "3-c"]
    with pytest.raises(InputError, match="is for the proxy modes iptables, nftables; add ipvs to its proxyModes"):
        run._check_written_for([course], [load_scenario(path) for path in find_scenarios(course)], "ipvs")


def test_one_that_goes_on_where_another_ended(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it brings along what comes before it, in the same lab; in the course each runs once."""
    write(course, "5-e", "iptables", after="3-c")
    write(course, "6-f", "iptables", after="5-e")
    found = plan([course / "6-f"], RunOptions(modes=["iptables"]), monkeypatch)
    assert [name for name, _, _ in found] == ["3-c", "5-e", "6-f"]
    assert len({key for _, _, key in found}) == 1 and found[0][2] != ()
    names = [name for name, mode, _ in plan([course], RunOptions(), monkeypatch) if mode == "iptables"]
    assert sorted(names) == ["1-a", "2-b", "3-c", "4-d", "5-e", "6-f"]


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("0-x", "spec.after: no folder '0-x' with a scenario.yaml beside '3-x'"),
        ("../1-a", "spec.after: no folder '../1-a' with a scenario.yaml beside '3-x'"),
        ("4-d", "spec.after: '4-d' must come before '3-x' by name, as in a course"),
        ("3-x", "spec.after: '3-x' must come before '3-x' by name, as in a course"),
        ("1-a", "spec.after: '1-a' is not for proxy mode nftables"),
        ("1-t", "spec.after: '1-t' is for another topology, tutorial.yaml"),
    ],
)
def test_what_cannot_come_before(course: Path, after: str, reason: str) -> None:
    write(course, "1-t", "iptables, nftables", "tutorial", "openeuler-1")
    with pytest.raises(ManifestError) as caught:
        load_scenario(write(course, "3-x", "nftables, iptables", after=after))
    (problem,) = caught.value.problems
    assert str(problem).endswith(reason) and "scenario.yaml:7:" in str(problem)


@pytest.mark.parametrize(
    ("groups", "count", "lanes"),
    [
        ([[5], [3], [4]], 1, [[5, 3, 4]]),
        ([[5], [3], [4]], 2, [[5], [3, 4]]),
        ([[1], [9, 8], [2]], 2, [[1, 2], [9, 8]]),  # what belongs together stays together; the first of all comes first
        ([[7]], 3, [[7]]),
        ([[2], [2], [2], [2]], 2, [[2, 2], [2, 2]]),
    ],
)
def test_lanes(groups: list[list[int]], count: int, lanes: list[list[int]]) -> None:
    assert split(groups, lambda weight: weight, count) == lanes


@pytest.mark.parametrize(
    ("processors", "available_mib", "count"), [(2, 20000, 2), (1, 20000, 1), (64, 99999, 4), (8, 4096, 2), (2, 1000, 1)]
)
def test_how_many_lanes(processors: int, available_mib: int, count: int) -> None:
    assert count_lanes(processors, available_mib, 2048) == count


@pytest.fixture
def other_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python script in the place of `python -m testbed`; the descriptor for results is its last argument."""
    script, python = tmp_path / "script.py", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {shlex.quote(sys.executable)} {script} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(Path(run.__file__).parents[2]))
    return script


def test_a_lane(other_program: Path) -> None:
    """What it says is passed on line by line, and its results arrive, however long they are."""
    other_program.write_text(
        "import sys\nfrom testbed.scenario.nested import send_results\n"
        "print('one'); print('two', file=sys.stderr)\n"
        "send_results(int(sys.argv[-1]), [('x' * 1000000, sys.argv[1])])\nsys.exit(1)\n"
    )
    said: list[str] = []
    with Lane(["run"]) as lane:
        results, status = lane.finish(said.append)
    assert (sorted(said), status) == (["one", "two"], 1)
    assert results == [("x" * 1000000, "run")]


def test_a_lane_that_ends_early(other_program: Path) -> None:
    other_program.write_text("print('no room'); raise SystemExit(3)\n")
    said: list[str] = []
    with Lane([]) as lane, pytest.raises(LabError, match="ended with status 3 and no results"):
        lane.finish(said.append)
    assert said == ["no room"]


def test_a_lane_ends_with_its_block(other_program: Path) -> None:
    other_program.write_text("import time\ntime.sleep(60)\n")
    with Lane([]) as lane:
        pid = lane._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
