"""``testbed doctor``: what is wrong with a running lab, for people and for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import click

from testbed.dataplane.doctor import ClusterSeen, Finding
from testbed.dataplane.doctor.services import service_name
from testbed.errors import InputError
from testbed.lab.doctor import examine
from testbed.lab.handle import Lab
from testbed.manifests.text import suggestion
from testbed.scenario.report import printable

FOUND = 1


def run_doctor(lab: Lab, service: str | None, output: str) -> int:
    """Examine a lab and print the findings; return 0 when there are none, 1 when there are.

    Raises:
        InputError: ``service`` is not of the form svc/NAMESPACE/NAME.
    """
    wanted = parse_service_argument(service) if service else ""
    began = time.monotonic()
    found, seen = examine(lab)
    took_s = time.monotonic() - began
    if wanted:
        known = [service_name(one) for one in seen.list("services")]
        if wanted not in known:
            raise InputError(f"there is no Service {wanted!r} in lab {lab.name}{suggestion(wanted, known)}")
        found = concerning(found, wanted)
    if output == "json":
        rows = [{**asdict(finding), "about": list(finding.about)} for finding in found]
        click.echo(json.dumps({"lab": lab.name, "healthy": not found, "findings": rows}, indent=2))
    else:
        click.echo(text_report(lab.name, wanted, found, seen, took_s, colours=sys.stdout.isatty()))
    return FOUND if found else 0


def parse_service_argument(text: str) -> str:
    """Return NAMESPACE/NAME.

    Raises:
        InputError: it is something else.
    """
    kind, _, rest = text.partition("/")
    if kind not in ("svc", "service", "services") or rest.count("/") != 1 or not all(rest.split("/")):
        raise InputError(f"{text!r} is not svc/NAMESPACE/NAME, like svc/kube-system/kube-dns")
    return rest


def concerning(found: Sequence[Finding], service: str) -> tuple[Finding, ...]:
    """Return what concerns a Service: what is about it, and what is about none in particular."""
    return tuple(finding for finding in found if not finding.about or service in finding.about)


def text_report(
    lab: str, service: str, found: Sequence[Finding], seen: ClusterSeen, took_s: float, *, colours: bool = False
) -> str:
    """Return the findings for people."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colours else text

    subject = f"svc {service} in lab {lab}" if service else f"lab {lab}"
    counts = [
        (len(seen.topology.nodes), "node"),
        (len(seen.list("services")), "Service"),
        (len(seen.list("pods")), "pod"),
    ]
    looked_at = ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)
    if not found:
        return f"{subject}: {paint('all is well', '32')} ({looked_at}; {took_s:.1f} s)"
    lines = [f"{subject}: {len(found)} fault{'' if len(found) == 1 else 's'} ({looked_at}; {took_s:.1f} s)"]
    for finding in found:
        lines += [
            "",
            f"  {paint('✗', '31')} {paint(finding.cause, '1')}  {finding.where}",
            f"      {paint('seen', '2')}  {printable(finding.what)}",
            f"      {paint('do', '2')}    {printable(finding.do)}",
        ]
    return "\n".join(lines)
