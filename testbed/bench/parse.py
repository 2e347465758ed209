"""What iperf3, wrk, kube-proxy and the kernel print, as numbers. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from testbed.errors import KernelError


def parse_iperf3_tcp(text: str) -> dict[str, float]:
    """Return rate (Gbit/s, as received), retransmits, and gb (gigabytes, 1e9) of ``iperf3 -J``.

    Raises:
        KernelError: iperf3 says what went wrong, or nothing that can be read.
    """
    end = _iperf3_end(text)
    received = end["sum_received"]
    return {
        "rate": received["bits_per_second"] / 1e9,
        "retransmits": float(end["sum_sent"].get("retransmits", 0)),
        "gb": received["bytes"] / 1e9,
    }


def parse_iperf3_udp(text: str) -> dict[str, float]:
    """Return received (Mbit/s), loss (%), jitter (ms) and gb of ``iperf3 -u -J``: what the server saw.

    Raises:
        KernelError: as for TCP.
    """
    total = _iperf3_end(text)["sum"]
    arrived = 1 - total["lost_percent"] / 100
    return {
        "received": total["bits_per_second"] / 1e6 * arrived,
        "loss": total["lost_percent"],
        "jitter": total["jitter_ms"],
        "gb": total["bytes"] * arrived / 1e9,
    }


def could_not_begin(text: str) -> bool:
    """Say whether iperf3's client found no free server: between two tests one closes its listener for a moment."""
    try:
        error = str(json.loads(text).get("error", ""))
    except (ValueError, AttributeError):
        return False
    return (error.startswith("unable to connect to server") and "refused" in error) or "the server is busy" in error


def _iperf3_end(text: str) -> Any:
    try:
        document = json.loads(text)
    except ValueError:
        raise KernelError(f"iperf3 printed no JSON, but {text.strip()[:200]!r}") from None
    if document.get("error"):
        raise KernelError(f"iperf3: {document['error']}")
    if not document.get("end"):
        raise KernelError("iperf3 ended without a result")
    return document["end"]


_UNITS_OF_TIME = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


def parse_wrk(text: str) -> dict[str, float]:
    """Return requests (per second), p50 and p99 (µs), errors, and count (requests that were answered) of ``wrk --latency``.

    Raises:
        KernelError: there were no answers.
    """
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", text, re.MULTILINE)
    count = re.search(r"^\s*(\d+) requests in ", text, re.MULTILINE)
    if not rate or not count or not int(count[1]):
        raise KernelError(f"wrk had no answer: {' '.join(text.split())[-300:] or 'it printed nothing'}")
    values = {"requests": float(rate[1]), "count": float(count[1]), "errors": 0.0}
    for name in ("50", "99"):
        found = re.search(rf"^\s*{name}%\s+([\d.]+)(us|ms|s|m)\s*$", text, re.MULTILINE)
        if found:
            values[f"p{name}"] = float(found[1]) * _UNITS_OF_TIME[found[2]]
    if broken := re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text):
        values["errors"] += sum(map(int, broken.groups()))
    if other := re.search(r"Non-2xx or 3xx responses: (\d+)", text):
        values["errors"] += int(other[1])
    return values


def parse_metrics(text: str) -> dict[str, float]:
    """Return the samples of a Prometheus text by name and labels, as written."""
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def parse_cpu_line(text: str) -> dict[str, int]:
    """Return busy and softirq ticks of all CPUs together since boot, and all ticks, from /proc/stat."""
    ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, waiting, irq, softirq, steal = ticks
    return {
        "busy": user + nice + system + irq + softirq,
        "softirq": softirq,
        "all": sum((user, nice, system, idle, waiting, irq, softirq, steal)),
    }


def parse_service_order(rules: str, addresses: Mapping[str, str]) -> list[str]:
    """Return the Services of ``iptables-save -t nat`` in the order in which a packet to a ClusterIP is compared with them.

    Args:
        addresses: ClusterIP -> Service. Others are passed over.
    """
    found = re.findall(r"^-A KUBE-(?:SERVICES|PORTALS-CONTAINER) .*?-d (\d+\.\d+\.\d+\.\d+)/32 ", rules, re.MULTILINE)
    return list(dict.fromkeys(addresses[address] for address in found if address in addresses))
