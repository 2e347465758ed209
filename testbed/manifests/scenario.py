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
from testbed.manifests.decode import Decoded, Wire, json_schema
from testbed.manifests.objects import SourceObject, read_objects_file, repeated_objects, unmatched_selectors
from testbed.manifests.scalars import (
    SUBDOMAIN_PATTERN,
    Duration,
    parse_address,
    parse_label_key,
    parse_label_value,
)
from testbed.manifests.source import Document, load_one
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

SCENARIO_FILE = "scenario.yaml"


def find_scenarios(path: Path) -> list[Path]:
    """Return the scenarios of a path in order: itself, or the folders in a folder that is none, by name."""
    if not path.is_dir() or (path / SCENARIO_FILE).exists():
        return [path]
    return sorted(found.parent for found in path.glob(f"*/{SCENARIO_FILE}")) or [path]


# ── the format ──────────────────────────────────────────────────────────────────────────────────────────────────────

ModeName = Literal["userspace", "iptables", "ipvs", "nftables"]
Within = Annotated[Duration | None, Meta(description="try again until it holds, this long; 0s: once")]
WhereText = Annotated[str, Meta(description="a node, an outside host, NAMESPACE/POD or NAMESPACE/label=value")]
PodsText = Annotated[str, Meta(description="NAMESPACE/POD or NAMESPACE/label=value[,label=value]")]


class ScaleWire(Wire):
    """Set a number of replicas."""

    replicas: Annotated[int, Meta(ge=0, le=10000)] | None
    deployment: str | None = None
    replicaset: str | None = None
    within: Within = None


class TableWire(Wire):
    """The form of a printed table: all of its columns and rows."""

    columns: Annotated[list[str], Meta(min_length=1)] | None
    rows: Annotated[list[list[str]], Meta(description="cells as patterns with * and ?; in any order")] | None


MatchesText = Annotated[str | None, Meta(description="a regular expression for a part of what it writes")]
_KEPT_NAME = "[a-z][a-z0-9-]*"
NameText = Annotated[str, Meta(pattern=f"^{_KEPT_NAME}$")] | None


class ExecWire(Wire):
    """Run a program."""

    in_: WhereText | None = field(name="in")
    run: Annotated[list[str], Meta(min_length=1)] | str | None
    prints: str | None = None
    matches: MatchesText = None
    table: TableWire | None = None
    differs: NameText = None
    keep: NameText = None
    status: Annotated[int, Meta(ge=0, le=255)] = 0
    within: Within = None


class KubectlWire(Wire):
    """Run kubectl."""

    run: Annotated[list[str], Meta(min_length=1)] | str | None
    prints: str | None = None
    matches: MatchesText = None
    table: TableWire | None = None
    differs: NameText = None
    keep: NameText = None
    each: Annotated[str | None, Meta(description="run once for each of these pods: {{pod}}, {{ip}}, {{number}}")] = None
    editor: Annotated[str | None, Meta(description="what kubectl edit runs on the file")] = None
    status: Annotated[int, Meta(ge=0, le=255)] = 0
    within: Within = None


class WaitWire(Wire):
    """Wait for a condition of one kind of object."""

    for_: Literal["available", "ready", "running", "deleted", "succeeded", "endpoints"] | None = field(name="for")
    deployment: str | None = None
    replicaset: str | None = None
    daemonset: str | None = None
    pod: str | None = None
    pods: str | None = None
    service: str | None = None
    node: str | None = None
    job: str | None = None
    namespace: str | None = None
    count: Annotated[int, Meta(ge=0, le=100000)] | None = None
    within: Within = None


class AnsweredByWire(Wire):
    """Which pods answer; one of one, each, same, any."""

    any: PodsText | None = None
    one: PodsText | None = None
    each: PodsText | None = None
    same: PodsText | None = None
    spread: Literal["even", "exact"] | None = None


class SeesWire(Wire):
    """What the server sees."""

    client: Annotated[str, Meta(description="an address, or whose address: a node, an outside host, or a pod")] | None


class TakesWire(Wire):
    """How long each answer takes."""

    at_least: Duration | None = None
    at_most: Duration | None = None


class ExpectWire(Wire):
    """Send requests and look at the answers."""

    from_: WhereText | None = field(name="from")
    get: Annotated[str, Meta(description="an http or https URL")] | None = None
    tcp: Annotated[str, Meta(description="HOST:PORT")] | None = None
    udp: Annotated[str, Meta(description="HOST:PORT")] | None = None
    resolve: Annotated[str, Meta(description="a name to ask DNS for, or an address")] | None = None
    arp: Annotated[str, Meta(description="an address to ask for on the LAN")] | None = None
    type: Literal["A", "AAAA", "CNAME", "MX", "NS", "PTR", "SOA", "SRV", "TXT"] | None = None
    answers: Annotated[
        list[str] | str | None, Meta(description="values of the records, or NAMESPACE/POD or NAMESPACE/label=value")
    ] = None
    rcode: Literal["NOERROR", "NXDOMAIN", "SERVFAIL", "REFUSED"] | None = None
    server: Annotated[IPv4Address | None, Meta(description="the DNS server to ask; default: as resolv.conf says")] = (
        None
    )
    headers: dict[str, str] = field(default_factory=dict)
    send: str | None = None
    times: Annotated[int, Meta(ge=1, le=100000)] = 1
    patience: Annotated[Duration | None, Meta(description="how long one request may take; default 1s")] = None
    status: Annotated[int, Meta(ge=100, le=599)] | None = None
    body: str | None = None
    answered_by: PodsText | AnsweredByWire | Annotated[list[str], Meta(description="arp: nodes and hosts")] | None = (
        None
    )
    sees: SeesWire | None = None
    takes: TakesWire | None = None
    refused: bool = False
    timeout: bool = False
    within: Within = None


class FaultWire(Wire):
    """Break or mend something."""

    kill: Annotated[str, Meta(description="NAMESPACE/POD[@NODE]: SIGKILL")] | None = None
    stop: Annotated[str, Meta(description="NAMESPACE/POD[@NODE]: SIGSTOP")] | None = None
    start: Annotated[str, Meta(description="NAMESPACE/POD[@NODE]: SIGCONT")] | None = None
    link: Annotated[str, Meta(description="a node or outside host")] | None = None
    node: Annotated[str, Meta(description="a node: with down, its power is cut")] | None = None
    down: bool | None = None


class DoctorWire(Wire):
    """Have the doctor look at the lab."""

    names: Annotated[list[str] | None, Meta(description="exactly the causes that are found; [] when all is well")]
    at: Annotated[list[str], Meta(description="places among the findings, such as node node1")] = field(
        default_factory=list
    )
    within: Within = None


class StepWire(Wire):
    """One step: exactly one kind of action."""

    name: Annotated[str | None, Meta(description="shown instead of a text made from the step")] = None
    modes: Annotated[list[ModeName], Meta(min_length=1, description="proxy modes it runs in")] | None = None
    row: Annotated[str | None, Meta(description="begins a row of the table that a run ends with")] = None
    capture: Annotated[
        list[str] | str | None, Meta(description="POINTs of `testbed capture`: their packets are kept with --report")
    ] = None
    apply: str | list[str] | None = None
    delete: str | list[str] | dict[str, str] | None = None
    scale: ScaleWire | None = None
    exec: ExecWire | None = None
    kubectl: KubectlWire | None = None
    wait: WaitWire | None = None
    expect: ExpectWire | None = None
    fault: FaultWire | None = None
    doctor: DoctorWire | None = None


class SpecWire(Wire):
    """What is done in which cluster."""

    topology: Annotated[str, Meta(description="a file of this folder, or the name of one of ours")] | None
    steps: Annotated[list[StepWire], Meta(min_length=1)] | None
    proxy_modes: Annotated[list[ModeName], Meta(min_length=1)] | None = None


class ScenarioWire(Wire):
    """A scenario file."""

    api_version: Literal["testbed/v1"] | None
    kind: Literal["Scenario"] | None
    metadata: MetadataWire | None
    spec: SpecWire | None


KEPT_PATTERN = r"\{\{([a-z][a-z0-9-]*)\}\}"
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
        )

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
