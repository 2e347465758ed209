"""Tests marked ``ipvs`` run on a kernel that has it: this one, or the nested one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.ipvs]


def test_the_kernel_has_ipvs() -> None:
    """A marked test finds ip_vs, wherever it runs."""
    assert Path("/proc/net/ip_vs").exists()
