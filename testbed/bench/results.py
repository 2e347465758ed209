"""results.json: its format, reading and writing. docs/benchmarks.md explains it; `testbed schema benchmark-results` prints it."""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from testbed.errors import InputError

FORMAT: Literal["testbed/v1"] = "testbed/v1"
KIND = "BenchmarkResults"


class Part(msgspec.Struct, kw_only=True, omit_defaults=False):
    """Base of everything in the file. A reader may meet fields of a later version, and passes over them."""


class Interval(Part):
    """A 95% bootstrap interval."""

    low: float
    high: float


class Ratio(Part):
    """A figure divided by that of the direct path, round by round: same mode, same kernel, same number of Services."""

    path: Annotated[str, Meta(description="the path it was divided by")]
    median: float
    interval: Interval | None


class Settings(Part):
    """What was asked for."""

    topology: str
    modes: list[str]
    services: list[int]
    samples: Annotated[int, Meta(description="rounds at each number of Services")]
    duration_s: float
    clients: Annotated[int, Meta(description="connections that wrk holds open at once")]
    endpoints: Annotated[int, Meta(description="endpoints of each Service that is only there to be many")]
    seed: Annotated[int, Meta(description="of the intervals")]
    one_kernel: bool


class Machine(Part):
    """A kernel that was measured on."""

    id: Annotated[str, Meta(description="host, or nested: User-Mode Linux on that host")]
    kernel: Annotated[str, Meta(description="uname -r")]
    kernel_version: str
    architecture: str
    cpus: int
    cpu_model: str
    memory_mib: int
    conntrack_max: Annotated[int, Meta(description="nf_conntrack_max; 0: not known")]
    offloads: Annotated[
        dict[str, dict[str, bool]], Meta(description="place and interface -> feature (as ethtool calls it) -> on")
    ]
    versions: Annotated[dict[str, str], Meta(description="program -> version")]
    load_before: Annotated[float, Meta(description="load average over a minute, before the first lab was started")]
    busy_before: Annotated[float, Meta(description="share of all CPUs' time that others used then, 0 to 1")]
    load_during: Annotated[list[float], Meta(description="load average over a minute at the end of each round")]


class Series(Part):
    """One figure: the samples of a metric, in the order of rounds, and what they come to."""

    machine: Annotated[str, Meta(description="id of the machine")]
    mode: str
    workload: Literal["throughput", "connections", "latency", "sync"]
    case: Annotated[
        str, Meta(description="tcp-STREAMS, udp-RATE, keep-alive, new-connections, first-answer, change, full")
    ]
    path: str
    position: Annotated[
        str, Meta(description="where in the rules the target Service is: first, middle, last; or empty")
    ]
    services: Annotated[int, Meta(description="Services besides the few that are asked")]
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    main: Annotated[bool, Meta(description="one of those in the terminal's table")]
    rounds: Annotated[list[int], Meta(description="the round of each sample, from 1; warm-up is not among them")]
    samples: list[float]
    median: float
    q1: Annotated[float, Meta(description="first quartile")]
    q3: float
    interval: Interval | None
    ratio: Ratio | None

    @property
    def key(self) -> tuple[str, ...]:
        """What the figure is of, the kernel and the mode left out."""
        return (self.workload, self.case, self.path, self.position, str(self.services), self.metric)

    @property
    def subject(self) -> str:
        place = "" if self.path == "none" else f" {self.path}"
        where = f" ({self.position})" if self.position else ""
        return f"{self.case}{place}{where}, {self.services} Services"


class Verdict(Part):
    """Two modes of one kernel side by side."""

    machine: str
    workload: str
    case: str
    path: str
    position: str
    services: int
    metric: str
    a: Annotated[str, Meta(description="a mode")]
    b: Annotated[str, Meta(description="another mode")]
    times: Annotated[float, Meta(description="median of b divided by median of a")]
    differ: Annotated[bool, Meta(description="false: too noisy to tell them apart, the intervals overlap")]
    enough: Annotated[bool, Meta(description="false: too few samples for intervals")]


class Beyond(Part):
    """A straight line through what a figure is more than that of the direct path, round by round, in the same kernel and mode."""

    path: Annotated[str, Meta(description="the path that was taken off")]
    per_service: Annotated[float, Meta(description="in the metric's unit")]
    interval: Interval
    rises: Annotated[bool, Meta(description="the slope is above 0 beyond noise")]


class Slope(Part):
    """A straight line through one figure over the number of Services."""

    machine: str
    mode: str
    workload: str
    case: str
    path: str
    position: str
    metric: str
    unit: str
    per_service: Annotated[float, Meta(description="in the metric's unit")]
    interval: Interval
    fit: Annotated[float, Meta(description="R squared of the medians")]
    rises: Annotated[bool, Meta(description="the slope is above 0 beyond noise")]
    beyond: Annotated[Beyond | None, Meta(description="beyond the direct path; null: not measured, or this is it")] = (
        None
    )


class Skipped(Part):
    """What was not measured."""

    mode: str
    what: Annotated[str, Meta(description="a case and path; empty: the whole mode")]
    reason: str


class Results(Part):
    """What a benchmark found."""

    api_version: Annotated[Literal["testbed/v1"], Meta(description="of this format")] = field(name="apiVersion")
    kind: Literal["BenchmarkResults"]
    name: str
    complete: Annotated[bool, Meta(description="false: it was interrupted; what is here was measured whole")]
    reason: Annotated[str, Meta(description="why it is not complete")]
    started: Annotated[str, Meta(description="RFC 3339")]
    duration_s: float
    settings: Settings
    machines: list[Machine]
    series: list[Series]
    verdicts: list[Verdict]
    slopes: list[Slope]
    skipped: list[Skipped]
    warnings: list[str]

    def machine(self, machine_id: str) -> Machine:
        """Return a machine; KeyError when there is none."""
        return {machine.id: machine for machine in self.machines}[machine_id]


def results_schema() -> dict[str, Any]:
    """Return the format as JSON Schema."""
    schema = msgspec.json.schema(Results)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": KIND, **schema}


def results_json(results: Results) -> str:
    return msgspec.json.format(msgspec.json.encode(results), indent=1).decode() + "\n"


def read_results(path: Path) -> Results:
    """Return the results of a file, or of the ``results.json`` in a folder.

    Raises:
        InputError: there is no such file, or it is none of ours.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        return msgspec.json.decode(file.read_bytes(), type=Results)
    except OSError as error:
        raise InputError(f"cannot read {str(file)!r}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InputError(f"{str(file)!r} does not hold results of a benchmark: {error}") from error
