"""Folders of scenarios: what is run, in which order, and what shares a lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.cli import run
from testbed.cli.run import RunOptions
from testbed.errors import InputError
from testbed.manifests import find_scenarios, load_scenario

SCENARIO = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {{name: {name}}}
spec:
  topology: {topology}
  proxyModes: [{modes}]
  steps:
    - wait: {{node: {node}, for: ready}}
"""


def write(folder: Path, name: str, modes: str, topology: str = "three-nodes", node: str = "node1") -> Path:
    made = folder / name
    made.mkdir()
    (made / "scenario.yaml").write_text(SCENARIO.format(name=name, modes=modes, topology=topology, node=node))
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
    planned, skipped = run._plan(scenarios, options)
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
