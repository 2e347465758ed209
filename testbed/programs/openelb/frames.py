"""ARP frames of announced addresses, built by scapy: four for each address, once.

scapy takes 0.6 s to import and 60 MiB that no speaker should hold for ever; so a process of its own builds the frames of
many addresses at a time (``python -m testbed.programs.openelb.frames``: JSON in, JSON out) and ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address

from testbed.dataplane.arp import AddressFrames
from testbed.errors import KernelError

_BUILD_WITHIN_S = 60.0


def build_frames(mac: str, addresses: Iterable[IPv4Address]) -> dict[bytes, AddressFrames]:
    """Return the frames for these addresses on a link with this MAC, by the address's four bytes."""
    from scapy.layers.l2 import ARP, Ether

    broadcast, unknown = "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"

    def frame(to: str, op: int, sender: str, target_mac: str, target: str) -> bytes:
        header = Ether(dst=to, src=mac, type=0x0806)
        return bytes(header / ARP(op=op, hwsrc=mac, psrc=sender, hwdst=target_mac, pdst=target))

    built = {}
    for address in addresses:
        text = str(address)
        built[address.packed] = AddressFrames(
            reply=frame(unknown, 2, text, unknown, "0.0.0.0"),
            # Upstream's pair: both with the broadcast address as the target's MAC.
            gratuitous=(frame(broadcast, 1, text, broadcast, text), frame(broadcast, 2, text, broadcast, text)),
            probe=frame(broadcast, 1, "0.0.0.0", unknown, text),
        )
    return built


def request_frames(mac: str, addresses: Sequence[IPv4Address]) -> dict[bytes, AddressFrames]:
    """Return what `build_frames` does, built by another process.

    Raises:
        KernelError: it could not.
    """
    question = json.dumps({"mac": mac, "addresses": [str(address) for address in addresses]})
    argv = [sys.executable, "-m", "testbed.programs.openelb.frames"]
    try:
        done = subprocess.run(
            argv, input=question, capture_output=True, text=True, timeout=_BUILD_WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"could not build ARP frames: {error}") from error
    if done.returncode != 0:
        raise KernelError(f"could not build ARP frames: {done.stderr.strip()[-300:]}")
    return {
        bytes.fromhex(address): AddressFrames(
            reply=bytes.fromhex(reply),
            gratuitous=(bytes.fromhex(request), bytes.fromhex(answer)),
            probe=bytes.fromhex(probe),
        )
        for address, (reply, request, answer, probe) in json.loads(done.stdout).items()
    }


def main() -> None:
    """Answer one question on standard input."""
    question = json.load(sys.stdin)
    built = build_frames(question["mac"], map(IPv4Address, question["addresses"]))
    json.dump(
        {
            address.hex(): [part.hex() for part in (frames.reply, *frames.gratuitous, frames.probe)]
            for address, frames in built.items()
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
