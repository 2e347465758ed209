"""Scenario files: their format, and the rules that hold inside one step. `crosscheck` has those between steps and objects.

The format is the Structs below; docs/scenario.md explains it to people.
"""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

import re
import shlex
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import SplitResult, urlsplit

from msgspec import Meta, field

from testbed.errors import ManifestError, Problem
from testbed.manifests.allocations import allocation_problems
from testbed.manifests.crosscheck import makes_objects, missing, missing_namespaces
from testbed.manifests.decode import Decoded, Wire, described, json_schema
from testbed.manifests.objects import SourceObject, read_objects_file, repeated_objects, unmatched_selectors
from testbed.manifests.scalars import (
    SUBDOMAIN_PATTERN,
    Duration,
    parse_address,
    parse_label_key,
    parse_label_value,
)
from testbed.manifests.source import BENCHMARK_FILE, SCENARIO_FILE, Document, load_one
from testbed.manifests.text import suggestion, unsafe_path
from testbed.manifests.topology import MetadataWire, find_topology, load_topology
from testbed.model.doctor import CAUSES
from testbed.model.objects import RESOURCES, Resource
from testbed.model.scenario import (
    DEFAULT_EXPECT_WITHIN_S,
    DEFAULT_PATIENCE_S,
    DEFAULT_WAIT_S,
    MIN_RANDOM_SAMPLE,
    RANDOM_MODES,
    AnsweredBy,
    ApplyStep,
    ArpStep,
    CapturePoint,
    Condition,
    DeleteStep,
    DoctorStep,
    ExecStep,
    ExpectStep,
    FaultAction,
    FaultStep,
    KubectlStep,
    ObjectRef,
    OutputClaims,
    Place,
    Request,
    ResolveStep,
    ScaleStep,
    Scenario,
    Scheme,
    Selector,
    Share,
    Spread,
    Step,
    Table,
    Takes,
    WaitStep,
)
from testbed.model.topology import Topology


def find_scenarios(path: Path) -> list[Path]:
    """Return the scenarios of a path in order: itself, or the folders in a folder that is none, by name."""
    if not path.is_dir() or (path / SCENARIO_FILE).exists():
        return [path]
    return sorted(found.parent for found in path.glob(f"*/{SCENARIO_FILE}")) or [path]


# ── the format ──────────────────────────────────────────────────────────────────────────────────────────────────────

ModeName = Literal["userspace", "iptables", "ipvs", "nftables"]
WhereText = Annotated[
    str,
    described(
        "WHERE: a node, an outside host, `NAMESPACE/POD`, or `NAMESPACE/label=value` (the first ready pod by name)"
    ),
]
PodsText = Annotated[str, Meta(description="PODS: NAMESPACE/POD or NAMESPACE/label=value[,label=value]")]
_SHOWN_WITHIN = "try again until it holds, at most this long; `0s`: once"
_RetriedOnce = Annotated[Duration, described(_SHOWN_WITHIN, default="0s")]
_RetriedExpectation = Annotated[Duration, described(_SHOWN_WITHIN, default=f"{DEFAULT_EXPECT_WITHIN_S:g}s")]


class ScaleWire(Wire):
    """Set the replicas of a Deployment or a ReplicaSet."""

    replicas: Annotated[int, described("how many", ge=0, le=10000)] | None
    deployment: Annotated[str, described("`NAMESPACE/NAME`; this or replicaset")] | None = None
    replicaset: Annotated[str, described("`NAMESPACE/NAME`")] | None = None
    within: (
        Annotated[
            Duration, described("wait until that many pods are ready, at most this long; default: not waited for")
        ]
        | None
    ) = None


class TableWire(Wire):
    """The form of a table as kubectl prints it."""

    columns: Annotated[list[str], described("the header: all columns, in order", min_length=1)] | None
    rows: (
        Annotated[
            list[list[str]],
            described("every row, in any order; a cell is a pattern in which `*` and `?` stand for text"),
        ]
        | None
    )


_Words = Annotated[
    str | Annotated[list[str], Meta(min_length=1)],
    described("the program and its arguments: a list of words, or text that is split into words (quotes count)"),
]
_Printed = Annotated[str, described("a part of the standard output; default: anything")]
_Matched = Annotated[
    str,
    described(
        "a regular expression for a part of all it writes, errors included; `^` and `$` are of lines; default: anything"
    ),
]
_Table = Annotated[TableWire | None, described("the table that it prints")]
_KEPT_NAME = "[a-z][a-z0-9-]*"
_NAME_PATTERN = f"^{_KEPT_NAME}$"
_Kept = Annotated[
    str,
    described(
        "keep what it prints under this name: `{{NAME}}` stands for it in `run` and `prints` of later steps; default: not kept",
        pattern=_NAME_PATTERN,
    ),
]
_Differs = Annotated[
    str,
    described(
        "it prints something else than what was kept under this name; default: not compared", pattern=_NAME_PATTERN
    ),
]
_ExitStatus = Annotated[int, described("the exit status that it must end with", ge=0, le=255)]


class ExecWire(Wire):
    """Run a program in a node, an outside host or a pod, without a shell: name `sh -c` yourself if you want one."""

    in_: WhereText | None = field(name="in")
    run: _Words | None
    prints: _Printed | None = None
    matches: _Matched | None = None
    table: _Table = None
    differs: _Differs | None = None
    keep: _Kept | None = None
    status: _ExitStatus = 0
    within: _RetriedOnce | None = None


class KubectlWire(Wire):
    """Run kubectl, with the folder of the scenario as its working folder."""

    run: _Words | None
    prints: _Printed | None = None
    matches: _Matched | None = None
    table: _Table = None
    differs: _Differs | None = None
    keep: _Kept | None = None
    each: (
        Annotated[
            str,
            described(
                "PODS: run once for each of them, by name; `{{pod}}`, `{{ip}}` and `{{number}}` stand for its name, its address, "
                "and 1, 2, …; default: run once"
            ),
        ]
        | None
    ) = None
    editor: Annotated[str, described("what `kubectl edit` runs on the file (KUBE_EDITOR); default: none")] | None = None
    status: _ExitStatus = 0
    within: _RetriedOnce | None = None


_NAMED = "`NAMESPACE/NAME` or `NAMESPACE/label=value[,label=value]`"


class WaitWire(Wire):
    """Wait for a condition: exactly one kind of object, and `for`."""

    for_: (
        Annotated[
            Literal["available", "ready", "running", "deleted", "succeeded", "endpoints"],
            described("the condition; which of them a kind can have is said with the kind"),
        ]
        | None
    ) = field(name="for")
    deployment: Annotated[str, described(f"{_NAMED}: available, ready, deleted")] | None = None
    replicaset: Annotated[str, described(f"{_NAMED}: available, ready, deleted")] | None = None
    daemonset: Annotated[str, described(f"{_NAMED}: available, ready, deleted")] | None = None
    pod: Annotated[str, described(f"{_NAMED}: ready, running, succeeded, deleted")] | None = None
    pods: Annotated[str, described("the same as pod, for the eye when there are several")] | None = None
    service: Annotated[str, described(f"{_NAMED}: endpoints (ready ones), deleted")] | None = None
    node: Annotated[str, described("`NAME` or `label=value`: ready, deleted")] | None = None
    job: Annotated[str, described(f"{_NAMED}: succeeded, deleted")] | None = None
    namespace: Annotated[str, described("`NAME`: deleted")] | None = None
    count: (
        Annotated[
            int,
            described(
                "exactly so many: objects, or endpoints of a service; default: all there are, and one at least",
                ge=0,
                le=100000,
            ),
        ]
        | None
    ) = None
    within: Annotated[Duration, described("how long it is waited for", default=f"{DEFAULT_WAIT_S:g}s")] | None = None


class AnsweredByWire(Wire):
    """Which pods answer: exactly one of any, one, each and same. `answeredBy: PODS` is short for `{any: PODS}`."""

    any: Annotated[str, described("PODS: every answer comes from one of these")] | None = None
    one: Annotated[str, described("PODS: exactly one pod is selected, and it gives every answer")] | None = None
    each: Annotated[str, described("PODS: each of them answers at least once, and nobody else")] | None = None
    same: Annotated[str, described("PODS: one of them gives every answer (session affinity)")] | None = None
    spread: (
        Annotated[
            Literal["even", "exact"],
            described(
                "with each. even: modes that take turns (ipvs, userspace) differ by one at most; modes that pick at random "
                f"(iptables, nftables) need times of {MIN_RANDOM_SAMPLE} at least, and pass with a chi-square p above 1e-6. "
                "exact: differ by one at most; not for modes that pick at random. Sampled once, never tried again; default: any"
            ),
        ]
        | None
    ) = None


class SeesWire(Wire):
    """What the server sees, as the echo server tells it."""

    client: Annotated[str, described("the client's address: an address, or WHERE, for that machine's or pod's")] | None


class TakesWire(Wire):
    """How long every answer takes, from before the name is looked up until its end. One of the two, or both."""

    at_least: Annotated[Duration, described("not less; default: no bound")] | None = None
    at_most: Annotated[Duration, described("not more, and less than patience; default: no bound")] | None = None


class ExpectWire(Wire):
    """Ask, and look at the answers: exactly one of get, tcp, udp, resolve and arp. Without any claim, an answer is enough.

    With `tcp`, nothing to `send` and nothing claimed about the answer, a connection is enough: nothing is sent over it.
    """

    from_: WhereText | None = field(name="from")
    get: Annotated[str, described("an HTTP request: `http://HOST[:PORT]/PATH`, or https")] | None = None
    tcp: (
        Annotated[
            str,
            described(
                "`HOST:PORT`; the answer is the first line, or what came until the server closed or patience was over"
            ),
        ]
        | None
    ) = None
    udp: Annotated[str, described("`HOST:PORT`; the answer is one datagram")] | None = None
    resolve: (
        Annotated[
            str,
            described(
                "a DNS question, with dig and the search list of WHERE's resolv.conf: a name, or an address for its PTR records"
            ),
        ]
        | None
    ) = None
    arp: Annotated[str, described("an address of the LAN: who has it? `from` is a node or an outside host")] | None = (
        None
    )
    headers: Annotated[dict[str, str], described("get: HTTP headers to send")] = field(default_factory=dict)
    send: (
        Annotated[
            str,
            described(
                "get: a body, which makes it a POST; tcp, udp: text; default: nothing, or `hello` where tcp and udp need it"
            ),
        ]
        | None
    ) = None
    times: Annotated[int, described("get, tcp, udp: how many requests, each on a new connection", ge=1, le=100000)] = 1
    patience: (
        Annotated[
            Duration,
            described(
                "how long one request may take; arp: how long answers are waited for",
                default=f"{DEFAULT_PATIENCE_S:g}s",
            ),
        ]
        | None
    ) = None
    status: Annotated[int, described("get: the HTTP status of every answer; default: any", ge=100, le=599)] | None = (
        None
    )
    body: Annotated[str, described("get, tcp, udp: a part of every answer; default: any")] | None = None
    answered_by: Annotated[
        PodsText | AnsweredByWire | list[str] | None,
        described(
            "get, tcp, udp: the pods that answer, as PODS or as below; arp: exactly the nodes and outside hosts that do, told by "
            "their MACs, `[]` for nobody; default: anybody"
        ),
    ] = None
    sees: Annotated[SeesWire | None, described("get, tcp, udp: what the server sees of the client")] = None
    takes: Annotated[TakesWire | None, described("get, tcp, udp: how long answers take")] = None
    refused: Annotated[bool, described("get, tcp, udp: every request is refused")] = False
    timeout: Annotated[bool, described("get, tcp, udp: no request gets an answer")] = False
    type: (
        Annotated[
            Literal["A", "AAAA", "CNAME", "MX", "NS", "PTR", "SOA", "SRV", "TXT"],
            described("resolve: the type of the records; default: A, and PTR of an address"),
        ]
        | None
    ) = None
    answers: (
        Annotated[
            list[str] | str,
            described(
                "resolve: the values of the records of this type, all of them, in any order, without final dots; SRV also as "
                "`PORT TARGET`; for A also PODS: the addresses of those that are ready. `[]`: the name is there and has none; "
                "default: one at least"
            ),
        ]
        | None
    ) = None
    rcode: (
        Annotated[
            Literal["NOERROR", "NXDOMAIN", "SERVFAIL", "REFUSED"],
            described("resolve: the answer's code", default="NOERROR"),
        ]
        | None
    ) = None
    server: (
        Annotated[
            IPv4Address,
            described(
                "resolve: the server to ask; default: that of resolv.conf, from a node or outside host cluster DNS"
            ),
        ]
        | None
    ) = None
    within: _RetriedExpectation | None = None


class FaultWire(Wire):
    """Break or mend something: exactly one of kill, stop, start, link and node."""

    kill: (
        Annotated[
            str, described("PODS, or `PODS@NODE` for those on a node: SIGKILL to the programs of their containers")
        ]
        | None
    ) = None
    stop: Annotated[str, described("PODS or `PODS@NODE`: SIGSTOP")] | None = None
    start: Annotated[str, described("PODS or `PODS@NODE`: SIGCONT")] | None = None
    link: (
        Annotated[
            str, described("a node or outside host, whose LAN link is cut (`down: true`) or restored (`down: false`)")
        ]
        | None
    ) = None
    node: (
        Annotated[
            str,
            described(
                "a node. `down: true` cuts its power: its kubelet, its pods and its link stop; with false it boots, and its pods "
                "start again"
            ),
        ]
        | None
    ) = None
    down: Annotated[bool, described("required with link and node, refused otherwise; default: none")] | None = None


class DoctorWire(Wire):
    """Have [testbed doctor](doctor.md) look at the lab."""

    names: Annotated[list[str] | None, described("exactly the causes that it must find; `[]` when all is well")]
    at: Annotated[list[str], described("places that must be among the findings, such as `node node1`")] = field(
        default_factory=list
    )
    within: _RetriedExpectation | None = None


class StepWire(Wire):
    """One step: exactly one kind of action, and what may be said of any step."""

    name: (
        Annotated[str, described("one line, shown instead of a text made from the step; default: made from the step")]
        | None
    ) = None
    modes: (
        Annotated[list[ModeName], described("proxy modes it runs in; others skip it; default: all", min_length=1)]
        | None
    ) = None
    row: (
        Annotated[str, described("begins a row of the table that the report ends with ([below](#rows)); default: none")]
        | None
    ) = None
    capture: (
        Annotated[
            list[str] | str,
            described(
                "POINTs of [testbed capture](capture.md), a pod also as PODS: their packets are kept with `--report` "
                "([below](#captures)); default: none"
            ),
        ]
        | None
    ) = None
    apply: (
        Annotated[
            str | list[str],
            described(
                "create or update the objects of these files, which are below the scenario's folder",
                examples=["web.yaml"],
            ),
        ]
        | None
    ) = None
    delete: (
        Annotated[
            str | list[str] | dict[str, str],
            described(
                "delete the objects of these files, or `{KIND: NAMESPACE/NAME}`, with the kind in lower case",
                examples=[["web.yaml"], {"deployment": "dev/web", "service": "dev/web"}],
            ),
        ]
        | None
    ) = None
    scale: Annotated[
        ScaleWire | None,
        described("set a number of replicas", examples=[{"deployment": "dev/web", "replicas": 5, "within": "20s"}]),
    ] = None
    exec: Annotated[
        ExecWire | None,
        described(
            "run a program",
            examples=[
                {"in": "node1", "run": "iptables-save -t nat", "prints": "KUBE-SERVICES"},
                {"in": "dev/client", "run": ["sh", "-c", "cat /etc/resolv.conf | head -1"], "matches": "^search dev"},
            ],
        ),
    ] = None
    kubectl: Annotated[
        KubectlWire | None,
        described(
            "run kubectl",
            examples=[
                {"run": "get service web -n dev -o jsonpath={.spec.clusterIP}", "keep": "address"},
                {
                    "run": "get endpoints -n dev",
                    "table": {"columns": ["NAME", "ENDPOINTS", "AGE"], "rows": [["web", "10.244.*:80*", "*"]]},
                    "within": "5s",
                },
            ],
        ),
    ] = None
    wait: Annotated[
        WaitWire | None,
        described(
            "wait for a condition",
            examples=[
                {"deployment": "dev/web", "for": "available", "within": "20s"},
                {"service": "dev/web", "for": "endpoints", "count": 3},
            ],
        ),
    ] = None
    expect: Annotated[
        ExpectWire | None,
        described(
            "ask, and look at the answers",
            examples=[
                {
                    "from": "client",
                    "get": "http://192.168.93.11:30888/",
                    "times": 300,
                    "answeredBy": {"each": "dev/app=web", "spread": "even"},
                },
                {"from": "dev/client", "tcp": "web:80", "sees": {"client": "dev/client"}},
                {"from": "client", "get": "http://192.168.93.12:30888/", "timeout": True},
                {"from": "dev/client", "resolve": "web", "answers": "10.96.1.10"},
                {
                    "from": "dev/client",
                    "resolve": "_sql._tcp.db",
                    "type": "SRV",
                    "answers": ["5432 db-0.db.dev.svc.cluster.local"],
                },
                {"from": "node1", "resolve": "gone.dev.svc.cluster.local", "rcode": "NXDOMAIN"},
                {"from": "client", "arp": "192.168.93.231", "answeredBy": ["node2"]},
                {"from": "client", "arp": "192.168.93.231", "answeredBy": [], "within": "10s"},
            ],
        ),
    ] = None
    fault: Annotated[
        FaultWire | None,
        described(
            "break or mend something",
            examples=[
                {"kill": "kube-system/kube-proxy@node2"},
                {"link": "node3", "down": True},
                {"node": "node3", "down": False},
            ],
        ),
    ] = None
    doctor: Annotated[
        DoctorWire | None,
        described(
            "look at the lab",
            examples=[{"names": []}, {"names": ["ip-forward-off"], "at": ["node node1"], "within": "10s"}],
        ),
    ] = None


class SpecWire(Wire):
    """What is done in which cluster."""

    topology: (
        Annotated[
            str,
            described(
                "the NAME of a file `NAME.yaml` in the scenario's folder or of one of ours, or a path below the folder"
            ),
        ]
        | None
    )
    steps: Annotated[list[StepWire], described("what is done and seen, in order", min_length=1)] | None
    proxy_modes: (
        Annotated[
            list[ModeName],
            described("each is a run of its own, in a lab of its own; default: the topology's own mode", min_length=1),
        ]
        | None
    ) = None
    after: (
        Annotated[
            str,
            described(
                "a folder beside the scenario's own, whose scenario must have run in the same lab: given alone, a scenario "
                "brings it along; default: none"
            ),
        ]
        | None
    ) = None


class ScenarioWire(Wire):
    """A scenario file."""

    api_version: Annotated[Literal["testbed/v1"], described("the version of the format")] | None
    kind: Annotated[Literal["Scenario"], described("what the file is")] | None
    metadata: Annotated[MetadataWire | None, described("its name")]
    spec: Annotated[SpecWire | None, described("what is done in which cluster")]


KEPT_PATTERN = rf"\{{\{{({_KEPT_NAME})\}}\}}"
_OF_EACH = frozenset({"pod", "ip", "number"})
_ACTIONS = ("apply", "delete", "scale", "exec", "kubectl", "wait", "expect", "fault", "doctor")
_REQUESTS = ("get", "tcp", "udp")
_GOES_WITH: dict[str, tuple[str, ...]] = {
    "type": ("resolve",),
    "answers": ("resolve",),
    "rcode": ("resolve",),
    "server": ("resolve",),
    "patience": (*_REQUESTS, "arp"),
    "answeredBy": (*_REQUESTS, "arp"),
}
_CONDITIONS_OF: dict[str, tuple[str, ...]] = {
    "deployment": ("available", "ready", "deleted"),
    "replicaset": ("available", "ready", "deleted"),
    "daemonset": ("available", "ready", "deleted"),
    "pod": ("ready", "running", "succeeded", "deleted"),
    "pods": ("ready", "running", "succeeded", "deleted"),
    "service": ("endpoints", "deleted"),
    "node": ("ready", "deleted"),
    "job": ("succeeded", "deleted"),
    "namespace": ("deleted",),
}


def scenario_schema() -> dict[str, Any]:
    """Return the format as JSON Schema."""
    schema = json_schema(ScenarioWire, "Scenario")
    schema["$defs"]["StepWire"]["oneOf"] = [{"required": [action]} for action in _ACTIONS]
    return schema


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_scenario(path: Path) -> Scenario:
    """Return the scenario of a file, or of the ``scenario.yaml`` in a folder, with its manifests and topology checked.

    Raises:
        ManifestError: every problem of the scenario, its topology and its manifests.
    """
    if path.is_dir() and not (path / SCENARIO_FILE).exists() and (path / BENCHMARK_FILE).exists():
        raise ManifestError([Problem(str(path), 0, f"holds a benchmark, not a scenario: `testbed bench run {path}`")])
    return load_one(path / SCENARIO_FILE if path.is_dir() else path, "scenario", read_scenario)


def read_scenario(document: Document) -> tuple[Scenario | None, list[Problem]]:
    """Return the scenario of a document, or None, and everything wrong with it and with the files it names."""
    decoded = Decoded(document)
    wire = decoded.decode(ScenarioWire)
    if wire is None or wire.spec is None:
        return None, decoded.problems
    reader = _Reader(decoded, wire.spec, Path(document.file))
    scenario = reader.read(wire.metadata)
    problems = [*decoded.problems, *reader.problems_elsewhere]
    return (None if any(not problem.warning for problem in problems) else scenario), problems


class Reference(NamedTuple):
    """A place of the file that names objects of the cluster."""

    resource: Resource
    selector: Selector
    wire: Wire
    steps: tuple[str | int, ...]


class _Reader:
    """Turns a decoded spec into a Scenario. Fields that are None were reported by the decoder already."""

    def __init__(self, decoded: Decoded, spec: SpecWire, file: Path) -> None:
        self.decoded = decoded
        self.refuse = decoded.refuse
        self.spec = spec
        self.file = file
        self.references: list[Reference] = []
        self.problems_elsewhere: list[Problem] = []
        self.objects: list[SourceObject] = []
        self.topology: Topology | None = None
        self.modes: tuple[str, ...] = ()
        self._files: set[Path] = set()
        self._kept: set[str] = set()  # names of outputs

    def read(self, metadata: MetadataWire | None) -> Scenario | None:
        topology_file = self._load_topology()
        self.modes = tuple(dict.fromkeys(self.spec.proxy_modes or ()))
        if not self.modes and self.topology is not None and not self.decoded.is_unread(self.spec, "proxyModes"):
            self.modes = (self.topology.proxy_mode,)
        steps = [step for wire in self.spec.steps or () if (step := self._step(wire))]
        self._cross_check(steps)
        after = self._after(topology_file)
        if metadata is None or metadata.name is None or self.topology is None or topology_file is None:
            return None
        return Scenario(
            name=str(metadata.name),
            file=self.file,
            topology=self.topology,
            topology_file=topology_file,
            proxy_modes=self.modes,
            steps=tuple(steps),
            warnings=tuple(p for p in (*self.decoded.problems, *self.problems_elsewhere) if p.warning),
            after=after,
        )

    def _after(self, topology_file: Path | None) -> Path | None:
        """Return the folder of the scenario that comes first, if it can share a lab with this one."""
        name = self.spec.after
        if name is None:
            return None
        here = self.file.resolve().parent
        folder = here.parent / name
        if "/" in name or name in (".", "..") or not (folder / SCENARIO_FILE).is_file():
            self.refuse(self.spec, "after", reason=f"no folder {name!r} with a {SCENARIO_FILE} beside {here.name!r}")
            return None
        if not name < here.name:
            self.refuse(self.spec, "after", reason=f"{name!r} must come before {here.name!r} by name, as in a course")
            return None
        try:
            first = load_scenario(folder)
        except ManifestError as error:
            self.problems_elsewhere += error.problems
            return None
        if topology_file is not None and first.topology_file.resolve() != topology_file.resolve():
            self.refuse(self.spec, "after", reason=f"{name!r} is for another topology, {first.topology_file.name}")
        if others := [mode for mode in self.modes if mode not in first.proxy_modes]:
            self.refuse(self.spec, "after", reason=f"{name!r} is not for proxy mode {', '.join(others)}")
        return self.file.parent.parent / name

    def _load_topology(self) -> Path | None:
        text = self.spec.topology
        if text is None:
            return None
        if reason := unsafe_path(text, "scenario"):
            self.refuse(self.spec, "topology", reason=reason)
            return None
        try:
            path = find_topology(text, self.file.parent)
        except ManifestError as error:
            self.refuse(self.spec, "topology", reason=error.problems[0].message)
            return None
        try:
            self.topology = load_topology(path)
        except ManifestError as error:
            self.problems_elsewhere += error.problems
        return path

    def _cross_check(self, steps: Sequence[Step]) -> None:
        self.problems_elsewhere += repeated_objects(self.objects)
        self.problems_elsewhere += unmatched_selectors(self.objects)
        if self.topology is not None:
            # What a step deletes is free for the next Service: then only the ranges are certain.
            may_reuse = any(isinstance(step, DeleteStep) for step in steps)
            self.problems_elsewhere += allocation_problems(self.objects, self.topology.cluster, may_reuse=may_reuse)
        if any(isinstance(step, KubectlStep) and makes_objects(step.argv) for step in steps):
            return  # what there will be is for kubectl to know
        self.problems_elsewhere += missing_namespaces(self.objects)
        for reference in self.references:
            if reason := missing(reference.resource, reference.selector, self.objects, self.topology):
                self.refuse(reference.wire, *reference.steps, reason=reason)

    # Steps

    def _step(self, wire: StepWire) -> Step | None:
        given = [
            action for action in _ACTIONS if getattr(wire, action) is not None or self.decoded.is_unread(wire, action)
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            self.refuse(wire, reason=f"a step does exactly one of {', '.join(_ACTIONS)}; got {found}")
            return None
        modes = tuple(wire.modes or ())
        for index, mode in enumerate(modes):
            if self.modes and mode not in self.modes:
                self.refuse(
                    wire,
                    "modes",
                    index,
                    reason=f"{mode!r} is not one of the scenario's proxyModes ({', '.join(self.modes)})",
                )
        about = {
            "file": self.decoded.document.file,
            "line": self.decoded.line(wire),
            "title": wire.name,
            "modes": modes,
            "row": wire.row or "",
            "capture": self._capture(wire),
        }
        if wire.name is not None and not wire.name.isprintable():
            self.refuse(wire, "name", reason=f"{wire.name!r} is not one line of text")
        if wire.row is not None and (not wire.row.isprintable() or not wire.row.strip()):
            self.refuse(wire, "row", reason=f"{wire.row!r} is not one line of text")
        match getattr(wire, given[0]):
            case str() | list() as files if given[0] == "apply":
                return self._apply(wire, files, about)
            case str() | list() | dict() as what:
                return self._delete(wire, what, about)
            case ScaleWire() as scale:
                return self._scale(scale, about)
            case ExecWire() as run:
                return self._exec(run, about)
            case KubectlWire() as run:
                return self._kubectl(run, about)
            case WaitWire() as wait:
                return self._wait(wait, about)
            case ExpectWire() as expect:
                return self._expect(expect, about, modes or self.modes)
            case FaultWire() as fault:
                return self._fault(fault, about)
            case DoctorWire() as doctor:
                return self._doctor(doctor, about)
        return None

    def _capture(self, wire: StepWire) -> tuple[CapturePoint, ...]:
        if wire.capture is None:
            return ()
        given = [wire.capture] if isinstance(wire.capture, str) else wire.capture
        points = []
        for index, text in enumerate(given):
            steps = ("capture",) if isinstance(wire.capture, str) else ("capture", index)
            if point := self._capture_point(wire, text, steps):
                points.append(point)
        if not given:
            self.refuse(wire, "capture", reason="names no point")
        return tuple(points)

    def _capture_point(self, wire: StepWire, text: str, steps: tuple[str | int, ...]) -> CapturePoint | None:
        if text == "all":
            return CapturePoint(text)
        if text.startswith("svc/") and text.count("/") == 2:
            selector = self._selector(wire, _RESOURCE_BY_KIND["service"], text.removeprefix("svc/"), *steps)
            return CapturePoint(text) if selector and selector.name else None
        where, colon, interface = text.partition(":")
        if colon and not re.fullmatch(r"[^\s/:]{1,15}", interface):
            self.refuse(wire, *steps, reason=f"{text!r}: {interface!r} is not the name of an interface")
            return None
        if "/" not in where:
            return CapturePoint(text) if self._is_machine(wire, where, *steps) else None
        selector = self._selector(wire, _RESOURCE_BY_KIND["pod"], where, *steps)
        return CapturePoint(text, selector, interface) if selector else None

    def _manifests(self, wire: StepWire, action: str, given: str | list[str]) -> tuple[Path, ...]:
        names = [given] if isinstance(given, str) else given
        paths = []
        for index, name in enumerate(names):
            steps = (action,) if isinstance(given, str) else (action, index)
            path = self.file.parent / name if not unsafe_path(name, "scenario") else None
            if path is None:
                self.refuse(wire, *steps, reason=unsafe_path(name, "scenario"))
            elif not path.is_file():
                here = [found.name for found in self.file.parent.glob("*.yaml") if found.name != self.file.name]
                self.refuse(
                    wire, *steps, reason=f"no file {name!r} beside the scenario{suggestion(name, here, cutoff=0.8)}"
                )
            else:
                paths.append(path)
                self._read_manifest(path, is_applied=action == "apply")
        return tuple(paths)

    def _read_manifest(self, path: Path, *, is_applied: bool) -> None:
        if path not in self._files:
            self._files.add(path)
            objects, problems = read_objects_file(path)
            self.problems_elsewhere += problems
            if is_applied:
                self.objects += objects
        elif is_applied and not any(source.file == str(path) for source in self.objects):
            self.objects += read_objects_file(path)[0]  # seen in a delete step before

    def _apply(self, wire: StepWire, given: str | list[str], about: dict[str, Any]) -> ApplyStep:
        files = self._manifests(wire, "apply", given)
        return ApplyStep(files=files, **_titled(about, f"apply {_names(files)}"))

    def _delete(self, wire: StepWire, given: str | list[str] | Mapping[str, str], about: dict[str, Any]) -> DeleteStep:
        if not isinstance(given, Mapping):
            files = self._manifests(wire, "delete", given)
            return DeleteStep(files=files, **_titled(about, f"delete {_names(files)}"))
        objects = []
        for kind, text in given.items():
            resource = _RESOURCE_BY_KIND.get(kind)
            if resource is None:
                self.refuse(
                    wire, "delete", kind, reason=f"no kind is called {kind!r}{suggestion(kind, _RESOURCE_BY_KIND)}"
                )
            elif found := self._object(wire, resource, text, "delete", kind):
                objects.append(found)
        if not given:
            self.refuse(wire, "delete", reason="names nothing")
        return DeleteStep(
            objects=tuple(objects), **_titled(about, f"delete {', '.join(f'{k} {v}' for k, v in given.items())}")
        )

    def _object(self, wire: Wire, resource: Resource, text: str, *steps: str) -> ObjectRef | None:
        selector = self._selector(wire, resource, text, *steps)
        if selector is None:
            return None
        if not selector.name:
            self.refuse(wire, *steps, reason=f"{text!r} is a label selector: name one object")
            return None
        return ObjectRef(resource.key, selector.namespace, selector.name)

    def _selector(self, wire: Wire, resource: Resource, text: str, *steps: str | int) -> Selector | None:
        try:
            selector = parse_selector(text) if resource.namespaced else parse_cluster_selector(text)
        except ValueError as error:
            self.refuse(wire, *steps, reason=str(error))
            return None
        self.references.append(Reference(resource, selector, wire, steps))
        return selector

    def _scale(self, wire: ScaleWire, about: dict[str, Any]) -> ScaleStep | None:
        kind = self._one_of(wire, ("deployment", "replicaset"))
        if kind is None or wire.replicas is None:
            return None
        text = getattr(wire, kind)
        found = self._object(wire, _RESOURCE_BY_KIND[kind], text, kind)
        if found is None:
            return None
        return ScaleStep(
            object=found,
            replicas=wire.replicas,
            within_s=_seconds(wire.within),
            **_titled(about, f"scale {kind} {text} to {wire.replicas}"),
        )

    def _exec(self, wire: ExecWire, about: dict[str, Any]) -> ExecStep | None:
        where = self._place(wire, wire.in_, "in")
        argv = self._argv(wire, wire.run)
        if where is None or argv is None:
            return None
        return ExecStep(
            where=where,
            argv=argv,
            prints=wire.prints,
            status=wire.status,
            within_s=_seconds(wire.within) or 0.0,
            claims=self._output_claims(wire, argv),
            **_titled(about, f"{where}: {shlex.join(argv)}{_claims(wire)}"),
        )

    def _kubectl(self, wire: KubectlWire, about: dict[str, Any]) -> KubectlStep | None:
        argv = self._argv(wire, wire.run)
        each = None if wire.each is None else self._selector(wire, _RESOURCE_BY_KIND["pod"], wire.each, "each")
        if argv is None:
            return None
        return KubectlStep(
            argv=argv,
            prints=wire.prints,
            status=wire.status,
            within_s=_seconds(wire.within) or 0.0,
            claims=self._output_claims(wire, argv, of_each=_OF_EACH if each else frozenset()),
            each=each,
            editor=self._editor(wire),
            **_titled(about, f"kubectl {shlex.join(argv)}{_claims(wire)}"),
        )

    def _editor(self, wire: KubectlWire) -> str:
        """Return the words of an editor, quoted: kubectl gives what it cannot split by itself to a shell."""
        if wire.editor is None:
            return ""
        try:
            words = shlex.split(wire.editor)
        except ValueError as error:
            self.refuse(wire, "editor", reason=f"{wire.editor!r} cannot be split into words: {str(error).lower()}")
            return ""
        if "\0" in wire.editor or not words:
            self.refuse(wire, "editor", reason=f"{wire.editor!r} names no program")
        return shlex.join(words)

    def _output_claims(
        self, wire: ExecWire | KubectlWire, argv: Sequence[str], *, of_each: frozenset[str] = frozenset()
    ) -> OutputClaims:
        """Return what is claimed about the output; refuse kept outputs that no step before has kept."""
        if wire.matches is not None:
            try:
                re.compile(wire.matches)
            except re.error as error:
                self.refuse(wire, "matches", reason=f"{wire.matches!r} is no regular expression: {error}")
        used = {name for word in (*argv, wire.prints or "") for name in re.findall(KEPT_PATTERN, word)} - of_each
        for name in sorted(used - self._kept):
            self.refuse(wire, "run", reason=f"{{{{{name}}}}} is kept by no step before{suggestion(name, self._kept)}")
        if wire.differs is not None and wire.differs not in self._kept:
            self.refuse(wire, "differs", reason=f"{wire.differs!r} is kept by no step before")
        if wire.keep is not None:
            if not re.fullmatch(_KEPT_NAME, wire.keep):
                reason = f"{wire.keep!r} is no name for an output: a small letter, then small letters, digits and '-'"
                self.refuse(wire, "keep", reason=reason)
            self._kept.add(wire.keep)
        table = None
        if wire.table is not None and wire.table.columns is not None and wire.table.rows is not None:
            table = Table(tuple(wire.table.columns), tuple(map(tuple, wire.table.rows)))
            for index, row in enumerate(table.rows):
                if len(row) != len(table.columns):
                    reason = f"has {len(row)} cells, and there are {len(table.columns)} columns"
                    self.refuse(wire.table, "rows", index, reason=reason)
        return OutputClaims(
            matches=wire.matches or "", table=table, differs=wire.differs or "", keep=wire.keep or ""
        )  # fmt: skip

    def _argv(self, wire: Wire, run: list[str] | str | None) -> tuple[str, ...] | None:
        if run is None:
            return None
        try:
            argv = shlex.split(run) if isinstance(run, str) else run
        except ValueError as error:
            self.refuse(wire, "run", reason=f"{run!r} cannot be split into words: {str(error).lower()}")
            return None
        if not argv:
            self.refuse(wire, "run", reason="names no program")
            return None
        if any("\0" in word for word in argv):
            self.refuse(wire, "run", reason="a word of a command cannot hold a zero byte")
            return None
        return tuple(argv)

    def _wait(self, wire: WaitWire, about: dict[str, Any]) -> WaitStep | None:
        kind = self._one_of(wire, tuple(_CONDITIONS_OF))
        if kind is None or wire.for_ is None:
            return None
        if wire.for_ not in _CONDITIONS_OF[kind]:
            allowed = " or ".join(_CONDITIONS_OF[kind])
            self.refuse(wire, "for", reason=f"a {kind} is never {wire.for_!r}: wait for {allowed}")
            return None
        resource = _RESOURCE_BY_KIND["pod" if kind == "pods" else kind]
        text = getattr(wire, kind)
        selector = self._selector(wire, resource, text, kind)
        if selector is None:
            return None
        count = "" if wire.count is None else f"{wire.count} "
        return WaitStep(
            resource=resource.key,
            selector=selector,
            condition=Condition(wire.for_),
            count=wire.count,
            within_s=DEFAULT_WAIT_S if wire.within is None else float(wire.within),
            **_titled(about, f"wait for {kind} {text}: {count}{wire.for_}"),
        )

    def _fault(self, wire: FaultWire, about: dict[str, Any]) -> FaultStep | None:
        action = self._one_of(wire, ("kill", "stop", "start", "link", "node"))
        if wire.down is not None and action not in ("link", "node"):
            self.refuse(wire, "down", reason="goes with link and node only")
        if action is None:
            return None
        text: str = getattr(wire, action)
        if action in ("link", "node"):
            if wire.down is None:
                self.refuse(wire, reason='required field "down" is missing')
                return None
            if not self._is_machine(wire, text, action):
                return None
            if action == "node":
                if self.topology is not None and text in {host.name for host in self.topology.hosts}:
                    self.refuse(wire, "node", reason=f"{text!r} is an outside host; only nodes can be switched off")
                    return None
                title = f"switch node {text} {'off' if wire.down else 'on again'}"
                return FaultStep(
                    action=FaultAction.NODE_DOWN if wire.down else FaultAction.NODE_UP,
                    node=text,
                    **_titled(about, title),
                )
            title = f"{'cut' if wire.down else 'restore'} the link of {text}"
            return FaultStep(
                action=FaultAction.LINK_DOWN if wire.down else FaultAction.LINK_UP, node=text, **_titled(about, title)
            )
        pods_text, at, node = text.partition("@")
        selector = self._selector(wire, _RESOURCE_BY_KIND["pod"], pods_text, action)
        if selector is None or (at and not self._is_machine(wire, node, action)):
            return None
        return FaultStep(action=FaultAction(action), pods=selector, node=node, **_titled(about, f"{action} {text}"))

    def _doctor(self, wire: DoctorWire, about: dict[str, Any]) -> DoctorStep | None:
        if wire.names is None:
            return None
        for index, name in enumerate(wire.names):
            if name not in CAUSES:
                known = suggestion(name, CAUSES) or f" (there is: {', '.join(CAUSES)})"
                self.refuse(wire, "names", index, reason=f"the doctor knows no cause {name!r}{known}")
        if wire.at and not wire.names:
            self.refuse(wire, "at", reason="goes with names: where nothing is found there is no place")
        said = ", ".join(wire.names) or "all is well"
        return DoctorStep(
            names=tuple(dict.fromkeys(wire.names)),
            at=tuple(wire.at),
            within_s=DEFAULT_EXPECT_WITHIN_S if wire.within is None else float(wire.within),
            **_titled(about, f"the doctor says: {said}"),
        )

    # Expectations

    def _expect(
        self, wire: ExpectWire, about: dict[str, Any], modes: Sequence[str]
    ) -> ExpectStep | ResolveStep | ArpStep | None:  # fmt: skip
        where = self._place(wire, wire.from_, "from")
        how = self._one_of(wire, ("get", "tcp", "udp", "resolve", "arp"))
        self._check_fields(wire, how)
        if how == "resolve":
            return self._resolve(wire, where, about)
        if how == "arp":
            return self._arp(wire, where, about)
        request = self._request(wire, how) if how else None
        answered_by = self._answered_by(wire, modes)
        sees = self._sees(wire)
        takes = self._takes(wire)
        self._check_claims(wire, how)
        if where is None or request is None:
            return None
        step = ExpectStep(
            where=where,
            request=request,
            times=wire.times,
            status=wire.status,
            body=wire.body,
            answered_by=answered_by,
            sees_client=sees,
            takes=takes,
            refused=wire.refused,
            timeout=wire.timeout,
            within_s=DEFAULT_EXPECT_WITHIN_S if wire.within is None else float(wire.within),
            **_titled(about, _expect_title(wire, where, request, answered_by, takes)),
        )
        if step.is_statistical and wire.within is not None:
            reason = "has no effect with spread, which is sampled once and never retried: wait for readiness before it"
            self.refuse(wire, "within", reason=reason, is_warning=True)
        return step

    def _check_fields(self, wire: ExpectWire, how: str | None) -> None:
        """Refuse fields that say nothing about what is asked."""
        if how is None:
            return
        given = {
            "type": wire.type,
            "answers": wire.answers,
            "rcode": wire.rcode,
            "server": wire.server,
            "headers": wire.headers or None,
            "send": wire.send,
            "times": wire.times if wire.times != 1 else None,
            "patience": wire.patience,
            "status": wire.status,
            "body": wire.body,
            "answeredBy": wire.answered_by,
            "sees": wire.sees,
            "takes": wire.takes,
            "refused": wire.refused or None,
            "timeout": wire.timeout or None,
        }
        for name, value in given.items():
            goes_with = _GOES_WITH.get(name, _REQUESTS)
            if value is not None and how not in goes_with:
                only = f"{', '.join(goes_with[:-1])} and {goes_with[-1]}" if len(goes_with) > 1 else goes_with[0]
                self.refuse(wire, name, reason=f"goes with {only} only, not with {how}")

    def _arp(self, wire: ExpectWire, where: Place | None, about: dict[str, Any]) -> ArpStep | None:
        address = None
        try:
            address = parse_address(str(wire.arp))
        except ValueError as error:
            self.refuse(wire, "arp", reason=str(error))
        if isinstance(where, Selector):
            self.refuse(wire, "from", reason=f"{where} is a pod: ask on the LAN, from a node or an outside host")
            return None
        given = wire.answered_by
        if given is not None and not isinstance(given, list):
            self.refuse(wire, "answeredBy", reason="with arp it is a list of nodes and outside hosts; [] for nobody")
            return None
        are_known = [self._is_machine(wire, name, "answeredBy", index) for index, name in enumerate(given or ())]
        if where is None or address is None or not all(are_known):
            return None
        who = "anybody" if given is None else ", ".join(given) or "nobody"
        return ArpStep(
            where=where,
            address=address,
            answered_by=None if given is None else tuple(given),
            patience_s=DEFAULT_PATIENCE_S if wire.patience is None else float(wire.patience),
            within_s=DEFAULT_EXPECT_WITHIN_S if wire.within is None else float(wire.within),
            **_titled(about, f"{where} → arp {address}: answered by {who}"),
        )

    def _resolve(self, wire: ExpectWire, where: Place | None, about: dict[str, Any]) -> ResolveStep | None:
        name = str(wire.resolve)
        is_address = re.fullmatch(r"[0-9.]+", name) is not None
        kind = wire.type or ("PTR" if is_address else "A")
        try:
            if is_address:
                parse_address(name)
            elif len(name.removesuffix(".")) > 253 or not re.fullmatch(_QUESTION_PATTERN, name):
                raise ValueError(f"{name!r} is not a name that can be asked for: labels of 1 to 63 characters")
            if is_address and kind != "PTR":
                self.refuse(wire, "type", reason=f"{name} is an address: it has PTR records")
        except ValueError as error:
            self.refuse(wire, "resolve", reason=str(error))
        given = [wire.answers] if isinstance(wire.answers, str) else wire.answers
        answers: list[str | Selector] = []
        for index, text in enumerate(given or ()):
            steps: tuple[str | int, ...] = ("answers",) if isinstance(wire.answers, str) else ("answers", index)
            if "/" not in text:
                answers.append(text)
            elif kind != "A":
                self.refuse(wire, *steps, reason=f"{text!r}: pods stand for their addresses, which are A records")
            elif selector := self._selector(wire, _RESOURCE_BY_KIND["pod"], text, *steps):
                answers.append(selector)
        rcode = wire.rcode or "NOERROR"
        if answers and rcode != "NOERROR":
            self.refuse(wire, "answers", reason=f"an answer with {rcode} has none")
        if where is None:
            return None
        what = "" if given is None else ", ".join(given) or f"no {kind} record"
        return ResolveStep(
            where=where,
            name=name,
            record_type=kind,
            server=wire.server,
            answers=None if given is None else tuple(answers),
            rcode=rcode,
            within_s=DEFAULT_EXPECT_WITHIN_S if wire.within is None else float(wire.within),
            **_titled(about, f"{where} → dns {kind} {name}: {what or (wire.rcode or 'answers')}"),
        )

    def _check_claims(self, wire: ExpectWire, how: str | None) -> None:
        answers = [
            name
            for name, value in (
                ("status", wire.status),
                ("body", wire.body),
                ("answeredBy", wire.answered_by),
                ("sees", wire.sees),
                ("takes", wire.takes),
            )
            if value is not None
        ]
        if wire.refused and wire.timeout:
            self.refuse(wire, "timeout", reason="a request cannot be both refused and timed out")
        for name, is_set in (("refused", wire.refused), ("timeout", wire.timeout)):
            if is_set and answers:
                self.refuse(wire, name, reason=f"no answer comes, so there is no {' or '.join(answers)}")
        if how in ("tcp", "udp"):
            for name in ("status", "headers"):
                if getattr(wire, name):
                    self.refuse(wire, name, reason=f"goes with get only, not with {how}")

    def _takes(self, wire: ExpectWire) -> Takes | None:
        takes = wire.takes
        if takes is None:
            return None
        at_least, at_most = _seconds(takes.at_least), _seconds(takes.at_most)
        patience = DEFAULT_PATIENCE_S if wire.patience is None else float(wire.patience)
        if at_least is None and at_most is None:
            if not self.decoded.is_unread(takes, "atLeast") and not self.decoded.is_unread(takes, "atMost"):
                self.refuse(wire, "takes", reason="needs atLeast, atMost or both")
            return None
        if at_least is not None and at_most is not None and at_least > at_most:
            self.refuse(takes, "atLeast", reason=f"{at_least:g}s is more than atMost, {at_most:g}s")
        for name, bound in (("atLeast", at_least), ("atMost", at_most)):
            if bound is not None and bound >= patience:
                self.refuse(
                    takes, name, reason=f"{bound:g}s: an answer is not waited for longer than patience, {patience:g}s"
                )
        return Takes(at_least_s=at_least, at_most_s=at_most)

    def _request(self, wire: ExpectWire, how: str) -> Request | None:
        try:
            parsed = (
                _parse_url(wire.get) if wire.get is not None else _parse_host_port(str(getattr(wire, how)), Scheme(how))
            )
        except ValueError as error:
            self.refuse(wire, how, reason=str(error))
            return None
        for key, value in wire.headers.items():
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", key) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
                self.refuse(wire, "headers", key, reason=f"{key!r}: {value!r} is not a valid header")
        scheme, host, port, path = parsed
        return Request(
            scheme=scheme,
            host=host,
            port=port,
            path=path,
            headers=tuple(wire.headers.items()),
            send=wire.send,
            patience_s=DEFAULT_PATIENCE_S if wire.patience is None else float(wire.patience),
        )

    def _answered_by(self, wire: ExpectWire, modes: Sequence[str]) -> AnsweredBy | None:
        given = wire.answered_by
        if given is None:
            return None
        if isinstance(given, list):
            self.refuse(
                wire, "answeredBy", reason="a list of machines goes with arp only; pods are NAMESPACE/label=value"
            )
            return None
        if isinstance(given, str):
            pods = self._selector(wire, _RESOURCE_BY_KIND["pod"], given, "answeredBy")
            return AnsweredBy(pods=pods) if pods else None
        share = self._one_of(given, ("any", "one", "each", "same"))
        if share is None:
            return None
        pods = self._selector(given, _RESOURCE_BY_KIND["pod"], getattr(given, share), share)
        if given.spread is not None:
            self._check_spread(wire, given, share, modes)
        if share in ("each", "same") and wire.times < 2:
            self.refuse(given, share, reason=f"{share!r} says something about several answers: set times")
        if pods is None:
            return None
        return AnsweredBy(pods=pods, share=Share(share), spread=Spread(given.spread) if given.spread else None)

    def _check_spread(self, wire: ExpectWire, given: AnsweredByWire, share: str, modes: Sequence[str]) -> None:
        random_modes = [mode for mode in modes if mode in RANDOM_MODES]
        if share != "each":
            self.refuse(given, "spread", reason="goes with each only")
        elif given.spread == "exact" and random_modes:
            self.refuse(
                given,
                "spread",
                reason=f"'exact' cannot hold in proxy mode {random_modes[0]}, which picks pods at random",
            )
        elif given.spread == "even" and random_modes and wire.times < MIN_RANDOM_SAMPLE:
            reason = (
                f"'even' in proxy mode {random_modes[0]}, which picks pods at random, wants times of at least "
                f"{MIN_RANDOM_SAMPLE}, got {wire.times}"
            )
            self.refuse(given, "spread", reason=reason)

    def _sees(self, wire: ExpectWire) -> Any:
        text = wire.sees.client if wire.sees is not None else None
        if wire.sees is None or text is None:
            return None
        if re.fullmatch(r"[0-9.]+|.*::?.*", text):
            try:
                return parse_address(text)
            except ValueError as error:
                self.refuse(wire.sees, "client", reason=str(error))
                return None
        return self._place(wire.sees, text, "client")

    # References

    def _one_of(self, wire: Wire, names: Sequence[str]) -> str | None:
        """Return the one field of these that is given; report none, or several."""
        given = [name for name in names if getattr(wire, name) is not None]
        if len(given) == 1:
            return given[0]
        if not any(self.decoded.is_unread(wire, name) for name in names):
            self.refuse(wire, reason=f"wants exactly one of {', '.join(names)}; got {' and '.join(given) or 'none'}")
        return None

    def _place(self, wire: Wire, text: str | None, name: str) -> Place | None:
        if text is None:
            return None
        if "/" not in text:
            return text if self._is_machine(wire, text, name) else None
        return self._selector(wire, _RESOURCE_BY_KIND["pod"], text, name)

    def _is_machine(self, wire: Wire, text: str, *steps: str | int) -> bool:
        if self.topology is None:
            return True
        known = [machine.name for machine in self.topology.machines]
        if text in known:
            return True
        hint = suggestion(text, known) or f" (there is: {', '.join(known)}; a pod is NAMESPACE/POD)"
        self.refuse(wire, *steps, reason=f"topology {self.topology.name!r} has no node or host {text!r}{hint}")
        return False


_QUESTION_PATTERN = (
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?"
)
_RESOURCE_BY_KIND = {resource.kind.lower(): resource for resource in RESOURCES}


def parse_selector(text: str) -> Selector:
    """Return what ``NAMESPACE/NAME`` or ``NAMESPACE/key=value[,key=value]`` selects.

    Raises:
        ValueError: it is neither.
    """
    namespace, slash, what = text.partition("/")
    if not slash or not namespace or not what:
        raise ValueError(f"{text!r} is not NAMESPACE/NAME or NAMESPACE/label=value")
    if not _is_name(namespace) or "." in namespace:
        raise ValueError(f"{text!r}: {namespace!r} is not a valid namespace")
    if "=" not in what:
        if not _is_name(what):
            raise ValueError(f"{text!r}: {what!r} is not a valid name")
        return Selector(namespace, what)
    labels = []
    for pair in what.split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {pair!r} is not label=value")
        labels.append((str(parse_label_key(key)), str(parse_label_value(value))))
    return Selector(namespace, labels=tuple(labels))


def parse_cluster_selector(text: str) -> Selector:
    """Return what ``NAME`` or ``key=value[,key=value]`` selects, of a kind without namespaces."""
    if "=" in text:
        return Selector("", labels=parse_selector(f"x/{text}").labels)
    if not _is_name(text):
        raise ValueError(f"{text!r} is not a valid name")
    return Selector("", text)


def _is_name(text: str) -> bool:
    return len(text) <= 253 and re.fullmatch(SUBDOMAIN_PATTERN, text) is not None


def _parse_url(text: str) -> tuple[Scheme, str, int, str]:
    if not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is not a URL: it holds blanks or control characters")
    url: SplitResult = urlsplit(text)
    if url.scheme not in ("http", "https"):
        raise ValueError(f"{text!r} is not an http or https URL")
    if "@" in url.netloc or url.fragment:
        raise ValueError(f"{text!r}: a URL here has no user and no fragment")
    scheme = Scheme(url.scheme)
    default_port = 80 if scheme is Scheme.HTTP else 443
    netloc = url.netloc if ":" in url.netloc else f"{url.netloc}:{default_port}"
    _, host, port, _ = _parse_host_port(netloc, scheme)
    return scheme, host, port, (url.path or "/") + (f"?{url.query}" if url.query else "")


def _parse_host_port(text: str, scheme: Scheme) -> tuple[Scheme, str, int, str]:
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError(f"{text!r} is not HOST:PORT")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r}: ports go from 1 to 65535")
    if re.fullmatch(r"[0-9.]+", host) or ":" in host:
        host = str(parse_address(host.strip("[]")))
    elif len(host) > 253 or not re.fullmatch(SUBDOMAIN_PATTERN, host.lower().removesuffix(".")):
        raise ValueError(f"{text!r}: {host!r} is not an address or a host name")
    return scheme, host, int(port), ""


def _seconds(duration: Duration | None) -> float | None:
    return None if duration is None else float(duration)


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def _titled(about: dict[str, Any], title: str) -> dict[str, Any]:
    return {**about, "title": about["title"] or title}


def _claims(wire: ExecWire | KubectlWire) -> str:
    prints = f" prints {wire.prints!r}" if wire.prints is not None else ""
    return prints + (f", ends with status {wire.status}" if wire.status else "")


def _expect_title(
    wire: ExpectWire, where: Place, request: Request, answered_by: AnsweredBy | None, takes: Takes | None
) -> str:  # fmt: skip
    times = f" ×{wire.times}" if wire.times > 1 else ""
    claims = [f"status {wire.status}"] if wire.status is not None else []
    if wire.body is not None:
        claims.append(f"body {wire.body!r}")
    if answered_by is not None:
        how = {Share.ANY: "", Share.ONE: "one ", Share.EACH: "each of ", Share.SAME: "always the same of "}[
            answered_by.share
        ]
        spread = f", {answered_by.spread.value} spread" if answered_by.spread else ""
        claims.append(f"answered by {how}{answered_by.pods}{spread}")
    if wire.sees is not None:
        claims.append(f"client seen as {wire.sees.client}")
    if takes is not None:
        claims.append(f"in {takes}")
    claims += [name for name, is_set in (("refused", wire.refused), ("timeout", wire.timeout)) if is_set]
    return f"{where} → {request}{times}: {', '.join(claims) or 'answers'}"
