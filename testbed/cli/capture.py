"""``testbed capture``: from words to a capture, and what is said about it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from testbed.capture.cluster import LabCluster, Names
from testbed.capture.journeys import Connection, Tracker
from testbed.capture.merge import SETTLE_FOR_FILES_NS, SETTLE_NS
from testbed.capture.points import Point, resolve_points
from testbed.capture.processes import check_filters, check_tcpdump
from testbed.capture.session import CaptureOptions, CaptureSession
from testbed.capture.sinks import BlockOutput, LinesSink, PcapngSink, RecorderSink, Sink, file_head, open_file
from testbed.capture.story import Storyteller, rfc3339
from testbed.errors import InputError
from testbed.kernel.pace import patient
from testbed.lab.handle import Lab
from testbed.manifests.scalars import parse_duration

_SIZE = re.compile(r"([0-9]+)(KiB|MiB|GiB)?")
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_BUFFERS_BYTES = 256 << 20  # of all points together, unless --buffer says otherwise
_BUFFER_BYTES = 16 << 20  # of one, when there are few: about 80,000 small packets
_LEAST_BUFFER_BYTES = 2 << 20  # libpcap's own
MOST_TOLD = 10_000  # connections in one document


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """The options of the command line, as typed."""

    lab: str | None
    points: tuple[str, ...]
    write: str | None
    filter: str
    duration: str | None
    count: int | None
    follow: bool
    output: str
    snap_bytes: int
    buffer: str | None
    keep: str | None
    comments: bool
    forget_fd: int | None = None


def capture(request: CaptureRequest) -> int:
    """Capture until it is over, and say what came of it."""
    duration_s = _duration(request.duration)
    keep_bytes = _size("--keep", request.keep) if request.keep else 0
    buffer_bytes = _size("--buffer", request.buffer) if request.buffer else 0
    if request.keep and not request.write:
        raise InputError("--keep says how much of the file is kept: name the file with -w FILE")
    if request.output != "text" and request.write == "-":
        raise InputError(f"-w - and -o {request.output} both write to standard output: name a file with -w FILE")
    check_tcpdump()
    with Lab.find(request.lab) as lab:
        cluster = LabCluster(lab)
        try:
            points = resolve_points(request.points, cluster.world, filter_text=request.filter)
            if request.filter:
                check_filters([request.filter])
            check_filters(point.filter for point in points if point.filter)
            output = open_file(request.write) if request.write else None
            return _Capture(request, cluster, points, output, keep_bytes).run(
                CaptureOptions(
                    snap_bytes=request.snap_bytes,
                    buffer_kib=(buffer_bytes or _share(len(points))) >> 10,
                    settle_ns=round(patient(SETTLE_FOR_FILES_NS if request.write not in (None, "-") else SETTLE_NS)),
                    duration_s=duration_s,
                    count=request.count,
                    forget_fd=request.forget_fd,
                )
            )
        finally:
            cluster.close()


def _share(points: int) -> int:
    return max(_LEAST_BUFFER_BYTES, min(_BUFFER_BYTES, _BUFFERS_BYTES // points))


class _Capture:
    """One run of the command."""

    def __init__(
        self, request: CaptureRequest, cluster: LabCluster, points: Sequence[Point], output: BlockOutput | None,
        keep_bytes: int,
    ) -> None:  # fmt: skip
        self._request = request
        self._cluster = cluster
        self._points = points
        self._output = output
        self._keep_bytes = keep_bytes
        self._names = Names(cluster)
        self._storyteller = Storyteller(points, self._names.directory)
        self._told: list[dict[str, Any] | str] = []
        self._untold = 0
        self._recorder: RecorderSink | None = None
        self._follows = request.follow or request.output != "text"

    def run(self, options: CaptureOptions) -> int:
        session = CaptureSession(
            self._cluster, self._points, options,
            tracker=Tracker() if self._request.comments or self._follows else None, names=self._names, say=_say,
            on_connection=self._tell if self._follows else lambda _: None, on_new_connection=self._learn_names,
        )  # fmt: skip
        try:
            session.run(lambda: self._sinks(options))
        finally:
            if session.start_ns:
                self._summary(session)
        if self._request.output == "json":
            click.echo(json.dumps(self._document(session), indent=2, ensure_ascii=False))
        return 0

    def _learn_names(self) -> None:
        self._storyteller.directory = self._names.directory

    def _sinks(self, options: CaptureOptions) -> list[Sink]:
        sinks: list[Sink] = []
        if self._output is not None:
            comment = shlex.join(["testbed", "capture", "-l", self._cluster.lab.name, *self._request.points])
            head = file_head(self._points, options.snap_bytes, comment)
            file = PcapngSink(self._output, head, self._storyteller)
            if self._keep_bytes:
                self._recorder = RecorderSink(file, self._keep_bytes)
            sinks.append(self._recorder or file)
        elif not self._follows:
            sinks.append(LinesSink(self._points, colours=sys.stdout.isatty(), print_line=_print_line))
        names = ", ".join(point.name for point in self._points)
        _say(f"listening at {len(self._points)} {_plural(len(self._points), 'point')}: {names}")
        return sinks

    # -- telling ---------------------------------------------------------------------------------------------------

    def _tell(self, connection: Connection) -> None:
        if self._request.output == "text":
            text = self._storyteller.text(connection)
            click.echo(text + "\n", err=self._request.write == "-")
        elif len(self._told) >= MOST_TOLD:
            self._untold += 1
        elif self._request.output == "json":
            self._told.append(self._storyteller.as_dict(connection))
        else:
            click.echo(f"```mermaid\n{self._storyteller.mermaid(connection)}\n```\n")

    def _document(self, session: CaptureSession) -> dict[str, Any]:
        return {
            "lab": self._cluster.lab.name,
            "start": rfc3339(session.start_ns),
            "end": rfc3339(session.end_ns),
            "packets": session.packets,
            "late": session.late,
            "points": [
                {
                    "name": process.point.name,
                    "about": process.point.about,
                    "filter": process.point.filter,
                    "captured": process.received - process.lost,
                    "lost": process.lost,
                    "gone": process.gone,
                }
                for process in session.processes
            ],
            "connections": self._told,
            "connections_left_out": self._untold,
        }

    def _summary(self, session: CaptureSession) -> None:
        seconds = (session.end_ns - session.start_ns) / 1e9 if session.end_ns else 0.0
        lost = {process.point.name: (process.lost, process.received) for process in session.processes if process.lost}
        total = sum(dropped for dropped, _ in lost.values())
        _say(
            f"{session.packets} {_plural(session.packets, 'packet')} at {len(self._points)} "
            f"{_plural(len(self._points), 'point')} in {seconds:.1f} s; {total or 'none'} lost"
        )
        for name, (dropped, received) in lost.items():
            _say(
                f"  {name}: {dropped} of {received} lost: more came than was read (--buffer SIZE holds more of a burst)"
            )
        if session.late:
            _say(f"  {session.late} packets came too late to be in order")
        if session.lost_events:
            _say(f"  connections may be in pieces: conntrack events were lost on {', '.join(session.lost_events)}")
        if self._recorder is not None and self._recorder.dropped:
            _say(f"  {self._recorder.dropped} older packets were not kept (--keep)")


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _duration(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(parse_duration(text))
    except ValueError as error:
        raise InputError(f"--duration: {error}") from error


def _size(option: str, text: str) -> int:
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 64 << 10 <= size <= 4 << 30:
        raise InputError(f"{option}: {text!r} is not a size from 64KiB to 4GiB, such as 8MiB")
    return size
