"""A scenario: a topology, and steps that change a cluster or say what must be seen in it.

A step is one of a closed set of classes; whoever runs a scenario matches on the class. Every step knows where it was
written, so that a failure can point at its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path

from testbed.errors import Problem
from testbed.model.topology import Topology

# Modes that pick the endpoint of each new connection at random; the others take turns (ipvs: scheduler rr).
RANDOM_MODES = frozenset({"iptables", "nftables"})
# Fewer answers than this make a statement about randomness too weak to tell a bug from bad luck.
MIN_RANDOM_SAMPLE = 300

DEFAULT_WAIT_S = 60.0
DEFAULT_EXPECT_WITHIN_S = 5.0  # long enough for a change to reach the rules of every node
DEFAULT_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Selector:
    """Objects of one namespace ('' for cluster-wide kinds): by ``name``, or by ``labels`` when the name is ''.

    Pods are also found by the name of the workload that made them: ``dev/web`` is a pod of Deployment ``web``.
    """

    namespace: str
    name: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        what = self.name or ",".join(f"{key}={value}" for key, value in self.labels)
        return f"{self.namespace}/{what}" if self.namespace else what


Place = str | Selector
"""Where something happens: the name of a node or outside host, or a pod. Of several pods, the first ready one by name."""


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """Where packets of a step are captured: ``text`` is a POINT of `testbed capture`, or ``pods`` are the places.

    ``interface`` is one of each of the pods' interfaces, '' for what a pod has.
    """

    text: str
    pods: Selector | None = None
    interface: str = ""


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """One object; ``resource`` is a `Resource.key`."""

    resource: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.resource} {self.namespace}/{self.name}" if self.namespace else f"{self.resource} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBase:
    """What every step has."""

    file: str
    line: int
    title: str  # for people: what is done or expected
    modes: tuple[str, ...] = ()  # proxy modes it runs in; () for all
    row: str = ""  # begins a row of the report's table, with this title; '': it belongs to the one before, if any
    capture: tuple[CapturePoint, ...] = ()  # packets there are kept in the report folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyStep(StepBase):
    """Create or update the objects of these files, in order."""

    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteStep(StepBase):
    """Delete the objects of these files (in reverse order), and these objects."""

    files: tuple[Path, ...] = ()
    objects: tuple[ObjectRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleStep(StepBase):
    """Set the replicas of a Deployment or ReplicaSet; with ``within_s``, wait until that many pods are ready."""

    object: ObjectRef
    replicas: int
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The form of a table that a program prints: its columns, and every row, in any order, as patterns of cells (* and ?)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputClaims:
    """What is claimed about what a program writes. ``keep`` and ``differs`` are names of outputs kept by the scenario."""

    matches: str = ""  # a regular expression (^ and $ are of lines) for a part of what it writes, errors included
    table: Table | None = None
    differs: str = ""
    keep: str = ""  # remember what it prints, without blanks at the ends: {{NAME}} in later steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStep(StepBase):
    """Run a program somewhere. With ``within_s`` above 0 it is run again until it does what is expected."""

    where: Place
    argv: tuple[str, ...]
    prints: str | None = None  # a part of what it writes to standard output
    status: int = 0
    within_s: float = 0.0
    claims: OutputClaims = OutputClaims()


@dataclass(frozen=True, slots=True, kw_only=True)
class KubectlStep(StepBase):
    """Run kubectl with these arguments.

    With ``each``, once for each of these pods by name, with {{pod}}, {{ip}} and {{number}} (from 1) in the arguments.
    """

    argv: tuple[str, ...]
    prints: str | None = None
    status: int = 0
    within_s: float = 0.0
    claims: OutputClaims = OutputClaims()
    each: Selector | None = None
    editor: str = ""  # what `kubectl edit` runs


class Condition(Enum):
    """What to wait for."""

    AVAILABLE = "available"  # every replica is updated and available
    READY = "ready"  # condition Ready is True
    RUNNING = "running"  # phase Running
    SUCCEEDED = "succeeded"  # phase Succeeded, or a Job that is complete
    DELETED = "deleted"  # no such object
    ENDPOINTS = "endpoints"  # a Service has ready endpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitStep(StepBase):
    """Wait until the selected objects are in a condition; with ``count``, exactly that many (endpoints: that many addresses)."""

    resource: str  # a Resource.key
    selector: Selector
    condition: Condition
    count: int | None = None
    within_s: float = DEFAULT_WAIT_S


class Scheme(Enum):
    """How an expectation asks."""

    HTTP = "http"
    HTTPS = "https"
    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question over the network. Each is a connection of its own (UDP: a socket of its own)."""

    scheme: Scheme
    host: str  # an address or a name, resolved where the request starts
    port: int
    path: str = ""  # HTTP: path and query
    headers: tuple[tuple[str, str], ...] = ()
    send: str | None = None  # what to write (HTTP: the body of a POST)
    patience_s: float = DEFAULT_PATIENCE_S  # how long to wait for the answer

    def __str__(self) -> str:
        if self.scheme in (Scheme.HTTP, Scheme.HTTPS):
            default_port = 80 if self.scheme is Scheme.HTTP else 443
            port = "" if self.port == default_port else f":{self.port}"
            return f"{self.scheme.value}://{self.host}{port}{self.path}"
        return f"{self.scheme.value} {self.host}:{self.port}"


class Share(Enum):
    """How answers are shared out among pods."""

    ANY = "any"  # every answer is from one of the pods
    ONE = "one"  # exactly one pod is selected, and every answer is from it
    EACH = "each"  # every pod answers at least once, and nobody else does
    SAME = "same"  # every answer is from one and the same pod (session affinity)


class Spread(Enum):
    """How evenly each pod answers. Sampled once, never retried."""

    EVEN = "even"  # modes that take turns: counts differ by at most one; random modes: chi-square p > 1e-6
    EXACT = "exact"  # counts differ by at most one


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredBy:
    """Which pods answer, and in which shares."""

    pods: Selector
    share: Share = Share.ANY
    spread: Spread | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """How long each answer takes, from before the name is looked up until its end; None: no bound."""

    at_least_s: float | None = None
    at_most_s: float | None = None

    def __str__(self) -> str:
        bounds = (("at least", self.at_least_s), ("at most", self.at_most_s))
        return " and ".join(f"{word} {bound_s * 1000:g} ms" for word, bound_s in bounds if bound_s is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectStep(StepBase):
    """Ask ``times`` times from ``where``, and say what is seen. ``refused`` and ``timeout`` hold for every request."""

    where: Place
    request: Request
    times: int = 1
    status: int | None = None
    body: str | None = None  # a part of the answer
    answered_by: AnsweredBy | None = None
    sees_client: IPv4Address | Place | None = None  # the client's address as the server sees it
    takes: Takes | None = None
    refused: bool = False
    timeout: bool = False
    within_s: float = DEFAULT_EXPECT_WITHIN_S  # 0: tried once

    @property
    def is_statistical(self) -> bool:
        """Sampled once and never retried: repeating until luck strikes would prove nothing."""
        return self.answered_by is not None and self.answered_by.spread is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveStep(StepBase):
    """Ask DNS for a name from ``where``, through its resolv.conf, and say what comes back.

    ``answers`` are the values of the records of ``record_type``, in any order: text as `dig` prints it without the final
    dot (SRV also short, as PORT TARGET), or pods, each of which stands for its address. () is a name without such records.
    """

    where: Place
    name: str  # a name, or an address to be reversed (PTR)
    record_type: str = "A"
    server: IPv4Address | None = None  # instead of those of resolv.conf
    answers: tuple[str | Selector, ...] | None = None  # None: any, but at least one
    rcode: str = "NOERROR"
    within_s: float = DEFAULT_EXPECT_WITHIN_S  # 0: tried once


@dataclass(frozen=True, slots=True, kw_only=True)
class ArpStep(StepBase):
    """Ask by ARP on the LAN for an address, and say which machines answer: exactly these, () for nobody, None for anybody."""

    where: str  # a node or an outside host
    address: IPv4Address
    answered_by: tuple[str, ...] | None = None  # names of nodes and outside hosts
    patience_s: float = DEFAULT_PATIENCE_S  # how long answers are waited for
    within_s: float = DEFAULT_EXPECT_WITHIN_S  # 0: tried once


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorStep(StepBase):
    """Have the doctor look at the lab: he names exactly these causes, () for a lab in which all is well."""

    names: tuple[str, ...]  # keys of `testbed.model.doctor.CAUSES`
    at: tuple[str, ...] = ()  # with names: each of these places is among the findings', like ``node node1``
    within_s: float = DEFAULT_EXPECT_WITHIN_S  # 0: tried once


class FaultAction(Enum):
    """What to break, or mend."""

    KILL = "kill"  # SIGKILL to a pod's programs
    STOP = "stop"  # SIGSTOP
    START = "start"  # SIGCONT
    LINK_DOWN = "link down"
    LINK_UP = "link up"
    NODE_DOWN = "node down"  # the kubelet stops, its pods are gone, the link is cut: a power cut
    NODE_UP = "node up"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultStep(StepBase):
    """Break something: the selected pods (with ``node``: those on it), the LAN link of machine ``node``, or that node."""

    action: FaultAction
    pods: Selector | None = None
    node: str = ""


Step = (
    ApplyStep
    | DeleteStep
    | ScaleStep
    | ExecStep
    | KubectlStep
    | WaitStep
    | ExpectStep
    | ResolveStep
    | ArpStep
    | FaultStep
    | DoctorStep
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A checked scenario file. ``after``: the folder of the one whose lab it goes on in."""

    name: str
    file: Path
    topology: Topology
    topology_file: Path
    proxy_modes: tuple[str, ...]  # at least one: the topology's own when the file names none
    steps: tuple[Step, ...]
    warnings: tuple[Problem, ...] = ()
    after: Path | None = None

    def steps_for(self, mode: str) -> tuple[Step, ...]:
        """Return the steps that run in a proxy mode, in order."""
        return tuple(step for step in self.steps if not step.modes or mode in step.modes)
