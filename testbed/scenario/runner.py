"""One scenario in one lab: steps in order, each retried until its own deadline, each with what was wanted and seen."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path

from testbed.errors import ApiError, ExpectationFailed, InputError, TestbedError
from testbed.kernel.pace import is_nested, patient
from testbed.kernel.processes import Completed
from testbed.kernel.rtnetlink import mac_of
from testbed.lab.kubectl import find_kubectl
from testbed.manifests import load_objects
from testbed.model.objects import BY_KEY, Object, labels_of, name_of, namespace_of
from testbed.model.scenario import (
    ApplyStep,
    ArpStep,
    Condition,
    DeleteStep,
    ExecStep,
    ExpectStep,
    FaultAction,
    FaultStep,
    KubectlStep,
    Place,
    ResolveStep,
    ScaleStep,
    Scenario,
    Selector,
    Step,
    WaitStep,
)
from testbed.probes import Observation, ask, ask_arp, dig_argv, read_dig
from testbed.scenario.judge import is_connection_only, judge
from testbed.scenario.judge_arp import judge_arp
from testbed.scenario.judge_dns import judge_resolution
from testbed.scenario.lab import LabLike
from testbed.scenario.objects import (
    SERVICE_LABEL,
    describe,
    holds,
    is_ready,
    pod_name,
    ready_endpoints,
    selected,
)
from testbed.scenario.recorder import Recorder

RETRY_EVERY_S = 0.1
_PROGRAM_TIMEOUT_S = 60.0
_END_WITHIN_S = 0.3  # between the first thing that fails in a dying lab and its end
_SIGNALS = {FaultAction.KILL: signal.SIGKILL, FaultAction.STOP: signal.SIGSTOP, FaultAction.START: signal.SIGCONT}


class Status(Enum):
    """How a step ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"  # an earlier step failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a step."""

    passed: bool
    wanted: str = ""
    seen: str = ""
    where: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    observations: tuple[Observation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step's end. ``counts``: how often each pod answered, for expectations about who answers."""

    number: int
    step: Step
    status: Status
    duration_s: float = 0.0
    attempts: int = 0
    wanted: str = ""
    seen: str = ""
    where: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    observations: tuple[Observation, ...] = ()
    captures: tuple[str, ...] = ()  # names of pcapng files in the report folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """One scenario in one proxy mode."""

    scenario: Scenario
    mode: str
    steps: tuple[StepResult, ...]
    duration_s: float
    nested: bool = False  # seen in the nested kernel

    @property
    def passed(self) -> bool:
        return all(step.status is Status.PASSED for step in self.steps)


def run_scenario(
    scenario: Scenario, mode: str, lab: LabLike, *, on_begin: Callable[[int, int, Step], None] = lambda *_: None,
    on_end: Callable[[StepResult, int], None] = lambda *_: None, clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep, recorder: Recorder | None = None,
) -> ScenarioResult:  # fmt: skip
    """Run the steps of a mode, until one fails; the rest are then not run.

    Args:
        on_begin: called with a step's number, how many there are, and the step.
        on_end: called with each result and how many steps there are.
        recorder: keeps the packets of steps.
    """
    runner = _Runner(lab, mode, clock, pause, recorder)
    steps = scenario.steps_for(mode)
    began = clock()
    results: list[StepResult] = []
    for number, step in enumerate(steps, 1):
        if results and results[-1].status is not Status.PASSED:
            result = StepResult(number=number, step=step, status=Status.NOT_RUN)
        else:
            on_begin(number, len(steps), step)
            result = runner.run(number, step)
        results.append(result)
        on_end(result, len(steps))
    return ScenarioResult(
        scenario=scenario, mode=mode, steps=tuple(results), duration_s=clock() - began, nested=is_nested()
    )


class _Runner:
    def __init__(
        self, lab: LabLike, mode: str, clock: Callable[[], float], pause: Callable[[float], None], recorder: Recorder | None
    ) -> None:  # fmt: skip
        self._lab = lab
        self._mode = mode
        self._clock = clock
        self._pause = pause
        self._recorder = recorder

    def run(self, number: int, step: Step) -> StepResult:
        """Try a step until it passes or its time is over, and keep its packets."""
        if self._recorder is None:
            return self._run(number, step)
        try:
            self._recorder.begin(number, self._points(step))
        except (TestbedError, OSError) as error:
            return StepResult(
                number=number, step=step, status=Status.FAILED, wanted=f"a capture at {_texts(step)}", seen=str(error)
            )
        result = self._run(number, step)
        return replace(result, captures=self._recorder.end(number, failed=result.status is Status.FAILED))

    def _points(self, step: Step) -> list[str]:
        """Return the POINTs of a step's capture, with the pods that are there now."""
        points: list[str] = []
        for point in step.capture:
            if point.pods is None:
                points.append(point.text)
                continue
            pods = [pod_name(pod) for pod in self._pods(point.pods)]
            if not pods:
                raise InputError(f"there is no pod {point.pods} to capture at")
            points += [f"{pod}:{point.interface}" if point.interface else pod for pod in sorted(pods)]
        return points

    def _run(self, number: int, step: Step) -> StepResult:
        began = self._clock()
        within_s = patient(_within_s(step))
        attempts = 0
        while True:
            attempts += 1
            try:
                attempt = self._try(step)
            except (TestbedError, OSError) as error:
                attempt = Attempt(passed=False, wanted=step.title, seen=str(error))
            elapsed = self._clock() - began
            is_last = elapsed + RETRY_EVERY_S > within_s
            if attempt.passed:
                break
            if ended := self._lab.why_ended(within_s=_END_WITHIN_S if is_last else 0.0):
                attempt = replace(attempt, seen=ended)
                within_s = 0.0
                break
            if is_last:
                break
            self._pause(RETRY_EVERY_S)
        return StepResult(
            number=number,
            step=step,
            status=Status.PASSED if attempt.passed else Status.FAILED,
            duration_s=elapsed,
            attempts=attempts,
            wanted=attempt.wanted + (f" (within {within_s:g} s)" if within_s and not attempt.passed else ""),
            seen=attempt.seen,
            where=attempt.where,
            counts=attempt.counts,
            observations=attempt.observations,
        )

    def _try(self, step: Step) -> Attempt:
        match step:
            case ApplyStep():
                return self._apply(step)
            case DeleteStep():
                return self._delete(step)
            case ScaleStep():
                return self._scale(step)
            case ExecStep():
                return self._exec(step)
            case KubectlStep():
                return self._kubectl(step)
            case WaitStep():
                return self._wait(step)
            case ExpectStep():
                return self._expect(step)
            case ResolveStep():
                return self._resolve(step)
            case ArpStep():
                return self._arp(step)
            case FaultStep():
                return self._fault(step)

    # -- objects ---------------------------------------------------------------------------------------------------

    def _apply(self, step: ApplyStep) -> Attempt:
        done = []
        for file in step.files:
            for source in load_objects(file):
                try:
                    obj, verb = self._lab.api.apply(source.object)
                except ApiError as error:
                    return Attempt(
                        passed=False, wanted=step.title, seen=error.message, where=f"{source.file}:{source.line}"
                    )
                done.append(f"{obj['kind'].lower()}/{name_of(obj)} {verb}")
        return Attempt(passed=True, seen=", ".join(done))

    def _delete(self, step: DeleteStep) -> Attempt:
        references = [(ref.resource, ref.namespace, ref.name) for ref in step.objects]
        for file in step.files:
            for source in reversed(load_objects(file)):
                obj = source.object
                try:
                    resource = self._lab.api.resource_of(obj)
                except ApiError:  # nothing of this kind can be there
                    continue
                namespace = (namespace_of(obj) or "default") if resource.namespaced else ""
                references.append((resource.key, namespace, name_of(obj)))
        for reference in references:
            try:
                self._lab.api.delete(*reference)
            except ApiError as error:
                if error.code != 404:  # deleting what is absent succeeds
                    raise
        return Attempt(passed=True)

    def _scale(self, step: ScaleStep) -> Attempt:
        ref = step.object
        self._lab.api.patch(ref.resource, ref.namespace, ref.name, {"spec": {"replicas": step.replicas}})
        if step.within_s is None:
            return Attempt(passed=True)
        found = self._lab.api.get(ref.resource, ref.namespace, ref.name)
        return Attempt(passed=holds(found, Condition.AVAILABLE), wanted=f"{step.replicas} ready", seen=describe(found))

    def _wait(self, step: WaitStep) -> Attempt:
        selector = step.selector
        wanted = f"{BY_KEY[step.resource].kind.lower()} {selector} {step.condition.value}"
        if step.condition is Condition.ENDPOINTS:
            return self._wait_for_endpoints(step, wanted)
        objects, _ = self._lab.api.list(step.resource, selector.namespace or None)
        found = selected(objects, selector, with_owned=step.resource == "pods")
        if step.condition is Condition.DELETED:
            return Attempt(passed=not found, wanted=wanted, seen=", ".join(map(describe, found)) or "no such object")
        good = [obj for obj in found if holds(obj, step.condition)]
        if step.count is not None:
            wanted = f"exactly {step.count} {wanted}"
            passed = len(good) == step.count
        else:
            passed = bool(found) and len(good) == len(found)
        return Attempt(passed=passed, wanted=wanted, seen="; ".join(map(describe, found)) or "no such object")

    def _wait_for_endpoints(self, step: WaitStep, wanted: str) -> Attempt:
        selector = step.selector
        services, _ = self._lab.api.list("services", selector.namespace)
        names = [name_of(service) for service in selected(services, selector)]
        slices, _ = self._lab.api.list("endpointslices.discovery.k8s.io", selector.namespace)
        addresses = ready_endpoints([s for s in slices if labels_of(s).get(SERVICE_LABEL) in names])
        passed = len(addresses) == step.count if step.count is not None else bool(addresses)
        nothing = "no ready endpoint" if names else "no such object"
        return Attempt(
            passed=bool(names) and passed,
            wanted=wanted + ("" if step.count is None else f", {step.count} of them"),
            seen=", ".join(sorted(addresses)) or nothing,
        )

    # -- programs and requests -------------------------------------------------------------------------------------

    def _exec(self, step: ExecStep) -> Attempt:
        where = self._place(step.where)
        done = self._lab.run(where, step.argv, timeout_s=patient(max(_PROGRAM_TIMEOUT_S, step.within_s)))
        return _program_attempt(step, step.argv, done, f" in {where}")

    def _kubectl(self, step: KubectlStep) -> Attempt:
        argv = [find_kubectl(), f"--kubeconfig={self._lab.kubeconfig}", *step.argv]
        try:  # in the scenario's folder, so that `apply -f FILE` finds its files
            ran = subprocess.run(
                argv, capture_output=True, timeout=patient(_PROGRAM_TIMEOUT_S), check=False, cwd=Path(step.file).parent
            )
        except subprocess.TimeoutExpired as error:
            raise ExpectationFailed(f"did not end within {patient(_PROGRAM_TIMEOUT_S):g} s") from error
        return _program_attempt(step, ["kubectl", *step.argv], Completed(ran.returncode, ran.stdout, ran.stderr), "")

    def _expect(self, step: ExpectStep) -> Attempt:
        where = self._place(step.where)
        pods = self._pods(step.answered_by.pods) if step.answered_by else []
        client = self._client_address(step.sees_client) if step.sees_client is not None else ""
        # silence is not waited for any longer: it would last as long in each of the requests
        patience_s = step.request.patience_s if step.timeout else patient(step.request.patience_s)
        request = replace(step.request, patience_s=patience_s)
        timeout_s = patient(step.times * (patience_s + 1) + 30)
        connect_only = is_connection_only(step)
        observations = self._lab.call(where, ask, request, step.times, connect_only, timeout_s=timeout_s)
        ready = [pod_name(pod) for pod in pods if is_ready(pod)]
        verdict = judge(step, observations, pods=ready, mode=self._mode, client=client)
        return Attempt(
            passed=verdict.passed,
            wanted=verdict.wanted,
            seen=verdict.seen,
            where=f"{step.request} from {where}",
            counts=verdict.counts if step.answered_by else {},
            observations=observations,
        )

    # -- faults ----------------------------------------------------------------------------------------------------

    def _resolve(self, step: ResolveStep) -> Attempt:
        where = self._place(step.where)
        server = step.server
        if server is None and isinstance(step.where, str):
            server = self._lab.topology.cluster.dns  # a machine's own resolv.conf does not know the cluster
        selectors = [answer for answer in step.answers or () if not isinstance(answer, str)]
        pods = [pod for selector in selectors for pod in self._pods(selector) if is_ready(pod)]
        argv = dig_argv(step.name, step.record_type, server)
        resolution = read_dig(self._lab.run(where, argv, timeout_s=patient(_PROGRAM_TIMEOUT_S)))
        verdict = judge_resolution(step, resolution, [pod["status"]["podIP"] for pod in pods])
        return Attempt(
            passed=verdict.passed, wanted=verdict.wanted, seen=verdict.seen, where=f"`{shlex.join(argv)}` in {where}"
        )

    def _arp(self, step: ArpStep) -> Attempt:
        patience_s = step.patience_s + _PROGRAM_TIMEOUT_S
        answers = self._lab.call(step.where, ask_arp, step.address, step.patience_s, timeout_s=patience_s)
        names = {mac_of(machine.address): machine.name for machine in self._lab.topology.machines}
        verdict = judge_arp(step, answers, names)
        where = f"arp {step.address} from {step.where}"
        return Attempt(passed=verdict.passed, wanted=verdict.wanted, seen=verdict.seen, where=where)

    def _fault(self, step: FaultStep) -> Attempt:
        if step.action in (FaultAction.NODE_DOWN, FaultAction.NODE_UP):
            self._lab.set_power(step.node, step.action is FaultAction.NODE_UP)
            return Attempt(passed=True)
        if step.pods is None:
            self._lab.set_link(step.node, step.action is FaultAction.LINK_UP)
            return Attempt(passed=True)
        pods = [pod for pod in self._pods(step.pods) if step.node in ("", pod["spec"].get("nodeName"))]
        if not pods:
            on = f" on node {step.node}" if step.node else ""
            return Attempt(passed=False, wanted=f"a pod {step.pods}{on}", seen="there is none")
        for pod in pods:
            self._lab.signal_pod(namespace_of(pod), name_of(pod), _SIGNALS[step.action])
        return Attempt(passed=True, seen=", ".join(pod_name(pod) for pod in pods))

    # -- who and where ---------------------------------------------------------------------------------------------

    def _pods(self, selector: Selector) -> list[Object]:
        pods, _ = self._lab.api.list("pods", selector.namespace)
        return selected(pods, selector, with_owned=True)

    def _place(self, place: Place) -> str:
        """Return a place as the lab names it; of several pods the first ready one by name."""
        return place if isinstance(place, str) else pod_name(self._first_ready(place))

    def _first_ready(self, selector: Selector) -> Object:
        ready = sorted(filter(is_ready, self._pods(selector)), key=pod_name)
        if not ready:
            raise InputError(f"no pod of {selector} is ready")
        return ready[0]

    def _client_address(self, who: IPv4Address | Place) -> str:
        if isinstance(who, IPv4Address):
            return str(who)
        if isinstance(who, Selector):
            return str(self._first_ready(who)["status"]["podIP"])
        return str(self._lab.topology.machine(who).address)


def _texts(step: Step) -> str:
    return ", ".join(point.text for point in step.capture)


def _within_s(step: Step) -> float:
    """Return for how long a step is tried again; 0: once."""
    if isinstance(step, ExpectStep):
        return 0.0 if step.is_statistical else step.within_s
    if isinstance(step, WaitStep | ExecStep | KubectlStep | ResolveStep | ArpStep):
        return step.within_s
    if isinstance(step, ScaleStep):
        return step.within_s or 0.0
    return 0.0


def _program_attempt(step: ExecStep | KubectlStep, argv: Sequence[str], done: Completed, place: str) -> Attempt:
    output = done.stdout.decode(errors="replace")
    wanted = [f"status {step.status}"]
    passed = done.status == step.status
    if step.prints is not None:
        wanted.append(f"{step.prints!r} printed")
        passed = passed and step.prints in output
    errors = done.stderr.decode(errors="replace").strip()
    seen = f"status {done.status}, printed {_shorten(output)!r}" + (f", said {_shorten(errors)!r}" if errors else "")
    return Attempt(passed=passed, wanted=", ".join(wanted), seen=seen, where=f"`{shlex.join(argv)}`{place}")


def _shorten(text: str, limit: int = 400) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[:limit]}…"
