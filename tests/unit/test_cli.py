"""The command line as a user meets it: what is printed where, and the exit status. Nothing here needs root or starts a lab."""

# ruff: noqa: E501  # whole outputs

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jsonschema
import pytest
import yaml
from controllers_world import World
from scenario_world import FakeLab

import testbed.cli.run
import testbed.lab.folder
import testbed.lab.start
import testbed.scenario.modes
from testbed import __version__
from testbed.cli.main import main
from testbed.errors import LabError, MissingFeature
from testbed.kernel.pace import NESTED
from testbed.kernel.processes import Completed
from testbed.manifests import find_topology, load_scenario, load_topology
from testbed.scenario.runner import run_scenario

OURS = sorted((Path(__file__).parents[2] / "topologies").glob("*.yaml"))
MANIFEST = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: wep}
  prots: [{port: 80}]
  type: NodePort
  ports: [{port: 80, nodePort: 80}]
"""
MANIFEST_PROBLEMS = [
    "manifest.yaml:5: warning: spec.selector: Service default/web: selector 'app=wep' matches no pod of these manifests",
    'manifest.yaml:6: spec: unknown field "prots" (did you mean "ports"?)',
    "manifest.yaml:8: spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. "
    "The range of valid ports is 30000-32767",
]
TOPOLOGY = """\
apiVersion: testbed/v1
kind: Topology
metadata: {name: t}
spec:
  networks:
    - {name: lan, cidr: 192.168.1.0/24}
  nodes:
    - {name: node1, network: lam, address: 192.168.1.11}
  hosts:
    - {name: client, network: lan, addres_: 192.168.2.100}
"""
TOPOLOGY_PROBLEMS = [
    "topology.yaml:8: spec.nodes[0].network: no network is called 'lam' (did you mean \"lan\"?)",
    'topology.yaml:10: spec.hosts[0]: required field "address" is missing',
    'topology.yaml:10: spec.hosts[0]: unknown field "addres_" (did you mean "address"?)',
]
SCENARIO = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {name: s}
spec:
  topology: three-nodes
  proxyModes: [iptables, ipvs]
  steps:
    - exec: {in: node1, run: ls, prints: hello}
    - name: never seen
      exec: {in: node9, run: ls}
"""
GOOD = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: web}}
spec: {containers: [{name: a, image: nginx}]}
"""
FILES = {
    "manifest.yaml": MANIFEST,
    "topology.yaml": TOPOLOGY,
    "good.yaml": GOOD,
    "warned.yaml": GOOD.partition("---")[0],
    "syntax.yaml": "a: [\n",
    "empty.yaml": "",
    "scenario/scenario.yaml": SCENARIO,
    "runs/scenario.yaml": SCENARIO.replace("node9", "node2"),
    "other/scenario.yaml": SCENARIO.replace("node9", "node2")
    .replace("{name: s}", "{name: other}")
    .replace(", ipvs", ""),
}


class Ended(NamedTuple):
    """A command's end."""

    status: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        return self.err.splitlines()


Testbed = Callable[..., Ended]


@pytest.fixture
def testbed_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Testbed:
    """Run `testbed WORDS...` in a folder with the files above; a lab that is started fails the test."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    # labs that run on this machine are not these tests' business: they are neither seen nor ended
    monkeypatch.setattr(testbed.lab.folder, "state_root", lambda: tmp_path / "state")
    monkeypatch.setattr(testbed.lab.start, "end_process_tree", lambda *_: pytest.fail("a lab was ended"))
    assert testbed.lab.folder.list_records() == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(testbed.lab.start, "_TOOLS", {})  # what is installed here is not what is tested

    def started(*_: object, **__: object) -> NoReturn:
        pytest.fail("a lab was started")

    monkeypatch.setattr(testbed.lab.start, "start_lab", started)
    monkeypatch.setattr(testbed.cli.run, "start_lab", started)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["testbed", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ended(ended.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


# ── validate and schema ─────────────────────────────────────────────────────────────────────────────────────────────


def test_validate_good_files(testbed_: Testbed) -> None:
    """One line, status 0."""
    assert testbed_("validate", "good.yaml") == (0, "1 file is valid\n", "")
    assert testbed_("validate", "good.yaml", "runs") == (0, "2 files are valid\n", "")


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.stem)
def test_our_topologies_are_valid(testbed_: Testbed, file: Path) -> None:
    """Every topology that is shipped."""
    assert testbed_("validate", str(file)) == (0, "1 file is valid\n", "")


def test_validate_says_everything_at_once(testbed_: Testbed) -> None:
    """Each problem of each file with file and line, in order; status 2; nothing on standard output."""
    ended = testbed_("validate", "topology.yaml", "manifest.yaml", "scenario", "good.yaml", "nope.yaml")
    assert (ended.status, ended.out) == (2, "")
    assert ended.problems == [
        # good.yaml has a Pod, but not with the label that manifest.yaml's Service selects
        *MANIFEST_PROBLEMS,
        "nope.yaml: no such file",
        "scenario/scenario.yaml:10: spec.steps[1].exec.in: topology 'three-nodes' has no node or host 'node9' (did you mean \"node3\"?)",
        *TOPOLOGY_PROBLEMS,
    ]


def test_warnings_do_not_fail(testbed_: Testbed) -> None:
    """A Service that selects nothing is said, and valid."""
    ended = testbed_("validate", "warned.yaml")
    assert (ended.status, ended.out) == (0, "1 file is valid\n")
    assert ended.problems == [
        "warned.yaml:4: warning: spec.selector: Service default/web: selector 'app=web' matches no pod of these manifests"
    ]


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("syntax.yaml", "syntax.yaml:2: YAML syntax: while parsing a flow node, did not find expected node content"),
        ("empty.yaml", "empty.yaml: is empty"),
        ("nope.yaml", "nope.yaml: no such file"),
        ("state", "state/scenario.yaml: no such file"),
    ],
)
def test_files_that_cannot_be_read(testbed_: Testbed, file: str, problem: str) -> None:
    """A line and status 2 for each."""
    assert testbed_("validate", file) == (2, "", f"{problem}\n")


def test_validate_wants_a_file(testbed_: Testbed) -> None:
    """Usage errors are status 2 as well."""
    ended = testbed_("validate")
    assert ended.status == 2
    assert "Missing argument 'FILE...'" in ended.err


@pytest.mark.parametrize(("kind", "file"), [("topology", OURS[0]), ("scenario", Path("runs/scenario.yaml"))])
def test_schema(testbed_: Testbed, kind: str, file: Path) -> None:
    """A JSON Schema that takes a good file and refuses an unknown field."""
    ended = testbed_("schema", kind)
    assert (ended.status, ended.err) == (0, "")
    schema = json.loads(ended.out)
    jsonschema.validators.validator_for(schema).check_schema(schema)
    document = yaml.safe_load(file.read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "speck": {}}, schema)


def test_schema_of_what_there_is_none(testbed_: Testbed) -> None:
    """Manifests have Kubernetes' own."""
    ended = testbed_("schema", "manifest")
    assert ended.status == 2
    assert "'manifest' is not one of 'topology', 'scenario'" in ended.err


# ── up ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["-t", "topology.yaml", "-f", "manifest.yaml", "-f", "nope.yaml"],
         [*MANIFEST_PROBLEMS, "nope.yaml: no such file", *TOPOLOGY_PROBLEMS]),
        (["-t", "three-nods", "-f", "manifest.yaml"],
         [*MANIFEST_PROBLEMS, "three-nods: there is no topology 'three-nods' (did you mean \"three-nodes\"?)"]),
    ],
)  # fmt: skip
def test_up_says_everything_and_starts_nothing(testbed_: Testbed, words: list[str], problems: list[str]) -> None:
    """Topology and manifests together, before anything is touched."""
    ended = testbed_("up", *words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.problems == problems


@pytest.mark.parametrize("file", ["runs", "runs/scenario.yaml", str(OURS[0])])
def test_up_takes_only_objects_for_manifests(testbed_: Testbed, file: str) -> None:
    """A scenario or a topology is not something to apply; that is known before anything starts."""
    assert testbed_("up", "-f", file).status == 2


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["up", "--proxy-mode", "iptable"], 2, "there is no proxy mode 'iptable'; the modes are userspace, iptables, ipvs, nftables"),
        (["run", "runs", "--proxy-mode", "iptable"], 2, "there is no proxy mode 'iptable'; the modes are userspace, iptables, ipvs, nftables"),
        (["run", "runs", "--report", "good.yaml/x"], 2, "cannot write reports into 'good.yaml/x': Not a directory"),
        (["exec", "node1"], 2, "nothing to run in 'node1': testbed exec node1 -- CMD..."),
        (["exec", "node1", "--"], 2, "nothing to run in 'node1': testbed exec node1 -- CMD..."),
    ],
)  # fmt: skip
def test_one_line_and_a_status(testbed_: Testbed, words: list[str], status: int, error: str) -> None:
    """2: what was typed is wrong; 3: this machine or version cannot."""
    assert testbed_(*words) == (status, "", f"error: {error}\n")


@pytest.mark.parametrize("words", [["up"], ["run", "runs"], ["run", "runs", "-o", "json"]])
def test_without_root(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Said in one line."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert testbed_(*words) == (2, "", "error: a lab needs root: run this command as root, or with sudo\n")


def test_a_bad_file_is_told_without_root(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not start a lab may still learn what is wrong with a file."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert testbed_("up", "-t", "topology.yaml").problems == TOPOLOGY_PROBLEMS
    assert testbed_("run", "nope").problems == ["nope: no such file"]


def test_missing_tools(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with their packages; status 3."""
    monkeypatch.setattr(testbed.lab.start, "_TOOLS", {"no-such-b": "b-tools", "no-such-a": "a-tools", "sh": "dash"})
    assert testbed_("up") == (
        3, "", "error: missing: no-such-b, no-such-a; install with `apt-get install a-tools b-tools`, or run `./dev setup`\n"
    )  # fmt: skip


# ── labs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_lab_is_running(testbed_: Testbed) -> None:
    """An empty list is a list; a lab that is wanted and not there is status 3."""
    assert testbed_("ls", "-o", "json") == (0, "[]\n", "")
    assert testbed_("ls") == (0, "", "no lab is running; start one with `testbed up`\n")
    assert testbed_("down", "--all") == (0, "no lab is running\n", "")
    for words in (["down"], ["exec", "node1", "--", "ls"], ["shell", "node1"], ["cli"]):
        ended = testbed_(*words)
        assert (ended.status, ended.out) == (3, ""), words
        assert ended.err.startswith("error: no lab is running"), words
        assert len(ended.problems) == 1


@pytest.mark.parametrize(
    ("command", "formats"), [(["ls"], "'text', 'json'"), (["run", "runs"], "'text', 'json', 'junit'")]
)
def test_output_formats(testbed_: Testbed, command: list[str], formats: str) -> None:
    """What there is, is told."""
    ended = testbed_(*command, "-o", "yaml")
    assert ended.status == 2
    assert f"'yaml' is not one of {formats}" in ended.err


def test_version_and_help(testbed_: Testbed) -> None:
    """Every command has a line in the help."""
    assert testbed_("--version").out == f"testbed, version {__version__}\n"
    shown = testbed_("--help")
    assert shown.status == 0
    lines = shown.out.partition("Commands:\n")[2].splitlines()
    described = {line.split()[0] for line in lines if len(line.split()) > 1}
    assert described >= {"up", "down", "ls", "exec", "shell", "cli", "run", "validate", "schema"}
    assert testbed_("-h").out == shown.out


def test_an_unknown_command(testbed_: Testbed) -> None:
    """Usage, status 2."""
    ended = testbed_("upp")
    assert ended.status == 2
    assert "No such command 'upp'" in ended.err


# ── run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_in_a_mode_that_the_scenario_does_not_name(testbed_: Testbed) -> None:
    """What a scenario expects may be wrong in another mode; the file says where it is right."""
    Path("other/scenario.yaml").write_text(Path("other/scenario.yaml").read_text().replace("[iptables]", "[ipvs]"))
    assert testbed_("run", "runs", "other", "--proxy-mode", "iptables") == (
        2, "", "error: other/scenario.yaml: is for the proxy modes ipvs; add iptables to its proxyModes to run it there\n"
    )  # fmt: skip


def test_run_of_bad_scenarios(testbed_: Testbed) -> None:
    """All problems of all of them, before anything runs."""
    ended = testbed_("run", "nope", "scenario", "runs")
    assert (ended.status, ended.out) == (2, "")
    assert ended.problems == [
        "nope: no such file",
        "scenario/scenario.yaml:10: spec.steps[1].exec.in: topology 'three-nodes' has no node or host 'node9' (did you mean \"node3\"?)",
    ]


class RunningLab(FakeLab):
    """A lab that can be kept."""

    def __init__(self) -> None:
        super().__init__(World(), load_topology(find_topology("three-nodes")))
        self.kept = False

    def detach(self) -> None:
        self.kept = True

    def __enter__(self) -> RunningLab:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def labs(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], RunningLab]]:
    """The labs that are started, with how; programs print hello."""
    started: list[tuple[dict[str, Any], RunningLab]] = []

    def start_lab(_topology: object, **how: Any) -> RunningLab:
        lab = RunningLab()
        lab.programs = lambda _run: Completed(0, b"hello\n", b"")
        started.append((how, lab))
        return lab

    monkeypatch.setattr(testbed.cli.run, "start_lab", start_lab)
    monkeypatch.setattr(testbed.cli.run, "choose_iptables_backend", lambda wanted: wanted or "nft")
    # which modes there are is not what is tested: one of the two can be run
    monkeypatch.setattr(testbed.cli.run, "why_not", lambda mode: "" if mode == "iptables" else f"{mode} is not there")
    return started


Labs = list[tuple[dict[str, Any], RunningLab]]


def test_run_passes(testbed_: Testbed, labs: Labs) -> None:
    """Each step as it passes, what was skipped and why, a summary; status 0."""
    ended = testbed_("run", "runs")
    assert (ended.status, ended.err) == (0, "")
    how = {name: value for name, value in labs[0][0].items() if name != "interrupts"}
    assert how == {"name": "s", "proxy_mode": "iptables", "iptables_backend": "nft", "attached": True}
    lines = ended.out.splitlines()
    assert lines[0] == "s, proxy mode iptables, lab s"
    assert [line[:30].rstrip() for line in lines[1:3]] == ["  ✓ 1/2 node1: ls prints 'hell", "  ✓ 2/2 never seen"]
    assert lines[3] == "skipped: s in ipvs: ipvs is not there"
    assert [line.split() for line in lines[-2:]] == [
        ["SCENARIO", "MODE", "STEPS", "RESULT", "TIME"],
        ["s", "iptables", "2/2", "passed", "0.0", "s"],
    ]
    assert not labs[0][1].kept


NESTED_LINE = "this kernel has no y; running s in ipvs in the nested kernel (testbed vm)"


@pytest.fixture
def nested(testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A kernel that lacks something for ipvs mode, and a nested one that has it: the arguments it is given."""
    asked: list[list[str]] = []

    def run_nested(arguments: Sequence[str], shared: Path | None = None) -> tuple[Any, int]:
        asked.append(list(arguments))
        scenario = load_scenario(Path("runs"))
        lab = RunningLab()
        lab.programs = lambda _run: Completed(0, b"hello\n", b"")
        result = run_scenario(scenario, "ipvs", lab)
        return [(replace(result, nested=True), "s")], 0

    monkeypatch.setattr(testbed.cli.run, "why_not", lambda mode: "")
    monkeypatch.setattr(
        testbed.cli.run, "why_not_here", lambda mode, *_: "this kernel has no y" if mode == "ipvs" else ""
    )
    monkeypatch.setattr(testbed.cli.run, "check_vm", lambda: None)
    monkeypatch.setattr(testbed.cli.run, "run_nested", run_nested)
    return asked


def test_run_uses_the_nested_kernel_for_what_is_missing(testbed_: Testbed, labs: Labs, nested: list[list[str]]) -> None:
    """One line says so; only that mode is nested; the report is one, in the order of the file, and says what was nested."""
    ended = testbed_("run", "runs")
    assert ended.status == 0, ended.err
    assert NESTED_LINE in ended.out.splitlines()
    assert [how["proxy_mode"] for how, _ in labs] == ["iptables"]
    assert nested == [["run", "runs", "--proxy-mode", "ipvs"]]
    assert [line.split()[:3] for line in ended.out.splitlines()[-2:]] == [
        ["s", "iptables", "2/2"],
        ["s", "ipvs", "(nested)"],
    ]


def test_nested_results_in_documents(testbed_: Testbed, nested: list[list[str]], tmp_path: Path) -> None:
    """JSON, JUnit and the files of --report hold both kernels' results; progress does not get into the document."""
    ended = testbed_("run", "runs", "-o", "json", "--report", str(tmp_path / "out"))
    assert [(one["mode"], one["kernel"]) for one in json.loads(ended.out)["results"]] == [
        ("iptables", "own"),
        ("ipvs", "nested"),
    ]
    assert NESTED_LINE in ended.err.splitlines()
    assert nested[0][-2:] == ["-o", "json"]
    assert json.loads((tmp_path / "out" / "scenario.json").read_text()) == json.loads(ended.out)
    assert 'name="kernel" value="nested"' in (tmp_path / "out" / "junit.xml").read_text()


def test_no_vm_refuses(testbed_: Testbed, nested: list[list[str]]) -> None:
    """A mode asked for by name is refused with --no-vm; one that the file names is skipped, with the reason."""
    ended = testbed_("run", "runs", "--no-vm", "--proxy-mode", "ipvs")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err == "error: this kernel has no y, and --no-vm keeps it out of the nested kernel\n"
    ended = testbed_("run", "runs", "--no-vm")
    assert ended.status == 0
    assert "skipped: s in ipvs: this kernel has no y, and --no-vm" in ended.out
    assert not nested


def test_no_nested_kernel_either(testbed_: Testbed, nested: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no nested kernel either, both reasons are said, with the package to install."""

    def check_vm() -> None:
        raise MissingFeature("linux.uml not found (apt-get install user-mode-linux)")

    monkeypatch.setattr(testbed.cli.run, "check_vm", check_vm)
    ended = testbed_("run", "runs", "--proxy-mode", "ipvs")
    assert (ended.status, ended.err) == (
        3,
        "error: this kernel has no y; linux.uml not found (apt-get install user-mode-linux)\n",
    )


def test_a_nested_lab_cannot_be_kept(testbed_: Testbed, nested: list[list[str]]) -> None:
    """--keep is refused before anything runs when the last lab would end with its kernel."""
    ended = testbed_("run", "runs", "--keep")
    assert ended.status == 2
    assert "--keep: the last lab, of s in ipvs, is in a nested kernel that ends with this command" in ended.err
    assert not nested


def test_up_says_what_to_type(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` in a mode that this kernel lacks ends with 3 and the same command for the nested kernel."""
    monkeypatch.setattr(testbed.scenario.modes, "why_not", lambda mode: "")
    monkeypatch.setattr(testbed.scenario.modes, "why_not_here", lambda *_: "this kernel has no ip_vs")
    monkeypatch.setattr(testbed.lab.start, "check_machine", lambda *_: None)
    ended = testbed_("up", "my-lab", "--proxy-mode", "ipvs")
    assert ended.status == 3
    assert ended.err.splitlines() == [
        "error: this kernel has no ip_vs. A lab in the nested kernel, for as long as its shell runs:",
        "  testbed vm -- bash -c 'testbed up my-lab --proxy-mode ipvs; exec bash'",
    ]


@pytest.mark.parametrize(
    ("argv", "is_nested", "reason"),
    [
        (["up", "my-lab"], False, "no NAT; the nested kernel (User-Mode Linux) has no NAT in nf_tables"),
        (["up", "my-lab"], True, "no NAT"),
        (["run", "runs"], False, "no NAT; the nested kernel (User-Mode Linux) has no NAT in nf_tables"),
        (["run", "runs"], True, "no NAT"),
    ],
)
def test_a_mode_that_no_kernel_here_can_run(
    argv: list[str], is_nested: bool, reason: str, testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """nftables mode where nf_tables has no NAT is refused at once, with no advice that would lead to the same."""
    Path("runs/scenario.yaml").write_text(Path("runs/scenario.yaml").read_text().replace("ipvs", "nftables"))
    monkeypatch.setattr(testbed.cli.run, "why_not", lambda mode: "")
    monkeypatch.setattr(testbed.scenario.modes, "why_not", lambda mode: "")
    monkeypatch.setattr(testbed.scenario.modes, "why_no_nat_in_nftables", lambda: "no NAT")
    monkeypatch.setattr(testbed.lab.start, "check_machine", lambda *_: None)
    if is_nested:
        monkeypatch.setenv(NESTED, "1")
    ended = testbed_(*argv, "--proxy-mode", "nftables")
    assert (ended.status, ended.out, ended.err) == (3, "", f"error: {reason}\n")
    assert labs == []


def test_run_fails(testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed scenario makes status 1; the others run all the same."""

    def start_lab(_topology: object, **how: Any) -> RunningLab:
        lab = RunningLab()
        lab.programs = lambda _run: Completed(0, b"hello" if how["name"] == "other" else b"bye", b"")
        labs.append((how, lab))
        return lab

    monkeypatch.setattr(testbed.cli.run, "start_lab", start_lab)
    ended = testbed_("run", "runs", "other")
    assert ended.status == 1
    assert [how["name"] for how, _ in labs] == ["s", "other"]
    assert (
        "      wanted  status 0, 'hello' printed\n      seen    status 0, printed 'bye'\n      where   `ls` in node1\n"
        in ended.out
    )
    assert "  - 2/2 never seen (not run)\n" in ended.out
    assert [line.split()[3] for line in ended.out.splitlines()[-2:]] == ["failed", "passed"]


def test_run_on_a_kernel_without_a_feature(testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario whose topology no kernel here can make is skipped by name; when there is no other one, the status is 3."""

    def check_vm() -> NoReturn:
        raise MissingFeature("there is no nested kernel")

    monkeypatch.setattr(testbed.cli.run, "check_vm", check_vm)
    monkeypatch.setattr(testbed.scenario.modes, "has_netem", lambda: False)
    folder = Path("far")
    folder.mkdir()
    topology = (
        find_topology("three-nodes")
        .read_text()
        .replace("spec:\n", "spec:\n  links: [{between: [client, lan], delay: 1ms}]\n")
    )
    (folder / "three-nodes.yaml").write_text(topology)
    (folder / "scenario.yaml").write_text(Path("runs/scenario.yaml").read_text().replace("name: s", "name: far"))
    lacks = (
        "topology 'three-nodes': delay and loss need the kernel's netem (sch_netem), which this kernel does not have; "
    )
    ended = testbed_("run", "runs", "far")
    assert (ended.status, len(labs)) == (0, 1)
    (skipped,) = [line for line in ended.out.splitlines() if line.startswith("skipped: far in iptables: ")]
    assert skipped.startswith(f"skipped: far in iptables: {lacks}")
    assert skipped.endswith("; there is no nested kernel")
    alone = testbed_("run", "far")
    assert (alone.status, alone.out, len(labs)) == (3, "", 1)
    assert lacks in alone.err


def test_run_as_json(testbed_: Testbed, labs: Labs) -> None:
    """Standard output is the document alone; progress goes to standard error."""
    ended = testbed_("run", "runs", "-o", "json")
    document = json.loads(ended.out)
    assert (ended.status, document["passed"]) == (0, True)
    assert [step["status"] for step in document["results"][0]["steps"]] == ["passed", "passed"]
    assert document["results"][0]["lab"] == labs[0][0]["name"]
    assert [(one["scenario"], one["mode"]) for one in document["skipped"]] == [("s", "ipvs")]
    assert ended.problems[0] == "s, proxy mode iptables, lab s"


def test_run_as_junit(testbed_: Testbed, labs: Labs) -> None:
    """One entry for each step."""
    ended = testbed_("run", "other", "-o", "junit")
    assert [case.attrib["name"] for case in ElementTree.fromstring(ended.out.encode()).iter("testcase")] == [
        "1. node1: ls prints 'hello'", "2. never seen"
    ]  # fmt: skip
    assert len(labs) == 1


def test_run_writes_reports(testbed_: Testbed, labs: Labs) -> None:
    """Whatever is printed."""
    assert testbed_("run", "other", "--report", "out/reports").status == 0
    assert sorted(file.name for file in Path("out/reports").iterdir()) == [
        "junit.xml",
        "observations.json",
        "scenario.json",
    ]
    assert len(labs) == 1


def test_run_keeps_the_last_lab(testbed_: Testbed, labs: Labs) -> None:
    """Only that one, and says how to use it."""
    ended = testbed_("run", "runs", "other", "--keep")
    assert [lab.kept for _, lab in labs] == [False, True]
    assert "lab other is kept: `testbed exec -l other …`, `testbed down other`\n" in ended.out


@pytest.mark.parametrize(
    ("options", "but_for"), [([], ""), (["--keep"], ", but for lab other, which is kept: `testbed down other`")]
)
def test_ctrl_c_after_the_last_lab(
    testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch, options: list[str], but_for: str
) -> None:
    """What is left is told: nothing, or the lab that was to be kept and is."""

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(testbed.cli.run, "_report", interrupted)
    ended = testbed_("run", "runs", "other", *options)
    assert (ended.status, labs[-1][1].kept) == (130, bool(options))
    assert ended.err.strip() == f"interrupted: what this command had started is gone{but_for}"


def test_a_lab_that_does_not_start(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words and status."""

    def broken(*_: object, **__: object) -> NoReturn:
        raise LabError("lab 's' died while starting, after phase 'underlay'")

    monkeypatch.setattr(testbed.cli.run, "start_lab", broken)
    ended = testbed_("run", "runs")
    assert (ended.status, ended.err) == (3, "error: lab 's' died while starting, after phase 'underlay'\n")


def test_ctrl_c(testbed_: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130; the line begins below the terminal's ^C."""

    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(testbed.cli.run, "start_lab", interrupted)
    assert testbed_("run", "runs") == (130, "", "\ninterrupted: what this command had started is gone\n")


# ── what cannot be written, read or waited for ──────────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parents[2]


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line, sys.executable], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )


@pytest.mark.parametrize("words", ["schema topology", "--help", "--version"])
def test_output_that_cannot_be_written(words: str) -> None:
    """One line, status 3; to a reader that has gone, nothing, and the status of a program that SIGPIPE has ended."""
    full = in_shell(f'"$0" -m testbed {words} > /dev/full')
    assert (full.returncode, full.stderr) == (3, "error: No space left on device\n")
    unread = in_shell(f'"$0" -m testbed {words} | true; echo ${{PIPESTATUS[0]}}')
    assert (unread.stdout, unread.stderr) == ("141\n", "")


def test_an_interrupt_while_modules_are_imported() -> None:
    """Whenever it comes: one line, status 130."""
    code = "import sys, os, signal, runpy; sys.argv = ['testbed', '--version']\n"
    code += "class Interrupted:\n    def find_spec(self, name, *_):\n"
    code += "        if name == 'testbed.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Interrupted()); runpy.run_module('testbed', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted; nothing was started\n")


def test_a_program_without_a_name(testbed_: Testbed) -> None:
    """Said before a lab is asked."""
    assert testbed_("exec", "node1", "--", "") == (
        2, "", "error: cannot run '' in 'node1': the name of a program is empty\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/tty"])
def test_files_without_an_end(testbed_: Testbed, name: str) -> None:
    """A pipe or device is refused and not read."""
    os.mkfifo("pipe")
    assert testbed_("validate", name) == (2, "", f"{name}: cannot be read: it is not a regular file\n")


def record(**changes: object) -> str:
    good: dict[str, object] = {
        "name": "bad", "pid": 99999999, "started": 1.0, "topology": "t", "nodes": ["n"], "proxy_mode": "iptables",
        "iptables_backend": "nft", "unknown_to_us": 1,
    }  # fmt: skip
    return json.dumps({key: value for key, value in {**good, **changes}.items() if value is not None})


NOT_OF_OURS = "it is damaged, or of another version"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "its lab.json is damaged"),
        ("[]", "lab.json is damaged: it is no object"),
        (record(pid=None), f"its lab.json has no 'pid' that we understand: {NOT_OF_OURS}"),
        (record(nodes="n"), f"its lab.json has no 'nodes' that we understand: {NOT_OF_OURS}"),
        (record(pid=1), "its lab.json is damaged"),
        ("\0\udcff", "its lab.json is damaged"),
    ],
)
def test_a_lab_that_cannot_be_told(testbed_: Testbed, text: str, reason: str) -> None:
    """The others are listed all the same; naming it says what is wrong."""
    held = []
    for name, content in (("bad", text), ("good", record(name="good"))):
        folder = testbed.lab.folder.claim_folder(name)
        (folder.path / "lab.json").write_bytes(content.encode(errors="surrogateescape"))
        held.append(folder)
    Path("state/file").write_text("")
    Path("state/No Lab").mkdir()
    state = Path("state").absolute()
    said = [
        f"{state}/No Lab: it is not the folder of a lab; if nobody needs it, remove it",
        f"{state}/bad: {reason}; kill the first process that `fuser {state}/bad/lock` lists to end it",
        f"{state}/file: it is not the folder of a lab; if nobody needs it, remove it",
    ]
    ended = testbed_("ls", "-o", "json")
    assert [row["name"] for row in json.loads(ended.out)] == ["good"]
    assert ended.problems == [f"warning: {line}" for line in said]
    assert testbed_("down", "bad") == (3, "", f"error: lab 'bad' cannot be used: {said[1]}\n")
    assert testbed_("down", "file") == (3, "", f"error: lab 'file' cannot be used: {said[2]}\n")
    assert Path("state/No Lab").is_dir()
    for folder in held:
        folder.remove()


def test_a_lab_whose_folder_cannot_be_made(testbed_: Testbed) -> None:
    """A file lies there: one line."""
    Path("state/x").write_text("")
    with pytest.raises(LabError, match=r"cannot make the folder of lab 'x', .*/state/x: .*/state/x: File exists"):
        testbed.lab.folder.claim_folder("x")


def test_run_in_a_lab_that_ends(testbed_: Testbed, labs: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done so far is reported, the step says why, status 3, and the next scenario is not begun."""

    def start_lab(_topology: object, **how: Any) -> RunningLab:
        lab = RunningLab()

        def ends(_run: int) -> Completed:
            lab.ended = "the lab ended: lab 's' was stopped, or a process of it has died\n    last words"
            return Completed(137, b"", b"")

        lab.programs = ends
        labs.append((how, lab))
        return lab

    monkeypatch.setattr(testbed.cli.run, "start_lab", start_lab)
    ended = testbed_("run", "runs", "other", "--report", "out", "--keep")
    assert ended.status == 3
    assert ended.err == (
        "error: scenario s in iptables: the lab ended: lab 's' was stopped, or a process of it has died\n    last words\n"
    )
    assert "seen    the lab ended" in ended.out
    assert [how["name"] for how, _ in labs] == ["s"]
    assert not labs[0][1].kept
    steps = json.loads(Path("out/scenario.json").read_text())["results"][0]["steps"]
    assert [step["status"] for step in steps] == ["failed", "not run"]
