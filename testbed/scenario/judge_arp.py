"""Whether the machines that answer for an address are those that were expected. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from testbed.model.scenario import ArpStep
from testbed.probes.arp import ArpAnswer
from testbed.scenario.judge import Verdict


def judge_arp(step: ArpStep, answers: Sequence[ArpAnswer], names: Mapping[str, str]) -> Verdict:
    """Return the verdict on one question.

    Args:
        names: MAC -> machine. Somebody else is shown by his MAC, and is never expected.
    """
    macs = sorted({answer.mac for answer in answers}, key=lambda mac: names.get(mac, mac))
    seen = [names.get(mac, mac) for mac in macs]
    shown = ", ".join(f"{names[mac]} ({mac})" if mac in names else mac for mac in macs) or "nobody"
    if step.answered_by is None:
        return Verdict(passed=bool(seen), wanted=f"an answer for {step.address}", seen=f"answered by {shown}")
    wanted = sorted(set(step.answered_by))
    return Verdict(
        passed=sorted(set(seen)) == wanted,
        wanted=f"{step.address} answered by {', '.join(wanted) or 'nobody'}",
        seen=f"answered by {shown}",
    )
