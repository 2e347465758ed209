"""What is claimed about a program's output, and the verdict on it."""

from __future__ import annotations

import pytest

from testbed.model.scenario import ExecStep, OutputClaims, Table
from testbed.scenario.judge_output import judge_output, parse_table, table_faults

PODS = """\
NAME     READY   STATUS    NOMINATED NODE   AGE
web-1    1/1     Running   <none>           3s
web-22   0/1     Pending                    12m
"""
COLUMNS = ("NAME", "READY", "STATUS", "NOMINATED NODE", "AGE")


def step(**claims: object) -> ExecStep:
    return ExecStep(file="s.yaml", line=1, title="t", where="node1", argv=("x",), claims=OutputClaims(**claims))  # type: ignore[arg-type]


def test_columns_begin_where_their_headings_do() -> None:
    """A heading may hold a blank, and a cell may be empty."""
    assert parse_table(PODS) == [
        COLUMNS,
        ("web-1", "1/1", "Running", "<none>", "3s"),
        ("web-22", "0/1", "Pending", "", "12m"),
    ]


@pytest.mark.parametrize(
    ("rows", "faults"),
    [
        pytest.param([("web-22", "*", "*", "", "*"), ("web-?", "1/1", "*", "<none>", "*")], [], id="in any order"),
        pytest.param(
            [("web-1", "1/1", "Running", "<none>", "*")], ["a row too many: web-22 | 0/1 | Pending |  | 12m"], id="too many",
        ),
        pytest.param(
            [("web-1", "*", "*", "*", "*"), ("web-22", "1/1", "*", "*", "*")],
            ["no row is like web-22 | 1/1 | * | * | *", "a row too many: web-22 | 0/1 | Pending |  | 12m"], id="another cell",
        ),
    ],
)  # fmt: skip
def test_rows(rows: list[tuple[str, ...]], faults: list[str]) -> None:
    """Every row of the table is like one of the patterns, and the other way round."""
    assert table_faults(Table(COLUMNS, tuple(rows)), PODS) == faults


def test_other_columns() -> None:
    """A table with other columns is not looked at any further."""
    assert table_faults(Table(("NAME",), ()), PODS) == [f"the columns are {', '.join(COLUMNS)}"]
    assert table_faults(Table(("NAME",), ()), "") == ["the columns are none"]


@pytest.mark.parametrize(
    ("claims", "output", "errors", "passes"),
    [
        pytest.param({"matches": "^b$"}, "a\nb\n", "", True, id="a line"),
        pytest.param({"matches": "^b$"}, "ab\n", "", False, id="no such line"),
        pytest.param({"matches": "immutable"}, "", "field is immutable\n", True, id="an error counts"),
        pytest.param({"matches": "8$", "keep": "x"}, "10.96.0.8\n", "", True, id="keeping claims nothing"),
        pytest.param({"differs": "first"}, "10.96.0.8\n", "", False, id="the same as before"),
        pytest.param({"differs": "first"}, "10.96.0.9\n", "", True, id="another than before"),
    ],
)
def test_texts(claims: dict[str, object], output: str, errors: str, passes: bool) -> None:
    """Expressions look at lines of both streams; kept outputs are compared without blanks at their ends."""
    assert judge_output(step(**claims), 0, output, errors, {"first": "10.96.0.8"}).passed is passes
