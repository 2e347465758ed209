"""How long deadlines are where everything is slower."""

from __future__ import annotations

import pytest

from testbed.errors import InputError
from testbed.kernel.pace import NESTED, PATIENCE, patient


@pytest.mark.parametrize(
    ("env", "seconds"),
    [({}, 2.0), ({NESTED: "1"}, 12.0), ({PATIENCE: "10"}, 20.0), ({PATIENCE: "1.5"}, 3.0), ({NESTED: "1", PATIENCE: "3"}, 6.0),
     ({PATIENCE: ""}, 2.0)],
)  # fmt: skip
def test_deadlines(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], seconds: float) -> None:
    """As written on real hardware, six times in the nested kernel, and what the environment says wins."""
    for name in (NESTED, PATIENCE):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert patient(2.0) == seconds


@pytest.mark.parametrize("text", ["0.5", "-1", "x", "nan", "1e9", "inf"])
def test_factors_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """They are refused by name."""
    monkeypatch.setenv(PATIENCE, text)
    with pytest.raises(InputError, match=f"TESTBED_PATIENCE='{text}' is not a number from 1 to 1000"):
        patient(1.0)
