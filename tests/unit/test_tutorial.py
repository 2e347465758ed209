"""docs/tutorial.md is what its generator makes of the scenarios: commands and texts exactly, outputs as of a run."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from tools_support import load_tool

from testbed.manifests import find_scenarios, load_scenario

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "scenarios" / "tutorial"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_tool("tutorial")


def test_the_tutorial_has_35_rows() -> None:
    """The chapters begin rows 1 to 35, each once, in order."""
    rows = [step.row for path in find_scenarios(COURSE) for step in load_scenario(path).steps if step.row]
    assert [int(row.split()[0]) for row in rows] == list(range(1, 36))


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    """Without the outputs the page is what the scenarios make of it now; run tools/tutorial.py to write it anew."""

    def skeleton(page: str) -> list[str]:
        blocks = re.sub(r"(?m)^(```\n\$ [^\n]*\n)(?:(?!```).*\n)*", r"\1", page)
        return blocks.splitlines()

    assert skeleton((ROOT / "docs" / "tutorial.md").read_text()) == skeleton(generator.render({}))
