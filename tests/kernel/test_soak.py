"""A lab under changes and load for a long time: no request is lost, no rule is left over, nothing grows.

Four clients (`soak_client`) do what their plans say (`soak_plan`), each asking its Services all the while. The long form lasts
half an hour in iptables mode, or TESTBED_SOAK_S seconds; a failure prints the seed, and TESTBED_SOAK_SEED=SEED repeats the plan.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from soak_client import Order
from soak_plan import CLIENTS, OUTSIDE, Failure, Window, unexcused

from testbed.kernel.pace import is_nested, patient
from testbed.lab.doctor import examine
from testbed.lab.handle import Lab
from testbed.lab.kubectl import find_kubectl
from testbed.lab.start import start_lab
from testbed.manifests import find_topology, load_topology

pytestmark = [pytest.mark.root]

CLIENT = Path(__file__).resolve().parents[1] / "soak_client.py"
SPACE = "soak-clients"
PLACES = (OUTSIDE, f"{SPACE}/on-node1", f"{SPACE}/on-node2", "node3")
RATE = 25.0
"""Requests a second from each place: enough that any gap of a tenth of a second is seen, and little enough for two cores."""
WARM_UP = 0.5
"""Of the time, before memory and descriptors are counted: what is used for the first time is loaded and cached, and Events, which
are kept for an hour or as long as their namespace, need as much memory in the second half as in the first."""
HISTORY = 4096
"""Of the store: so many changes are kept for watchers, and memory grows until there are as many."""
GREETING = re.compile(r"\.:53|CoreDNS-\S+ \(testbed: dnsmasq\)|.*: userspace mode wants \d+ file descriptors, .*")
MAY_GROW = 0.05
LOOKS = 5
LOOK_EVERY_S = 0.3
NOISE_KIB = 1024
"""Growth below which a small process is not judged: one arena of the C library."""


@dataclass
class Soaked:
    """What came of it."""

    windows: list[Window] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    answered: int = 0

    @property
    def lost(self) -> list[Failure]:
        return unexcused(self.failures, self.windows)

    def __str__(self) -> str:
        kinds = Counter(window.operation for window in self.windows)
        longest = max((window.end_s - window.begin_s for window in self.windows), default=0.0)
        return (
            f"{len(self.windows)} operations, the longest {longest:.1f} s: {dict(kinds)}; "
            f"{self.answered} requests answered, {len(self.failures)} failed while disturbed"
        )


@dataclass(frozen=True)
class Vitals:
    """A process of the lab: what it is, its memory, and how many descriptors it has open."""

    name: str
    rss_kib: int
    descriptors: int

    def least(self, other: Vitals) -> Vitals:
        return Vitals(self.name, min(self.rss_kib, other.rss_kib), min(self.descriptors, other.descriptors))


@contextlib.contextmanager
def soak_lab(mode: str) -> Iterator[Lab]:
    topology = load_topology(find_topology("three-nodes"))
    with start_lab(topology, name=f"soak-{os.getpid()}", proxy_mode=mode, attached=True) as lab:
        lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        for node in ("node1", "node2"):
            spec = {"nodeName": node, "containers": [{"name": "client", "image": "client"}]}
            metadata = {"name": f"on-{node}", "namespace": SPACE}
            lab.api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        yield lab


def soak(lab: Lab, mode: str, seconds: float, seed: int, folder: Path) -> Soaked:
    """Have the four clients at work for so long, and clean up after themselves."""
    running = []
    for client, place in enumerate(PLACES):
        order = Order(
            lab=lab.name, client=client, seed=seed, mode=mode, seconds=seconds, place=place, rate=RATE / patient(1),
            failures=str(folder / f"load-{client}"),
        )  # fmt: skip
        argv = [sys.executable, str(CLIENT), json.dumps(asdict(order))]
        with (folder / f"out-{client}").open("wb") as out, (folder / f"err-{client}").open("wb") as err:
            running.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err))
    assert len(running) == CLIENTS
    try:
        for client, process in enumerate(running):
            status = process.wait(patient(seconds + 180))
            assert status == 0, f"client {client} ended with status {status}: {(folder / f'err-{client}').read_text()}"
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = Soaked()
    for client in range(CLIENTS):
        for line in (folder / f"out-{client}").read_text().splitlines():
            window = json.loads(line)
            found.windows.append(Window(**{**window, "disturbs": frozenset(window["disturbs"])}))
        for line in (folder / f"load-{client}").read_text().splitlines():
            said = json.loads(line)
            if "failed" in said:
                found.failures.append(
                    Failure(key=said["failed"], begin_s=said["begin"], end_s=said["end"], why=said["why"])
                )
            else:
                found.answered += sum(said["answered"].values())
    return found


def processes(lab: Lab) -> dict[int, tuple[str, str]]:
    """Return the processes of a lab: pid -> name and state. They are those of its PID namespace, and of those below."""
    found: dict[int, tuple[str, str]] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                head, _, rest = (entry / "stat").read_text().rpartition(")")
                state, parent = rest.split()[:2]
                parents[int(entry.name)] = int(parent)
                found[int(entry.name)] = (head.partition("(")[2], state)
    below = {lab.pid}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: seen for pid, seen in found.items() if pid in below}


def complaints(lab: Lab) -> list[str]:
    """Return what the cluster's own programs have said, and any traceback of the lab's: they have nothing to complain of."""
    kubectl = [find_kubectl(), f"--kubeconfig={lab.kubeconfig}", "logs", "-n", "kube-system"]
    found = []
    for pod in lab.api.list("pods", "kube-system")[0]:
        done = subprocess.run([*kubectl, pod["metadata"]["name"]], capture_output=True, text=True, check=True)
        found += [line for line in done.stdout.splitlines() if not GREETING.fullmatch(line)]
    return found + [line for line in (lab.folder / "lab.log").read_text().splitlines() if "Traceback" in line]


def revision(lab: Lab) -> int:
    """Return how many changes the lab's objects have seen."""
    return int(lab.api.list("namespaces")[1])


def vitals(lab: Lab) -> dict[int, Vitals]:
    """Return the least that each process was seen with: a probe's connection or the pipes of a program come and go."""
    found: dict[int, Vitals] = {}
    for _ in range(LOOKS):
        for pid, (name, _) in processes(lab).items():
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
                seen = Vitals(name, rss, len(os.listdir(f"/proc/{pid}/fd")))
                found[pid] = found.get(pid, seen).least(seen)
        time.sleep(LOOK_EVERY_S)
    return found


def grown(before: dict[int, Vitals], after: dict[int, Vitals]) -> list[str]:
    """Return which processes, of those that were there all the time, have more memory or descriptors than they should."""
    found = []
    for pid in sorted(before.keys() & after.keys()):
        was, now = before[pid], after[pid]
        if now.rss_kib > was.rss_kib * (1 + MAY_GROW) + NOISE_KIB or now.descriptors > was.descriptors * (1 + MAY_GROW):
            found.append(f"{pid}: {was} has become {now}")
    return found


def chosen_seed() -> int:
    return int(os.environ.get("TESTBED_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))


def soak_and_look(
    mode: str, seconds: float, folder: Path, eventually: Callable[..., Any], *, whole_memory: bool
) -> None:  # fmt: skip
    """Have a lab soaked, and look at it.

    Args:
        whole_memory: warm up until the store's history is full, so that the control process can be judged as well.
    """
    seed = chosen_seed()
    again = f"TESTBED_SOAK_SEED={seed}, mode {mode}, {seconds:g} s"
    with soak_lab(mode) as lab:
        rounds = [soak(lab, mode, seconds * WARM_UP, seed + 1, folder)]
        while whole_memory and revision(lab) <= HISTORY:
            rounds.append(soak(lab, mode, seconds * WARM_UP, seed + 1 + len(rounds), folder))
        before = vitals(lab)
        rounds.append(soak(lab, mode, seconds * (1 - WARM_UP), seed, folder))
        after = vitals(lab)
        print(again, *rounds, f"revision {revision(lab)}", sep="\n")
        for pid in sorted(before.keys() & after.keys()):
            print(f"{before[pid]} → {after[pid]}")
        lost = [failure for each in rounds for failure in each.lost]
        assert lost == [], f"{again}: {len(lost)} requests lost: {lost[:5]}"
        assert rounds[-1].answered > seconds, again
        assert len(rounds[-1].windows) >= 2 * CLIENTS, again
        found, _ = examine(lab)
        assert found == (), again
        assert complaints(lab) == [], again
        eventually(lambda: not [seen for seen in processes(lab).values() if seen[1] == "Z"], within_s=10)
        judged = {pid: seen for pid, seen in before.items() if whole_memory or seen.name != "control"}
        assert grown(judged, after) == [], again


@pytest.mark.timeout(400)
def test_a_while(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    """The short form: every kind of operation is likely, and what is wrong at once is found."""
    soak_and_look("iptables", 30, tmp_path, eventually, whole_memory=False)


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        ("iptables", 1800),
        ("nftables", 600),
        ("userspace", 600),
        pytest.param("ipvs", 600, marks=pytest.mark.ipvs),
    ],
)
def test_half_an_hour(mode: str, seconds: float, tmp_path: Path, eventually: Callable[..., Any]) -> None:
    """The long form, in every mode; ipvs in the nested kernel, where this one has none, and too slow to fill the history."""
    seconds = float(os.environ.get("TESTBED_SOAK_S") or seconds)
    soak_and_look(mode, seconds, tmp_path, eventually, whole_memory=not is_nested())
