"""What an expectation's claims mean: observations in, verdict and whole texts out."""

# ruff: noqa: E501  # whole texts, in tables

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from testbed.model.scenario import AnsweredBy, ExpectStep, Request, Scheme, Selector, Share, Spread, Takes
from testbed.probes import Observation, Outcome
from testbed.scenario.judge import Verdict, is_connection_only, judge

WEB = Selector("dev", labels=(("app", "web"),))
A, B, C = "dev/web-a", "dev/web-b", "dev/web-c"
STRANGER = "dev/other"
HTTP = Request(scheme=Scheme.HTTP, host="10.96.0.10", port=80, path="/")
TCP = Request(scheme=Scheme.TCP, host="10.96.0.10", port=80)


def expectation(times: int = 1, *, request: Request = HTTP, **claims: Any) -> ExpectStep:
    return ExpectStep(file="s.yaml", line=1, title="", where="client", request=request, times=times, **claims)


def answered_by(share: Share, spread: Spread | None = None) -> AnsweredBy:
    return AnsweredBy(pods=WEB, share=share, spread=spread)


def answer(pod: str = "", *, times: int = 1, **fields: Any) -> list[Observation]:
    return [Observation(outcome=Outcome.ANSWERED, answered_by=pod, **{"status": 200, **fields})] * times


def ended(outcome: Outcome, detail: str = "", *, times: int = 1) -> list[Observation]:
    return [Observation(outcome=outcome, detail=detail)] * times


REFUSED = ended(Outcome.REFUSED, "Connection refused")
SILENCE = ended(Outcome.TIMED_OUT, "no answer within 1 s")


def verdict(
    step: ExpectStep, seen: Iterable[Observation], pods: tuple[str, ...] = (), *, mode: str = "iptables", client: str = ""
) -> Verdict:  # fmt: skip
    return judge(step, tuple(seen), pods=pods, mode=mode, client=client)


@pytest.mark.parametrize(
    ("step", "observations", "passed", "wanted", "seen"),
    [
        # nothing claimed: an answer is enough
        (expectation(), answer(), True, "an answer", "answered"),
        (expectation(), answer(status=500), True, "an answer", "answered"),
        (expectation(3), answer(times=3), True, "3 answers", "3 answered"),
        (expectation(), REFUSED, False, "an answer", "refused (Connection refused)"),
        (expectation(), SILENCE, False, "an answer", "timed out (no answer within 1 s)"),
        (expectation(), ended(Outcome.UNREACHABLE, "No route to host"), False, "an answer", "unreachable (No route to host)"),
        (expectation(), ended(Outcome.RESET, "Connection reset by peer"), False, "an answer", "reset (Connection reset by peer)"),
        (expectation(), ended(Outcome.NAME_NOT_FOUND, "web.dev: Name or service not known"), False, "an answer",
         "name not found (web.dev: Name or service not known)"),
        (expectation(), ended(Outcome.FAILED, "not an HTTP answer: 'hi'"), False, "an answer", "failed (not an HTTP answer: 'hi')"),
        # one miss among many answers is a miss; every outcome is counted, with its most frequent reason
        (expectation(300), [*answer(times=299), *SILENCE], False, "300 answers", "299 answered; 1 timed out (no answer within 1 s)"),
        (expectation(6), [*answer(), *REFUSED, *REFUSED, *ended(Outcome.RESET, "a", times=1), *ended(Outcome.RESET, "b", times=2)],
         False, "6 answers", "1 answered; 2 refused (Connection refused); 3 reset (b)"),
        # TCP: where nothing is said about the answer, none is waited for
        (expectation(request=TCP), answer(), True, "a connection", "answered"),
        (expectation(4, request=TCP), [*answer(times=3), *REFUSED], False, "4 connections", "3 answered; 1 refused (Connection refused)"),
        (expectation(request=TCP, body="PONG"), answer(body="PONG\n"), True, "an answer, 'PONG' in the answer", r"answered; answer 'PONG\n'"),
        # refused
        (expectation(refused=True), REFUSED, True, "refused", "refused (Connection refused)"),
        (expectation(2, refused=True), [*REFUSED, *SILENCE], False, "refused", "1 refused (Connection refused); 1 timed out (no answer within 1 s)"),
        (expectation(refused=True), answer(), False, "refused", "answered"),
        (expectation(refused=True), ended(Outcome.UNREACHABLE, "No route to host"), False, "refused", "unreachable (No route to host)"),
        # timeout
        (expectation(timeout=True), SILENCE, True, "no answer in time", "timed out (no answer within 1 s)"),
        (expectation(timeout=True), REFUSED, False, "no answer in time", "refused (Connection refused)"),
        (expectation(3, timeout=True), [*SILENCE, *answer(), *SILENCE], False, "no answer in time",
         "1 answered; 2 timed out (no answer within 1 s)"),
        # status
        (expectation(status=200), answer(), True, "an answer, status 200", "answered; status 200 ×1"),
        (expectation(status=200), answer(status=503), False, "an answer, status 200", "answered; status 503 ×1"),
        (expectation(3, status=200), [*answer(status=503), *answer(times=2)], False, "3 answers, status 200", "3 answered; status 200 ×2, 503 ×1"),
        (expectation(status=200), SILENCE, False, "an answer, status 200", "timed out (no answer within 1 s)"),
        # body: a failed claim shows an answer that fails it, not the first
        (expectation(body="hello"), answer(body="oh, hello\n"), True, "an answer, 'hello' in the answer", r"answered; answer 'oh, hello\n'"),
        (expectation(2, body="hello"), [*answer(body="hello"), *answer(body="Hello")], False, "2 answers, 'hello' in the answer",
         "2 answered; answer 'Hello'"),
        (expectation(body="b" * 9), answer(body="a" * 300), False, "an answer, 'bbbbbbbbb' in the answer", f"answered; answer '{'a' * 200}'"),
    ],
)  # fmt: skip
def test_how_requests_end(
    step: ExpectStep, observations: list[Observation], passed: bool, wanted: str, seen: str
) -> None:
    """Claims about every single request, and what people read of them."""
    found = verdict(step, observations)
    assert (found.passed, found.wanted, found.seen) == (passed, wanted, seen)


@pytest.mark.parametrize(
    ("share", "observations", "pods", "passed", "wanted", "seen"),
    [
        # any: nobody but these
        (Share.ANY, answer(B), (A, B), True, "from a pod of dev/app=web (2 ready)", "1 from dev/web-b"),
        (Share.ANY, answer(STRANGER), (A, B), False, "from a pod of dev/app=web (2 ready)", "1 from dev/other"),
        (Share.ANY, [*answer(A), *answer(STRANGER)], (A, B), False, "from a pod of dev/app=web (2 ready)", "1 from dev/other, 1 from dev/web-a"),
        (Share.ANY, answer(A), (), False, "from a pod of dev/app=web (0 ready)", "1 from dev/web-a"),
        (Share.ANY, answer(""), (A,), False, "from a pod of dev/app=web (1 ready)", "1 from no pod named"),
        # one: the selection is a single pod, and it answers
        (Share.ONE, answer(A, times=3), (A,), True, "from the one pod of dev/app=web (1 ready)", "3 from dev/web-a"),
        (Share.ONE, answer(A, times=3), (A, B), False, "from the one pod of dev/app=web (2 ready)", "3 from dev/web-a"),
        (Share.ONE, answer(STRANGER), (A,), False, "from the one pod of dev/app=web (1 ready)", "1 from dev/other"),
        # each: all of them, and nobody else; who did not answer is named
        (Share.EACH, [*answer(A), *answer(B, times=9)], (A, B), True, "from each pod of dev/app=web (2 ready)", "1 from dev/web-a, 9 from dev/web-b"),
        (Share.EACH, answer(B, times=9), (A, B), False, "from each pod of dev/app=web (2 ready)", "0 from dev/web-a, 9 from dev/web-b"),
        (Share.EACH, [*answer(A), *answer(B), *answer(STRANGER)], (A, B), False, "from each pod of dev/app=web (2 ready)",
         "1 from dev/other, 1 from dev/web-a, 1 from dev/web-b"),
        (Share.EACH, answer(A), (), False, "from each pod of dev/app=web (0 ready)", "1 from dev/web-a"),
        # same: session affinity
        (Share.SAME, answer(B, times=5), (A, B), True, "all from the same pod of dev/app=web (2 ready)", "5 from dev/web-b"),
        (Share.SAME, [*answer(B, times=4), *answer(A)], (A, B), False, "all from the same pod of dev/app=web (2 ready)",
         "1 from dev/web-a, 4 from dev/web-b"),
        (Share.SAME, answer(STRANGER, times=5), (A, B), False, "all from the same pod of dev/app=web (2 ready)", "5 from dev/other"),
    ],
)  # fmt: skip
def test_who_answers(
    share: Share, observations: list[Observation], pods: tuple[str, ...], passed: bool, wanted: str, seen: str
) -> None:
    """answeredBy in its four forms; `seen` is written here as N from POD."""
    found = verdict(expectation(len(observations), answered_by=answered_by(share)), observations, pods)
    assert found.passed is passed
    number = len(observations)
    many = "an answer" if number == 1 else f"{number} answers"
    assert found.wanted == f"{many}, {wanted}"
    shares = [part.split(" from ") for part in seen.split(", ")]
    named = ", ".join(f"{pod} ×{count}" for count, pod in shares)
    assert found.seen == ("answered" if number == 1 else f"{number} answered") + f"; from {named}"
    assert found.counts == {pod.replace("no pod named", ""): int(count) for count, pod in shares if count != "0"}


def test_answers_that_are_missing_fail_a_claim_about_who_answers() -> None:
    """Silence is not an answer of the right pod."""
    found = verdict(expectation(2, answered_by=answered_by(Share.ANY)), [*answer(A), *SILENCE], (A,))
    assert found == Verdict(
        passed=False,
        wanted="2 answers, from a pod of dev/app=web (1 ready)",
        seen="1 answered; 1 timed out (no answer within 1 s); from dev/web-a ×1",
        counts={A: 1},
    )
    silence = verdict(expectation(answered_by=answered_by(Share.SAME)), SILENCE, (A,))
    assert (silence.passed, silence.seen, silence.counts) == (False, "timed out (no answer within 1 s)", {})


RANDOM = "spread evenly at random (chi-square p > 1e-06)"
EXACT = "spread exactly evenly"


@pytest.mark.parametrize(
    ("spread", "mode", "counts", "passed", "claim", "told"),
    [
        # p by hand: three pods are two degrees of freedom, where Q = exp(-chi²/2)
        (Spread.EVEN, "iptables", (100, 100, 100), True, RANDOM, "; chi-square p = 1"),
        (Spread.EVEN, "nftables", (110, 95, 95), True, RANDOM, "; chi-square p = 0.47"),  # chi² = 1.5
        (Spread.EVEN, "iptables", (150, 90, 60), False, RANDOM, "; chi-square p = 7.6e-10"),  # chi² = 42
        (Spread.EVEN, "iptables", (150, 150, 0), False, RANDOM, "; chi-square p = 2.7e-33"),  # chi² = 150
        (Spread.EVEN, "ipvs", (101, 100, 100), True, EXACT, ""),
        (Spread.EVEN, "ipvs", (102, 100, 100), False, EXACT, ""),
        (Spread.EVEN, "userspace", (2, 1, 1), True, EXACT, ""),
        (Spread.EXACT, "ipvs", (7, 7, 6), True, EXACT, ""),
        (Spread.EXACT, "ipvs", (8, 6, 6), False, EXACT, ""),
        (Spread.EXACT, "userspace", (7, 7, 7), True, EXACT, ""),
    ],
)  # fmt: skip
def test_how_evenly(
    spread: Spread, mode: str, counts: tuple[int, int, int], passed: bool, claim: str, told: str
) -> None:
    """Modes that take turns differ by one at most; modes that pick at random are believed above p = 1e-6."""
    pods = (A, B, C)
    observations = [seen for pod, count in zip(pods, counts, strict=True) for seen in answer(pod, times=count)]
    total = sum(counts)
    found = verdict(
        expectation(total, answered_by=answered_by(Share.EACH, spread)), observations, pods, mode=mode
    )  # fmt: skip
    assert found.passed is passed
    assert found.wanted == f"{total} answers, from each pod of dev/app=web (3 ready), {claim}"
    named = ", ".join(f"{pod} ×{count}" for pod, count in zip(pods, counts, strict=True))
    assert found.seen == f"{total} answered; from {named}{told}"


def test_a_spread_over_nothing_fails() -> None:
    """No pod is ready: nothing is spread."""
    for mode in ("iptables", "ipvs"):
        step = expectation(2, answered_by=answered_by(Share.EACH, Spread.EVEN))
        assert not verdict(step, answer(A, times=2), (), mode=mode).passed


@pytest.mark.parametrize(
    ("addresses", "passed", "seen"),
    [
        (["10.244.1.5"], True, "answered; client seen as 10.244.1.5"),
        (["192.168.93.11"], False, "answered; client seen as 192.168.93.11"),
        (["10.244.1.5", "192.168.93.11"], False, "2 answered; client seen as 10.244.1.5, 192.168.93.11"),
        ([""], False, "answered; client seen as no address"),
    ],
)
def test_which_client_the_server_sees(addresses: list[str], passed: bool, seen: str) -> None:
    """Every answer has to tell the wanted address: one that was masqueraded is one too many."""
    step = expectation(len(addresses), sees_client="client")
    observations = [one for address in addresses for one in answer(seen_client=address)]
    found = verdict(step, observations, client="10.244.1.5")
    assert (found.passed, found.seen) == (passed, seen)
    assert found.wanted.endswith("client address 10.244.1.5 seen by the server")


@pytest.mark.parametrize(
    ("takes", "durations_ms", "passed", "wanted", "seen"),
    [
        (Takes(at_least_s=0.08), [80.0], True, "an answer, in at least 80 ms", "answered; in 80.0 ms"),
        (Takes(at_least_s=0.08), [79.9], False, "an answer, in at least 80 ms", "answered; in 79.9 ms"),
        (Takes(at_most_s=0.1), [100.0], True, "an answer, in at most 100 ms", "answered; in 100.0 ms"),
        (Takes(at_most_s=0.1), [5.0, 100.1], False, "2 answers, each in at most 100 ms", "2 answered; in 5.0 ms to 100.1 ms"),
        (Takes(at_least_s=0.08, at_most_s=0.2), [90.0, 70.0], False, "2 answers, each in at least 80 ms and at most 200 ms",
         "2 answered; in 70.0 ms to 90.0 ms"),
    ],
)  # fmt: skip
def test_how_long_answers_take(
    takes: Takes, durations_ms: list[float], passed: bool, wanted: str, seen: str
) -> None:  # fmt: skip
    """Every answer keeps the bounds; the fastest and the slowest are told."""
    observations = [one for duration_ms in durations_ms for one in answer(duration_ms=duration_ms)]
    found = verdict(expectation(len(durations_ms), takes=takes), observations)
    assert (found.passed, found.wanted, found.seen) == (passed, wanted, seen)


def test_all_claims_are_told_together() -> None:
    """One failing claim fails the step; what was wanted and seen names them all, in one order."""
    step = expectation(2, status=200, body="ok", answered_by=answered_by(Share.ANY), sees_client="client")
    found = verdict(step, answer(STRANGER, body="ok", seen_client="10.0.0.1", times=2), (A,), client="10.0.0.1")
    assert found == Verdict(
        passed=False,
        wanted="2 answers, status 200, 'ok' in the answer, from a pod of dev/app=web (1 ready), "
        "client address 10.0.0.1 seen by the server",
        seen="2 answered; status 200 ×2; answer 'ok'; from dev/other ×2; client seen as 10.0.0.1",
        counts={STRANGER: 2},
    )


@pytest.mark.parametrize(
    ("step", "enough"),
    [
        (expectation(request=TCP), True),
        (expectation(request=TCP, refused=True), True),
        (expectation(request=TCP, timeout=True), True),
        (expectation(request=TCP, body="x"), False),
        (expectation(request=TCP, answered_by=answered_by(Share.ANY)), False),
        (expectation(request=TCP, sees_client="client"), False),
        (expectation(request=TCP, takes=Takes(at_least_s=0.1)), True),
        (expectation(request=Request(scheme=Scheme.TCP, host="a", port=1, send="")), False),
        (expectation(), False),
        (expectation(request=Request(scheme=Scheme.UDP, host="a", port=1)), False),
    ],
)
def test_when_a_connection_is_enough(step: ExpectStep, enough: bool) -> None:
    """TCP, nothing to send, nothing claimed about an answer: many servers would never give one."""
    assert is_connection_only(step) is enough
