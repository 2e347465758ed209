"""What came of one request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a request ended; the values are the words that reports use."""

    ANSWERED = "answered"
    REFUSED = "refused"  # TCP reset to the first packet, or ICMP port unreachable
    TIMED_OUT = "timed out"
    UNREACHABLE = "unreachable"  # ICMP host or net unreachable, or no route
    RESET = "reset"  # the connection was there and broke
    NAME_NOT_FOUND = "name not found"
    FAILED = "failed"  # anything else: the asking machine could not send it, or what came back was not HTTP


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One request's end. ``answered_by`` is NAMESPACE/POD, '' when the answer does not say; ``seen_client`` likewise."""

    outcome: Outcome
    answered_by: str = ""
    seen_client: str = ""  # the client's address as the server saw it (echo server)
    status: int = 0  # HTTP
    body: str = ""  # at most 64 KiB
    duration_ms: float = 0.0
    detail: str = ""  # the system's words when it was not answered
