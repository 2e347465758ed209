"""SPDY/3.1 framing, against the draft and against itself."""

from __future__ import annotations

import contextlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.api.spdy import DICTIONARY, Decoder, Encoder, Frame, Kind, SpdyError


def test_the_dictionary() -> None:
    """It is the one of SPDY/3: every implementation's compressed headers begin with its checksum."""
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert Encoder().syn_reply(1)[12:18] == b"\x78\xbb\xe3\xc6\xa7\xc2"


@given(st.lists(st.integers(1, 40)), st.binary(max_size=200))
def test_frames_survive_any_cut(cuts: list[int], data: bytes) -> None:
    """However the bytes are cut into messages, the frames are the same; headers share one compression."""
    encoder = Encoder()
    sent = b"".join(
        (
            encoder.syn_stream(1, {"streamType": "error", "port": "80", "requestID": "0"}),
            encoder.syn_stream(3, {"streamType": "data", "port": "80", "requestID": "0"}),
            encoder.data(3, data),
            encoder.ping(5),
            encoder.data(3, b"", is_last=True),
            encoder.reset(1, 1),
        )
    )
    decoder, frames, at = Decoder(), [], 0
    for cut in [*cuts, len(sent)]:
        frames += decoder.receive(sent[at : at + cut])
        at += cut
    headers = (("port", "80"), ("requestid", "0"))
    assert [(frame.kind, frame.stream, frame.is_last, frame.data) for frame in frames] == [
        (Kind.SYN_STREAM, 1, False, b""),
        (Kind.SYN_STREAM, 3, False, b""),
        (Kind.DATA, 3, False, data),
        (Kind.PING, 5, False, b""),
        (Kind.DATA, 3, True, b""),
        (Kind.RST_STREAM, 1, False, b""),
    ]
    assert frames[1].headers == (("streamtype", "data"), *headers)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01", id="another version"),
        pytest.param(b"\x80\x03\x00\x02\x00\x00\x00\x08\x00\x00\x00\x01abcd", id="headers that are not compressed"),
    ],
)
def test_what_is_not_spdy(data: bytes) -> None:
    """It is refused, and nothing else happens."""
    with pytest.raises(SpdyError):
        list(Decoder().receive(data))


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """Whatever arrives, there are frames or a refusal."""
    with contextlib.suppress(SpdyError):
        assert all(isinstance(frame, Frame) for frame in Decoder().receive(data))
