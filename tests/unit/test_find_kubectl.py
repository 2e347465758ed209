"""Which kubectl is used: the user's own, and in the nested kernel the one that starts fastest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from testbed.errors import MissingFeature
from testbed.kernel.pace import NESTED
from testbed.lab.kubectl import find_kubectl


@pytest.mark.parametrize(
    ("nested", "present", "used"),
    [
        (False, {"user", "ours"}, "user"),
        (False, {"ours"}, "ours"),
        (True, {"user", "ours"}, "ours"),
        (True, {"user"}, "user"),
    ],
)
def test_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool, present: set[str], used: str
) -> None:  # fmt: skip
    for name in ("user", "ours"):
        (tmp_path / name / "bin").mkdir(parents=True)
        if name in present:
            (tmp_path / name / "bin" / "kubectl").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "user" / "bin"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "ours"))
    monkeypatch.delenv(NESTED, raising=False)
    if nested:
        monkeypatch.setenv(NESTED, "1")
    assert find_kubectl() == str(tmp_path / used / "bin" / "kubectl")


def test_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(MissingFeature, match="no kubectl on PATH and none in our own environment"):
        find_kubectl()
