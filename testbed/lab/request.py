"""What a lab is started with, and how it tells whoever started it how far it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from testbed.model.topology import Topology


@dataclass(frozen=True, slots=True)
class LabRequest:
    """What a lab is started with. Descriptors are inherited; ``lifeline_fd`` ends the lab when its writer is gone (-1: none)."""

    name: str
    folder: str
    topology: Topology
    proxy_mode: str
    iptables_backend: str
    listener_fd: int
    progress_fd: int
    lifeline_fd: int


def report(fd: int, **values: object) -> None:
    """Send one line to whoever started the lab; nobody may be listening any more."""
    try:
        os.write(fd, json.dumps(values).encode() + b"\n")
    except OSError:
        return
