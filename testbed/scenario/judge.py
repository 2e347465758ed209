"""Whether what was observed is what was expected. Pure: observations in, a verdict out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from testbed.model.scenario import RANDOM_MODES, AnsweredBy, ExpectStep, Scheme, Share, Spread, Takes
from testbed.probes.observation import Observation, Outcome
from testbed.scenario.statistics import chi_square_p

P_BOUND = 1e-6
"""Below this an even random choice is not believed: one in a million runs fails by bad luck alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``wanted`` and ``seen`` are for people; ``counts`` says how often each pod answered."""

    passed: bool
    wanted: str
    seen: str
    counts: dict[str, int] = field(default_factory=dict)


def judge(
    step: ExpectStep, observations: Sequence[Observation], *, pods: Sequence[str], mode: str, client: str = ""
) -> Verdict:  # fmt: skip
    """Return the verdict on one round of requests.

    Args:
        pods: the ready pods that ``answeredBy`` selects, as NAMESPACE/NAME.
        client: the address that ``sees.client`` stands for.
    """
    claims: list[tuple[str, bool]] = []

    def expect(text: str, holds: bool) -> None:
        claims.append((text, holds))

    outcomes = Counter(observation.outcome for observation in observations)
    if step.refused:
        expect("refused", set(outcomes) == {Outcome.REFUSED})
    elif step.timeout:
        expect("no answer in time", set(outcomes) == {Outcome.TIMED_OUT})
    else:
        one, many = ("a connection", "connections") if is_connection_only(step) else ("an answer", "answers")
        expect(one if step.times == 1 else f"{step.times} {many}", set(outcomes) == {Outcome.ANSWERED})
    answered = [observation for observation in observations if observation.outcome is Outcome.ANSWERED]
    if step.status is not None:
        expect(f"status {step.status}", all(o.status == step.status for o in answered))
    if step.body is not None:
        expect(f"{step.body!r} in the answer", all(step.body in o.body for o in answered))
    counts = Counter(observation.answered_by for observation in answered)
    if step.answered_by is not None:
        claims += _shares(step.answered_by, counts, pods, mode)
    if step.sees_client is not None:
        expect(f"client address {client} seen by the server", all(o.seen_client == client for o in answered))
    if step.takes is not None:
        expect(
            f"{'' if step.times == 1 else 'each '}in {step.takes}", all(_is_in_time(step.takes, o) for o in answered)
        )
    return Verdict(
        passed=all(holds for _, holds in claims),
        wanted=", ".join(text for text, _ in claims),
        seen=_describe(observations, counts, step, pods, mode),
        counts=dict(sorted(counts.items())),
    )


def is_connection_only(step: ExpectStep) -> bool:
    """Say whether nothing is claimed about an answer: then a TCP connection is one (docs/scenario.md, expect)."""
    says = step.request.send, step.body, step.answered_by, step.sees_client
    return step.request.scheme is Scheme.TCP and all(claim is None for claim in says)


def _is_in_time(takes: Takes, answer: Observation) -> bool:
    seconds = answer.duration_ms / 1000
    return (takes.at_least_s is None or seconds >= takes.at_least_s) and (
        takes.at_most_s is None or seconds <= takes.at_most_s
    )


def _shares(answered_by: AnsweredBy, counts: Counter[str], pods: Sequence[str], mode: str) -> list[tuple[str, bool]]:
    """Return each claim about who answers, and whether it holds."""
    selected = str(answered_by.pods)
    strangers = set(counts) - set(pods)
    listing = f"{selected} ({len(pods)} ready)"
    claims: list[tuple[str, bool]] = []
    match answered_by.share:
        case Share.ANY:
            claims.append((f"from a pod of {listing}", not strangers))
        case Share.ONE:
            claims.append((f"from the one pod of {listing}", not strangers and len(pods) == 1))
        case Share.EACH:
            claims.append((f"from each pod of {listing}", bool(pods) and set(counts) == set(pods)))
        case Share.SAME:
            claims.append((f"all from the same pod of {listing}", not strangers and len(counts) == 1))
    if answered_by.spread is not None:
        shares = [counts[pod] for pod in pods]
        if answered_by.spread is Spread.EVEN and mode in RANDOM_MODES:
            p = chi_square_p(shares)
            claims.append((f"spread evenly at random (chi-square p > {P_BOUND:g})", p > P_BOUND))
        else:
            claims.append(("spread exactly evenly", bool(shares) and max(shares) - min(shares) <= 1))
    return claims


def _describe(
    observations: Sequence[Observation], counts: Counter[str], step: ExpectStep, pods: Sequence[str], mode: str
) -> str:  # fmt: skip
    """Return what was seen: outcomes, then statuses, pods and clients as far as the step is about them."""
    parts = []
    outcomes = Counter(observation.outcome.value for observation in observations)
    for outcome, number in sorted(outcomes.items()):
        details = Counter(o.detail for o in observations if o.outcome.value == outcome and o.detail)
        reason = f" ({details.most_common(1)[0][0]})" if details else ""
        parts.append(f"{number} {outcome}{reason}" if len(observations) > 1 else f"{outcome}{reason}")
    answered = [observation for observation in observations if observation.outcome is Outcome.ANSWERED]
    if step.status is not None and answered:
        statuses = Counter(o.status for o in answered)
        parts.append("status " + ", ".join(f"{status} ×{number}" for status, number in sorted(statuses.items())))
    if step.body is not None and answered:
        telling = next((o for o in answered if step.body not in o.body), answered[0])
        parts.append(f"answer {telling.body[:200]!r}")
    if step.answered_by is not None and answered:
        silent = [(pod, 0) for pod in pods if pod not in counts] if step.answered_by.share is Share.EACH else []
        named = ", ".join(f"{pod or 'no pod named'} ×{number}" for pod, number in sorted([*counts.items(), *silent]))
        parts.append(f"from {named}")
        if step.answered_by.spread is Spread.EVEN and mode in RANDOM_MODES:
            parts.append(f"chi-square p = {chi_square_p([counts[pod] for pod in pods]):.2g}")
    if step.sees_client is not None and answered:
        clients = Counter(o.seen_client or "no address" for o in answered)
        parts.append("client seen as " + ", ".join(sorted(clients)))
    if step.takes is not None and answered:
        fastest, slowest = min(o.duration_ms for o in answered), max(o.duration_ms for o in answered)
        parts.append(f"in {fastest:.1f} ms" + (f" to {slowest:.1f} ms" if len(answered) > 1 else ""))
    return "; ".join(parts)
