"""A benchmark in the nested kernel: `testbed bench` again, inside, and the results that it sends back."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence

import msgspec

from testbed.bench.results import Results
from testbed.errors import LabError, MissingFeature
from testbed.kernel.pace import is_nested
from testbed.model.benchmark import Benchmark
from testbed.scenario.modes import NOT_NESTED
from testbed.vm import wire
from testbed.vm.again import run_testbed
from testbed.vm.machine import check_machine

Order = tuple[Benchmark, tuple[str, ...], str]
"""What is measured inside: the benchmark, its modes, the backend of iptables."""


def why_not_nested(mode: str) -> str:
    """Return why a mode cannot be measured in the nested kernel, '' when it can."""
    if is_nested():
        return "there is no nested kernel in the nested one"
    if mode in NOT_NESTED:
        return NOT_NESTED[mode]
    try:
        check_machine()
    except MissingFeature as error:
        return str(error)
    return ""


def measure_nested(benchmark: Benchmark, modes: Sequence[str], iptables_backend: str) -> tuple[Results, int]:
    """Return what was measured inside, and the status that the `testbed` there ended with.

    Raises:
        KernelError: there is no nested kernel here, or it did not boot.
        LabError: it ended without results; what is wrong has been said.
    """
    order: Order = (benchmark, tuple(modes), iptables_backend)
    packed = base64.b64encode(pickle.dumps(order)).decode()
    ended = run_testbed(["bench", "inside", packed])
    try:
        return msgspec.json.decode(ended.answer, type=Results), ended.status
    except msgspec.DecodeError as error:
        raise LabError(f"the testbed in the nested kernel ended with status {ended.status} and no results") from error


def read_order(packed: str) -> Order:
    """Return what `measure_nested` asks for."""
    order: Order = pickle.loads(base64.b64decode(packed))  # noqa: S301  # written by our own program
    return order


def send_results(results: Results) -> None:
    """Write results to the descriptor that `measure_nested` reads."""
    with os.fdopen(wire.ANSWER_FD, "wb") as file:
        file.write(msgspec.json.encode(results))
