"""Runs a benchmark on the kernel that this process runs on: starts a lab for each mode, and has them sampled in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from testbed.bench.machine import describe_machine
from testbed.bench.results import Machine, Skipped
from testbed.bench.runner import Recording, Site, record
from testbed.bench.site import LabSite, lab_topology
from testbed.errors import KernelError, LabError, TestbedError
from testbed.kernel.interrupts import HeldInterrupts
from testbed.kernel.pace import is_nested
from testbed.lab.folder import free_name
from testbed.lab.start import start_lab
from testbed.model.benchmark import Benchmark

HOST, NESTED = "host", "nested"


def this_machine() -> str:
    """Return what the running kernel is called in results."""
    return NESTED if is_nested() else HOST


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told how far a benchmark is."""

    on_step: Callable[[str], None] = lambda _: None
    on_done: Callable[[int, int], None] = lambda done, total: None
    on_round: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Session:
    """What a benchmark on one kernel has found so far."""

    machine: Machine
    recording: Recording


def begin_session() -> Session:
    return Session(machine=describe_machine(this_machine()), recording=Recording())


def measure(
    session: Session, benchmark: Benchmark, modes: Sequence[str], iptables_backend: str, listener: Listener
) -> None:
    """Measure in labs that are all there at the same time, idle while it is another's turn. They end with this call.

    What cannot be measured is noted in the recording; a mode whose lab does not start is left out.

    Raises:
        TestbedError: no lab started, or one has ended.
    """
    with HeldInterrupts() as interrupts, ExitStack() as stack:
        sites: dict[str, Site] = {}
        refusals: list[TestbedError] = []
        for mode in modes:
            listener.on_step(f"starting a lab in {mode}")
            try:
                site = stack.enter_context(_start(benchmark, mode, iptables_backend, interrupts))
                with interrupts.let_in():
                    site.set_up()
            except (KernelError, LabError) as error:
                refusals.append(error)
                session.recording.skipped.append(Skipped(mode=mode, what="", reason=str(error)))
                continue
            sites[mode] = site
            if not session.machine.offloads:
                with interrupts.let_in():
                    session.machine.offloads = site.offloads()
        if not sites:
            raise refusals[0]
        with interrupts.let_in():
            record(
                benchmark, sites, session.recording, machine=session.machine.id, on_step=listener.on_step,
                on_done=listener.on_done, on_round=listener.on_round, load=lambda: round(os.getloadavg()[0], 2),
            )  # fmt: skip


def _start(benchmark: Benchmark, mode: str, iptables_backend: str, interrupts: HeldInterrupts) -> LabSite:
    lab = start_lab(
        lab_topology(benchmark), name=free_name(f"bench-{mode}"), proxy_mode=mode, iptables_backend=iptables_backend,
        attached=True, interrupts=interrupts,
    )  # fmt: skip
    return LabSite(lab, mode, benchmark)
