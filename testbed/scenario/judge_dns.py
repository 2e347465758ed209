"""Whether what DNS said is what was expected. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.model.scenario import ResolveStep
from testbed.probes.dns import Resolution
from testbed.scenario.judge import Verdict


def judge_resolution(step: ResolveStep, resolution: Resolution, addresses: Sequence[str]) -> Verdict:
    """Return the verdict on one question.

    Args:
        addresses: of the ready pods that ``answers`` selects.
    """
    kind = step.record_type
    seen = [value for _, _, found, value in resolution.records if found == kind]
    claims = [(step.rcode, resolution.rcode == step.rcode)]
    if step.answers is not None:
        wanted = [answer for answer in step.answers if isinstance(answer, str)] + list(addresses)
        shown = ", ".join(sorted(wanted)) or f"no {kind} record"
        claims.append((shown, _same(kind, wanted, seen)))
    elif step.rcode == "NOERROR":
        claims.append((f"a {kind} record", bool(seen)))
    got = ", ".join(sorted(seen)) or f"no {kind} record"
    others = sorted({f"{found} {value}" for _, _, found, value in resolution.records if found != kind})
    beside = f" (and {', '.join(others)})" if others else ""
    return Verdict(
        passed=all(holds for _, holds in claims),
        wanted=": ".join(text for text, _ in claims),
        seen=f"{resolution.rcode}: {got}{beside}" if resolution.rcode else f"no answer: {resolution.detail}",
    )


def _same(kind: str, wanted: Sequence[str], seen: Sequence[str]) -> bool:
    """Say whether the values are the same, each as often. One of SRV that was written short leaves out what it leaves out."""
    left = [_plain(value) for value in seen]
    for value in sorted(map(_plain, wanted), key=lambda text: -len(text.split())):  # the ones that say most come first
        is_short = kind == "SRV" and len(value.split()) == 2
        fitting = next((other for other in left if (other.split(" ", 2)[-1] if is_short else other) == value), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return not left


def _plain(value: str) -> str:
    text = " ".join(value.split())
    return text if text.startswith('"') else text.lower().removesuffix(".")
