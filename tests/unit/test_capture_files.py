"""Captures on their way into a file: pcap streams merged in the order of time, and pcapng blocks that a strict reader takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from capture_support import pcap_stream, read_pcapng, record, tcp
from hypothesis import given
from hypothesis import strategies as st

from testbed.capture.journeys import INBOUND, OUTBOUND
from testbed.capture.merge import SETTLE_NS, Merger, Record
from testbed.capture.pcapng import enhanced_packet, interface_statistics, packet_options
from testbed.capture.points import Point
from testbed.capture.sinks import BlockOutput, file_head
from testbed.errors import InputError, KernelError

START = 1_700_000_000_000_000_000
FRAME = tcp("10.0.0.1:1", "10.0.0.2:80", 2)
POINTS = [
    Point(
        place="node2", interface="eth33", mac=b"\2\3\4\5\6\7", about="node node2, 192.168.93.12", filter="tcp port 80"
    ),
    Point(place="dev/web-1", interface="eth0"),
]


def head() -> list[bytes]:
    return file_head(POINTS, 262144, "testbed capture node2 dev/web-1")


# ── merging ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_packets_of_two_points_come_in_the_order_of_time():
    """What one point had earlier is let go before what another had later, whoever told first."""
    merger = Merger(2)
    merger.feed(0, pcap_stream((START + 1000, FRAME), (START + 5000, FRAME)))
    merger.feed(1, pcap_stream((START + 3000, FRAME)))
    merger.end(0)
    merger.end(1)
    assert [(r.time_ns - START, r.point) for r in merger.ready()] == [(1000, 0), (3000, 1), (5000, 0)]


def test_a_packet_waits_for_points_that_may_still_come_with_an_earlier_one():
    """Nothing is let go while another point has neither shown a later packet nor been quiet for long enough."""
    merger = Merger(2)
    merger.feed(0, pcap_stream((START, FRAME)))
    assert merger.ready() == ()
    merger.is_quiet(0, START + SETTLE_NS)
    merger.is_quiet(1, START + SETTLE_NS - 1)
    assert merger.ready() == ()
    merger.is_quiet(1, START + SETTLE_NS)
    assert len(merger.ready()) == 1
    assert merger.waiting == 0


def test_packets_that_come_too_late_are_counted_and_kept():
    """A packet behind one that was let go is not lost; it is said that the order is broken."""
    merger = Merger(2)
    merger.feed(0, pcap_stream((START + 1000, FRAME)))
    merger.is_quiet(0, START + 2 * SETTLE_NS)
    merger.is_quiet(1, START + 2 * SETTLE_NS)
    assert len(merger.ready()) == 1
    merger.feed(1, pcap_stream((START, FRAME)))
    merger.end(0)
    merger.end(1)
    assert [r.time_ns for r in merger.ready()] == [START]
    assert merger.late == 1


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 97))
def test_a_stream_may_be_cut_anywhere(gaps: list[int], size: int):
    """However a pipe hands a stream over, every packet comes out once, whole."""
    times = [START + sum(gaps[: n + 1]) for n in range(len(gaps))]
    stream = pcap_stream(*((time, FRAME + bytes(n)) for n, time in enumerate(times)))
    merger = Merger(1)
    for at in range(0, len(stream), size):
        merger.feed(0, stream[at : at + size])
    merger.end(0)
    assert [(r.time_ns, r.data) for r in merger.ready()] == [(time, FRAME + bytes(n)) for n, time in enumerate(times)]


def test_a_stream_without_nanoseconds_is_refused():
    """A tcpdump that does not understand --time-stamp-precision must not give times a thousand times too small."""
    with pytest.raises(KernelError, match="no pcap stream with nanoseconds \\(it begins with 0xa1b2c3d4\\)"):
        Merger(1).feed(0, pcap_stream((START, FRAME), magic=0xA1B2C3D4))


# ── pcapng ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_says_which_point_each_packet_is_from():
    """Interface blocks carry the points' names, filters and nanoseconds; packets their direction and comments."""
    blocks = [
        *head(),
        enhanced_packet(Record(START + 7, 1, 1500, FRAME), packet_options(OUTBOUND, ["connection 1: a → b"])),
        enhanced_packet(Record(START + 8, 0, len(FRAME) + 3, FRAME + b"abc"), packet_options(0)),
        interface_statistics(0, start_ns=START, end_ns=START + 9, received=3, dropped=2, delivered=1),
    ]
    found = read_pcapng(b"".join(blocks))
    assert found.comment == "testbed capture node2 dev/web-1"
    assert [interface.name for interface in found.interfaces] == ["node2:eth33", "dev/web-1:eth0"]
    assert found.interfaces[0].options[11] == [b"\0tcp port 80"] and found.interfaces[0].options[6] == [b"\2\3\4\5\6\7"]
    first, second = found.packets
    assert (first.interface, first.time_ns, first.length, first.data) == (1, START + 7, 1500, FRAME)
    assert (first.comments, first.direction) == (("connection 1: a → b",), 2)
    assert (second.interface, second.data, second.comments, second.direction) == (0, FRAME + b"abc", (), 0)
    assert found.statistics[0] == {4: 3, 5: 2, 7: 2, 8: 1}


@given(st.binary(min_size=0, max_size=70), st.text(max_size=40), st.sampled_from([0, INBOUND, OUTBOUND]))
def test_every_block_is_padded(data: bytes, comment: str, direction: int):
    """Packets and comments of any length make blocks that a strict reader takes."""
    block = enhanced_packet(Record(START, 0, len(data), data), packet_options(direction, [comment] if comment else []))
    packet = read_pcapng(b"".join([*head(), block])).packets[0]
    assert (packet.data, packet.comments, packet.direction) == (data, (comment,) if comment else (), direction)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_leaves_a_file_that_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What of a block is on the disk when it is full is taken back; the error says how far the file goes."""
    room = 700
    real_write = os.write

    def write(fd: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written = real_write(fd, bytes(data)[:room])
        room -= written
        return written

    file = tmp_path / "c.pcapng"
    output = BlockOutput(str(file))
    monkeypatch.setattr(os, "write", write)
    output.write(head())
    with pytest.raises(
        KernelError, match=r"c\.pcapng: No space left on device after 7 blocks; the file is valid up to"
    ):
        output.write([enhanced_packet(record(n, 0, FRAME), b"") for n in range(20)])
    output.close()
    assert len(read_pcapng(file.read_bytes()).packets) == 4


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/nowhere/c.pcapng", "No such file or directory"), ("/proc/c.pcapng", "No such file or directory|Permission")],
)
def test_a_file_that_cannot_be_written_is_an_error(path: str, reason: str):
    """The error names the file and the reason."""
    with pytest.raises(InputError, match=f"cannot write the capture into '{path}': ({reason})"):
        BlockOutput(path)
