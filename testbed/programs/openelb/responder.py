"""Answers ARP on one link: a packet socket bound to ARP's ethertype, and a thread that does nothing else.

Only the set of announced addresses changes, and that as a whole: the thread sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address
from typing import Final

from testbed.dataplane.arp import AddressFrames, Fate, judge_frame
from testbed.programs.proxy_status import ProxyMetrics

ETH_P_ARP: Final = 0x0806
_MOST_BYTES: Final = 2048
_RECEIVE_BUFFER_BYTES: Final = 4 << 20
_AFTER_ERROR_S: Final = 0.05
_LOOK_EVERY_S: Final = 1  # whether it is closed, when no frame comes


class ArpResponder:
    """The announced addresses of one link.

    Args:
        interface: name of the link.
        metrics: counts under upstream's names, and what is ignored.
        on_foreign: called on the responder's thread with an address and the MAC of somebody else who has it.

    Raises:
        OSError: there is no such link, or no permission.
    """

    def __init__(
        self, interface: str, metrics: ProxyMetrics, on_foreign: Callable[[IPv4Address, str], None]
    ) -> None:  # fmt: skip
        self.interface = interface
        self._metrics = metrics
        self._on_foreign = on_foreign
        self._table: Mapping[bytes, AddressFrames] = {}
        self._is_closed = False
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ARP))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            # The kernel's own time limit: Python's would cost a poll() for each frame.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _LOOK_EVERY_S, 0))
            self._socket.bind((interface, ETH_P_ARP))
            self._mac: bytes = self._socket.getsockname()[4]
        except BaseException:
            self._socket.close()
            raise

    @property
    def mac(self) -> str:
        return self._mac.hex(":")

    @property
    def announced(self) -> frozenset[IPv4Address]:
        return frozenset(IPv4Address(address) for address in self._table)

    def start(self) -> None:
        """Answer from a thread of its own until `close`."""
        threading.Thread(target=self._run, name=f"arp-{self.interface}", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._is_closed = True  # the thread closes the socket
        self._table = {}

    def announce(self, address: IPv4Address, frames: AddressFrames) -> None:
        """Answer for an address from now on, and tell everybody on the link once."""
        text = str(address)
        for name in ("requests_received", "responses_sent", "gratuitous_sent"):
            self._metrics.count(name, 0, ip=text)
        self._table = {**self._table, address.packed: frames}
        self.tell_everybody(address)

    def tell_everybody(self, address: IPv4Address) -> None:
        """Send the gratuitous pair of an announced address."""
        frames = self._table.get(address.packed)
        if frames is None:
            return
        for frame in frames.gratuitous:
            self._send(frame)
        self._metrics.count("gratuitous_sent", ip=str(address))

    def withdraw(self, address: IPv4Address) -> None:
        """Answer no longer for an address."""
        self._table = {known: frames for known, frames in self._table.items() if known != address.packed}
        for name in ("requests_received", "responses_sent", "gratuitous_sent"):
            self._metrics.drop(name, ip=str(address))

    def probe(self, address: IPv4Address) -> None:
        """Ask who else has an announced address; whoever answers is told to ``on_foreign``."""
        frames = self._table.get(address.packed)
        if frames is not None:
            self._send(frames.probe)

    def _send(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # the link is down: nobody is there to hear it
            self._socket.send(frame)

    def _run(self) -> None:
        while not self._is_closed:
            try:
                frame, (_, _, kind, *_) = self._socket.recvfrom(_MOST_BYTES)
            except BlockingIOError:
                continue
            except OSError:  # ENETDOWN, once, when the link goes down; the socket goes on when it is up again
                time.sleep(_AFTER_ERROR_S)
                continue
            if kind not in (socket.PACKET_OUTGOING, socket.PACKET_OTHERHOST) and frame:
                self.take(frame)
        self._socket.close()

    def take(self, frame: bytes) -> None:
        """Do what one frame calls for."""
        judgement = judge_frame(frame, self._table, self._mac)
        if judgement.fate is Fate.ANSWERED:
            self._send(judgement.reply)
            text = str(IPv4Address(judgement.address))
            self._metrics.count("requests_received", ip=text)
            self._metrics.count("responses_sent", ip=text)
        elif judgement.fate is Fate.FOREIGN:
            self._metrics.count("arp_frames_ignored", reason=judgement.fate.value)
            self._on_foreign(IPv4Address(judgement.address), judgement.sender.hex(":"))
        elif judgement.fate is not Fate.OTHER_ADDRESS:
            self._metrics.count("arp_frames_ignored", reason=judgement.fate.value)
