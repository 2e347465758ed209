"""What a run looks like: whole text reports, the JSON document, JUnit XML, and the files of --report."""

# ruff: noqa: E501  # whole lines of reports

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.manifests import find_topology, load_topology
from testbed.model.scenario import AnsweredBy, ApplyStep, ExpectStep, Request, Scenario, Scheme, Selector, Share, Step
from testbed.probes import Observation, Outcome
from testbed.scenario.report import TextReport, aligned, json_report, junit_report, printable, write_reports
from testbed.scenario.runner import ScenarioResult, Status, StepResult

FILE = "/scenarios/s/scenario.yaml"
APPLY = ApplyStep(file=FILE, line=8, title="apply web.yaml", files=(Path("web.yaml"),))
SPREAD = ExpectStep(
    file=FILE, line=9, title="requests spread", where="client", times=300,
    request=Request(scheme=Scheme.HTTP, host="10.96.0.10", port=80, path="/"),
    answered_by=AnsweredBy(pods=Selector("dev", "web"), share=Share.EACH),
)  # fmt: skip
PASSED = StepResult(number=1, step=APPLY, status=Status.PASSED, duration_s=0.0123, attempts=1, seen="pod/a created")
FAILED = StepResult(
    number=2, step=SPREAD, status=Status.FAILED, duration_s=5.0, attempts=51, wanted="300 answers (within 5 s)",
    seen="299 answered; 1 timed out", where="http://10.96.0.10/ from client", counts={"dev/web-a": 200, "dev/web-b": 99},
    observations=(
        Observation(outcome=Outcome.ANSWERED, answered_by="dev/web-a", status=200, body="{}", duration_ms=0.5),
        Observation(outcome=Outcome.TIMED_OUT, duration_ms=1000.1, detail="no answer within 1 s"),
    ),
)  # fmt: skip
NOT_RUN = StepResult(number=3, step=APPLY, status=Status.NOT_RUN)
SKIPPED = [("s", "ipvs", "no ip_vs here")]


def result(*steps: StepResult, mode: str = "iptables") -> ScenarioResult:
    topology_file = find_topology("three-nodes")
    scenario = Scenario(
        name="s", file=Path(FILE), topology=load_topology(topology_file), topology_file=topology_file,
        proxy_modes=("iptables",), steps=tuple(step.step for step in steps),
    )  # fmt: skip
    return ScenarioResult(scenario=scenario, mode=mode, steps=steps, duration_s=6.54321)


def titled(title: str, **fields: Any) -> StepResult:
    step: Step = ApplyStep(file=FILE, line=8, title=title, files=())
    return StepResult(number=1, step=step, status=Status.FAILED, duration_s=0.0, attempts=1, **fields)


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_without_colours() -> None:
    """One line for what passed or was not run; what failed says what was wanted, seen, where, and how often tried."""
    report = TextReport(colours=False)
    lines = [report.heading("s", "iptables", "s-2"), *(report.step(step, 3) for step in (PASSED, FAILED, NOT_RUN))]
    assert "\n".join(lines) == (
        "s, proxy mode iptables, lab s-2\n"
        "  ✓ 1/3 apply web.yaml                                                           0.01 s\n"
        "  ✗ 2/3 requests spread                                                          5.00 s\n"
        "      wanted  300 answers (within 5 s)\n"
        "      seen    299 answered; 1 timed out\n"
        "      where   http://10.96.0.10/ from client\n"
        "      file    /scenarios/s/scenario.yaml:9\n"
        "      tried   51 times\n"
        "  - 3/3 apply web.yaml (not run)"
    )


def test_text_with_colours() -> None:
    """Green, red and dim marks, dim names, a bold heading; the words are the same."""
    report = TextReport(colours=True)
    lines = [report.heading("s", "iptables", "s-2"), *(report.step(step, 3) for step in (PASSED, FAILED, NOT_RUN))]
    assert "\n".join(lines) == (
        "\033[1ms\033[0m, proxy mode iptables, lab s-2\n"
        "  \033[32m✓\033[0m 1/3 apply web.yaml                                                           0.01 s\n"
        "  \033[31m✗\033[0m 2/3 requests spread                                                          5.00 s\n"
        "      \033[2mwanted \033[0m 300 answers (within 5 s)\n"
        "      \033[2mseen   \033[0m 299 answered; 1 timed out\n"
        "      \033[2mwhere  \033[0m http://10.96.0.10/ from client\n"
        "      \033[2mfile   \033[0m /scenarios/s/scenario.yaml:9\n"
        "      \033[2mtried  \033[0m 51 times\n"
        "  \033[2m-\033[0m 3/3 apply web.yaml (not run)"
    )


def test_numbers_line_up() -> None:
    """Step 2 of 14 stands below step 12 of 14."""
    report = TextReport(colours=False)
    assert report.step(FAILED, 14).startswith("  ✗  2/14 requests spread")


def test_summary() -> None:
    """How answers spread over pods, as bars of at most forty; then a line for each scenario and mode."""
    nobody = StepResult(number=4, step=SPREAD, status=Status.PASSED, counts={"": 1, "dev/web-a": 399})
    single = StepResult(number=5, step=SPREAD, status=Status.PASSED, counts={"dev/web-a": 300})
    summary = TextReport(colours=False).summary(
        [result(PASSED, FAILED, NOT_RUN), result(PASSED, nobody, single, mode="ipvs")]
    )
    assert summary == (
        "\n"
        "how 299 answers spread in step 2 (requests spread):\n"
        "  dev/web-a    200   66.9 %  ███████████████████████████\n"
        "  dev/web-b     99   33.1 %  █████████████\n"
        "\n"
        "how 400 answers spread in step 4 (requests spread):\n"
        "  (no pod named)      1    0.2 %\n"
        "  dev/web-a         399   99.8 %  ████████████████████████████████████████\n"
        "\n"
        "SCENARIO   MODE       STEPS   RESULT   TIME\n"
        "s          iptables   1/3     failed   6.5 s\n"
        "s          ipvs       3/3     passed   6.5 s"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\033[2Jgone", "�[2Jgone"),
        ("bell\a, \x9b31m, del\x7f", "bell�, �31m, del�"),
        ("back\rwards", "back�wards"),
        ("half a \ud83d pair", "half a � pair"),  # nothing could encode it
        ("lines\nand\ttabs", "lines\nand\ttabs"),
        ("naïve 猫 ✓", "naïve 猫 ✓"),
    ],
)
def test_what_a_server_answers_cannot_move_the_cursor(text: str, shown: str) -> None:
    """Control characters are replaced."""
    assert printable(text) == shown


def test_further_lines_stand_below_the_first() -> None:
    """Several problems are a block; a title is one line whatever is in it."""
    shown = TextReport(colours=False).step(titled("a\n\ttitle\x1b", wanted="one\ntwo", seen="three"), 1)
    assert shown == (
        "  ✗ 1/1 a title�                                                                 0.00 s\n"
        "      wanted  one\n"
        "              two\n"
        "      seen    three\n"
        "      file    /scenarios/s/scenario.yaml:8"
    )


def test_tables() -> None:
    """Columns as wide as their widest cell, nothing behind the last."""
    assert (
        aligned([("A", "LONG", "C"), ("wide", "b", ""), ("", "", "c")]) == "A      LONG   C\nwide   b\n              c"
    )


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json() -> None:
    """One document; docs/scenario.md describes these fields."""
    failed = replace(FAILED, captures=("s-iptables-step-2-failed.pcapng",))
    document = json.loads(json_report([(result(PASSED, failed, NOT_RUN), "s-2")], SKIPPED))
    about = {"title": "apply web.yaml", "file": FILE, "line": 8}
    empty = {"wanted": "", "seen": "", "where": "", "counts": {}, "captures": []}
    assert document == {
        "passed": False,
        "results": [
            {
                "scenario": "s",
                "file": FILE,
                "mode": "iptables",
                "lab": "s-2",
                "kernel": "own",
                "passed": False,
                "duration_s": 6.543,
                "steps": [
                    {"number": 1, **about, "status": "passed", "duration_s": 0.012, "attempts": 1, **empty, "seen": "pod/a created"},
                    {
                        "number": 2, "title": "requests spread", "file": FILE, "line": 9, "status": "failed", "duration_s": 5.0,
                        "attempts": 51, "wanted": "300 answers (within 5 s)", "seen": "299 answered; 1 timed out",
                        "where": "http://10.96.0.10/ from client", "counts": {"dev/web-a": 200, "dev/web-b": 99},
                        "captures": ["s-iptables-step-2-failed.pcapng"],
                    },
                    {"number": 3, **about, "status": "not run", "duration_s": 0.0, "attempts": 0, **empty},
                ],
            }
        ],
        "skipped": [{"scenario": "s", "mode": "ipvs", "reason": "no ip_vs here"}],
    }  # fmt: skip


def test_the_fields_are_described() -> None:
    """docs/scenario.md has each field of the documents, and each word that a status or an outcome can be."""
    described = set(
        re.findall(
            r"`([^`]+)`", (Path(__file__).parents[2] / "docs" / "scenario.md").read_text().partition("## Reports")[2]
        )
    )
    document = json.loads(json_report([(result(FAILED), "s")], SKIPPED))
    (found,) = document["results"]
    fields = {
        *document,
        *found,
        *found["steps"][0],
        *document["skipped"][0],
        *(one.name for one in fields_of(Observation)),
    }
    words = {one.value for one in (*Outcome, *Status)}
    assert fields | words <= described


@pytest.mark.parametrize(("steps", "passed"), [((PASSED,), True), ((PASSED, FAILED), False), ((), True)])
def test_json_says_whether_all_passed(steps: tuple[StepResult, ...], passed: bool) -> None:
    """What was skipped does not count."""
    assert json.loads(json_report([(result(PASSED), "a"), (result(*steps), "b")], SKIPPED))["passed"] is passed


# ── JUnit ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_junit() -> None:
    """A suite for each scenario and mode, one case for each step; a mode that was skipped is a suite of one."""
    text = junit_report([(result(PASSED, FAILED, NOT_RUN), "s-2")], SKIPPED)
    assert (
        text
        == f"""\
<?xml version='1.0' encoding='utf-8'?>
<testsuites>
  <testsuite name="s (iptables)" tests="3" failures="1" skipped="1" errors="0" time="6.543">
    <testcase classname="s.iptables" name="1. apply web.yaml" file="{FILE}" line="8" time="0.012" />
    <testcase classname="s.iptables" name="2. requests spread" file="{FILE}" line="9" time="5.000">
      <failure message="wanted: 300 answers (within 5 s)">wanted: 300 answers (within 5 s)
seen: 299 answered; 1 timed out
where: http://10.96.0.10/ from client</failure>
    </testcase>
    <testcase classname="s.iptables" name="3. apply web.yaml" file="{FILE}" line="8" time="0.000">
      <skipped message="an earlier step failed" />
    </testcase>
  </testsuite>
  <testsuite name="s (ipvs)" tests="1" failures="0" skipped="1" errors="0" time="0">
    <testcase classname="s.ipvs" name="the whole scenario" time="0">
      <skipped message="no ip_vs here" />
    </testcase>
  </testsuite>
</testsuites>"""
    )


@pytest.mark.parametrize("character", ["\0", "\b", "\v", "\f", "\033", "\x1f", "\ufffe", "\uffff", "\udfff"])
def test_junit_holds_no_forbidden_character(character: str) -> None:
    """XML 1.0 cannot hold these, not even escaped: a parser would refuse the whole file."""
    step = titled(f"t{character}", wanted=f"w{character}", seen=f"s{character}", where=f"p{character}")
    text = junit_report([(result(step), "s")], [("s", "ipvs", f"r{character}")])
    root = ElementTree.fromstring(text.encode())
    cases = list(root.iter("testcase"))
    assert cases[0].attrib["name"] == "1. t�"
    failure = cases[0].find("failure")
    assert failure is not None
    assert (failure.attrib["message"], failure.text) == ("wanted: w�", "wanted: w�\nseen: s�\nwhere: p�")
    assert [one.attrib["message"] for one in cases[1]] == ["r�"]


def test_junit_escapes_markup() -> None:
    """What a server answers stays text."""
    step = titled('<a href="x">', wanted="a & b", seen="]]></failure>", where="'")
    case = next(ElementTree.fromstring(junit_report([(result(step), "s")], [])).iter("testcase"))
    assert case.attrib["name"] == '1. <a href="x">'
    assert case[0].text == "wanted: a & b\nseen: ]]></failure>\nwhere: '"


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_three_files(tmp_path: Path) -> None:
    """scenario.json and junit.xml as printed, observations.json with every single answer; the folder is made."""
    folder = tmp_path / "a" / "b"
    results = [(result(PASSED, FAILED, NOT_RUN), "s-2")]
    for _ in range(2):  # again into the same folder: replaced
        write_reports(folder, results, SKIPPED)
    assert sorted(file.name for file in folder.iterdir()) == ["junit.xml", "observations.json", "scenario.json"]
    assert (folder / "scenario.json").read_text() == json_report(results, SKIPPED) + "\n"
    assert (folder / "junit.xml").read_text() == junit_report(results, SKIPPED) + "\n"
    unanswered = {"answered_by": "", "seen_client": "", "status": 0, "body": ""}
    assert json.loads((folder / "observations.json").read_text()) == [
        {
            "scenario": "s",
            "mode": "iptables",
            "step": 2,
            "observations": [
                {
                    "outcome": "answered",
                    "answered_by": "dev/web-a",
                    "seen_client": "",
                    "status": 200,
                    "body": "{}",
                    "duration_ms": 0.5,
                    "detail": "",
                },
                {"outcome": "timed out", **unanswered, "duration_ms": 1000.1, "detail": "no answer within 1 s"},
            ],
        }
    ]


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """A reason in any script, written where the locale knows ASCII only."""
    program = (
        "import sys; from pathlib import Path; from testbed.scenario.report import write_reports; "
        "write_reports(Path(sys.argv[1]), [], [('s', 'ipvs', 'nyan \\u732b')])"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, check=True, timeout=60)
    written = (tmp_path / "junit.xml").read_bytes()
    assert written.startswith(b"<?xml version='1.0' encoding='utf-8'?>")
    assert "nyan 猫" in written.decode()
    assert next(ElementTree.fromstring(written).iter("skipped")).attrib["message"] == "nyan 猫"
