"""A capture: tcpdump at every point, their packets merged, tied and handed to sinks, until it is over.

One thread and one selector, for pipes, conntrack's and the links' events, signals and the end of the lab. It goes through

    starting ─ every point listens ─▶ running ─ Ctrl-C, --duration ─▶ draining ─ a block's time-out ─▶ ending ─▶ over
                                         └─ --count, a sink that fails, second Ctrl-C ──────────────────▲

Draining waits for what the kernel holds back (merge.py): tcpdump says how many packets it had received at the stop, and as
many must come. Packets that were stamped after the stop are left out.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from operator import itemgetter
from types import FrameType

from testbed.capture.cluster import LabCluster, Names
from testbed.capture.journeys import INBOUND, OUTBOUND, Connection, Sighting, Tracker
from testbed.capture.merge import SETTLE_NS, Merger, Record
from testbed.capture.points import Point
from testbed.capture.processes import PointProcess, start_tcpdump
from testbed.capture.sinks import RecorderSink, Seen, Sink
from testbed.errors import KernelError, LabError, TestbedError
from testbed.kernel.conntrack_events import ConntrackWatch
from testbed.kernel.netns import inside_network
from testbed.kernel.pace import patient
from testbed.kernel.proxy_pairs import PairWatch
from testbed.kernel.rtnetlink import LinkWatch
from testbed.model.flows import read_key

_GONE_AFTER_S = 1.3  # of a point whose link is gone: a block's time-out, and some
_DRAIN_AT_MOST_S = 30.0
_START_WITHIN_S = 20.0
_END_WITHIN_S = 5.0
_LAB_END_WITHIN_S = 1.0
_KILLED_LAB_END_WITHIN_S = 15.0
"""When every tcpdump was killed: the kernel does so with a lab, whose first process ends when the last of hundreds is gone."""
_TELL_AFTER_S = 0.3  # that a point is gone: when it is the whole lab, that will be known by then
_ROUND_S = 0.004
"""Between two looks at busy pipes: each look costs switches between processes, which the captured traffic pays for."""
_IDLE_S = 0.05
_FORGET_EVERY_S = 10.0
_READ_BYTES = 1 << 20


class _State(Enum):
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    ENDING = "ending"
    OVER = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """How to capture. ``count`` and ``duration_s`` of None: until it is stopped."""

    snap_bytes: int
    buffer_kib: int
    settle_ns: int = SETTLE_NS
    duration_s: float | None = None
    count: int | None = None
    forget_fd: int | None = None
    """A pipe with lines of nanoseconds since 1970: a recorder forgets every packet that is older."""


class CaptureSession:
    """Captures at points of a lab; `run` returns when it is over."""

    def __init__(
        self,
        cluster: LabCluster,
        points: Sequence[Point],
        options: CaptureOptions,
        *,
        tracker: Tracker | None,
        names: Names,
        say: Callable[[str], None],
        on_connection: Callable[[Connection], None] = lambda _: None,
        on_new_connection: Callable[[], None] = lambda: None,
    ) -> None:
        """``tracker`` None: packets are not tied to connections."""
        self._cluster = cluster
        self._points = points
        self._options = options
        self._tracker = tracker
        self._names = names
        self._say = say
        self._on_connection = on_connection
        self._on_new_connection = on_new_connection
        self._merger = Merger(len(points), settle_ns=options.settle_ns)
        self._selector = selectors.DefaultSelector()
        self._state = _State.STARTING
        self._deadline = 0.0  # of the present state, on the monotonic clock
        self._stop_ns: int | None = None
        self._ending: dict[int, float] = {}  # points that have gone: when their tcpdump is told
        self._gone: list[tuple[float, PointProcess]] = []  # what has ended by itself, and when that is said
        self._signals = 0
        self._half_line = b""  # of forget_fd
        self._lab_ended = False
        self._failure: Exception | None = None
        self._busy = False
        self._forget_at = time.monotonic() + _FORGET_EVERY_S
        self._watches: list[tuple[str, ConntrackWatch]] = []
        self._directions = [_direction_of(point) for point in points]
        self.processes: list[PointProcess] = []
        self.sinks: list[Sink] = []
        self.packets = 0
        self.start_ns = self.end_ns = 0

    # -- the whole -------------------------------------------------------------------------------------------------

    def run(self, make_sinks: Callable[[], Sequence[Sink]]) -> None:
        """Capture until it is over.

        Args:
            make_sinks: called when every point listens.

        Raises:
            KernelError: tcpdump could not start at a point, or a sink could not take more.
            LabError: the lab ended meanwhile; what was captured until then is in the sinks.
        """
        with ExitStack() as stack:
            stack.callback(self._selector.close)
            stack.enter_context(self._signals_heard())
            stack.enter_context(_few_collections())
            stack.callback(self._close_all)
            self._start(stack)
            self._wait_until_listening()
            self.sinks += make_sinks()
            self._loop()
            self._finish()
        if self._failure is not None:
            raise self._failure
        if self._lab_ended:
            raise LabError(f"lab {self._cluster.lab.name!r} ended, and the capture with it")

    def _start(self, stack: ExitStack) -> None:
        lab = self._cluster.lab
        if lab.first_process >= 0:
            self._selector.register(lab.first_process, selectors.EVENT_READ, self._lab_has_ended)
        if self._tracker is not None:
            for node in self._cluster.world.topology.nodes:
                with inside_network(self._cluster.network(node.name)):
                    watch = ConntrackWatch()
                stack.callback(watch.close)
                self._watches.append((node.name, watch))
                self._selector.register(watch, selectors.EVENT_READ, partial(self._read_conntrack, node.name, watch))
        if self._options.forget_fd is not None:
            self._selector.register(self._options.forget_fd, selectors.EVENT_READ, self._read_forget)
        if self._tracker is not None:
            self._watch_proxies(stack)
        for place in dict.fromkeys(point.place for point in self._points):
            with inside_network(self._cluster.network(place)):
                links = LinkWatch()
            stack.callback(links.close)
            self._selector.register(links, selectors.EVENT_READ, partial(self._read_links, place, links))
        for number, point in enumerate(self._points):
            process = start_tcpdump(
                point, pidfd=lab.first_process, network_fd=self._cluster.network(point.place),
                snap_bytes=self._options.snap_bytes, buffer_kib=self._options.buffer_kib,
            )  # fmt: skip
            self.processes.append(process)
            self._selector.register(process.output, selectors.EVENT_READ, partial(self._read_packets, number))
            self._selector.register(process.complaints, selectors.EVENT_READ, partial(self._read_complaints, number))
        self._cluster.close()

    def _watch_proxies(self, stack: ExitStack) -> None:
        """Ask the proxies of userspace mode, where there are any, which connection they open for which."""
        for node in self._cluster.world.topology.nodes:
            with inside_network(self._cluster.network(node.name)), suppress(ConnectionRefusedError):
                pairs = PairWatch()
                stack.callback(pairs.close)
                self._selector.register(pairs, selectors.EVENT_READ, partial(self._read_pairs, pairs))

    def _wait_until_listening(self) -> None:
        self._deadline = time.monotonic() + patient(_START_WITHIN_S)
        while not all(process.listening for process in self.processes):
            for process in self.processes:
                if process.complaints < 0 and not process.listening:
                    raise KernelError(
                        f"{process.point.name}: tcpdump did not start: {process.last_words or 'no message'}"
                    )
            if self._lab_ended:
                raise LabError(f"lab {self._cluster.lab.name!r} ended")
            if self._signals:
                raise KeyboardInterrupt
            if time.monotonic() > self._deadline:
                late = ", ".join(process.point.name for process in self.processes if not process.listening)
                raise KernelError(f"tcpdump did not begin to listen within {_START_WITHIN_S:g} s at {late}")
            self._round(_IDLE_S)
        self.start_ns = time.time_ns()
        self._deadline = float("inf")
        if self._options.duration_s is not None:
            self._deadline = time.monotonic() + self._options.duration_s
        self._state = _State.RUNNING  # a signal stops it from here on
        if self._signals:  # and this one came in the last round
            raise KeyboardInterrupt

    def _loop(self) -> None:
        while self._state is not _State.OVER:
            wait_s = min(_IDLE_S, max(0.0, self._deadline - time.monotonic()))
            self._round(0.0 if self._busy else wait_s)
            self._hand_on(self._merger.ready())
            self._tend()
            if self._busy:
                time.sleep(_ROUND_S)

    def _round(self, wait_s: float) -> None:
        """Handle what is there; whoever had nothing to say is quiet until when we began to ask."""
        self._busy = False
        asked_ns = time.time_ns()
        ready = self._selector.select(wait_s)
        spoke = {key.fd for key, _ in ready}
        for key, _ in ready:
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        for number, process in enumerate(self.processes):
            if process.output >= 0 and process.output not in spoke:
                self._merger.is_quiet(number, asked_ns)

    def _tend(self) -> None:
        now = time.monotonic()
        for number, at in list(self._ending.items()):
            if now >= at:
                del self._ending[number]
                self.processes[number].signal(signal.SIGINT)
        for process in self.processes:
            process.reap()
        self._tell_of_gone(now)
        if self._state is _State.DRAINING and all(process.is_dry for process in self.processes):
            self._end_now()
        if all(process.output < 0 and process.complaints < 0 for process in self.processes):
            self._state = _State.OVER
        elif now >= self._deadline:
            if self._state is _State.RUNNING:
                self.stop()
            elif self._state is _State.DRAINING:
                self._end_now()  # somebody has more to say than can be waited for; how much is counted
            else:  # somebody does not end: it is killed with everything else
                self._state = _State.OVER
        if self._tracker is not None and now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._tracker.forget_ended(time.time_ns() - self._options.settle_ns)

    def stop(self) -> None:
        """Take no packet that comes after now, and end when those before have come out of the kernel."""
        if self._state is _State.RUNNING:
            self._state = _State.DRAINING
            self._stop_ns = time.time_ns()
            self._deadline = time.monotonic() + patient(_DRAIN_AT_MOST_S)
            for process in self.processes:
                process.ask_counts()

    def _end_now(self) -> None:
        if self._state in (_State.RUNNING, _State.DRAINING):
            self._state = _State.ENDING
            self._stop_ns = self._stop_ns or time.time_ns()
            self._deadline = time.monotonic() + patient(_END_WITHIN_S)
            for process in self.processes:
                process.signal(signal.SIGINT)

    # -- what comes in ---------------------------------------------------------------------------------------------

    def _read_packets(self, number: int) -> None:
        process = self.processes[number]
        data = os.read(process.output, _READ_BYTES)
        if data:
            self._busy = True
            process.packets += self._merger.feed(number, data)
            return
        self._selector.unregister(process.output)
        os.close(process.output)
        process.output = -1
        self._merger.end(number)
        self._note_gone(process)

    def _read_complaints(self, number: int) -> None:
        process = self.processes[number]
        if process.read_complaints():
            self._selector.unregister(process.complaints)
            os.close(process.complaints)
            process.complaints = -1
            self._note_gone(process)

    def _note_gone(self, process: PointProcess) -> None:
        if process.output >= 0 or process.complaints >= 0:
            return
        if self._state in (_State.RUNNING, _State.DRAINING):
            process.gone = process.gone or process.last_words or "tcpdump was ended by somebody"
            self._gone.append((time.monotonic() + _TELL_AFTER_S, process))

    def _tell_of_gone(self, until: float) -> None:
        """Name the points that have gone, unless it is the whole lab."""
        while self._gone and self._gone[0][0] <= until and not self._lab_ended:
            _, process = self._gone.pop(0)
            living = sum(each.output >= 0 for each in self.processes)
            others = {0: "no point is left", 1: "the other one goes on"}.get(living, f"the other {living} go on")
            self._say(f"{process.point.name} is gone: {process.gone}; {others}")

    def _read_links(self, place: str, links: LinkWatch) -> None:
        for event in links.read():
            for number, point in enumerate(self._points):
                if point.place != place or point.interface != event.name or self.processes[number].gone:
                    continue
                # A pod's link loses its carrier when the pod is removed; a machine's when somebody unplugs it for a while.
                if event.deleted or (("/" in place or point.peer_mac) and not event.has_carrier):
                    self.processes[number].gone = "its link was removed"
                    self._ending[number] = time.monotonic() + _GONE_AFTER_S
        if all(self.processes[n].gone for n, point in enumerate(self._points) if point.place == place):
            self._selector.unregister(links)  # a socket holds its namespace, and a pod's must go
            links.close()

    def _read_conntrack(self, node: str, watch: ConntrackWatch) -> None:
        assert self._tracker is not None
        for event in watch.read():
            if event.ended:
                self._tracker.end_entry(node, event.entry, time.time_ns())
            else:
                self._tracker.add_entry(node, event.entry)

    def _read_pairs(self, pairs: PairWatch) -> None:
        assert self._tracker is not None
        for front, back in pairs.read():
            self._tracker.tie(front, back)
        if pairs.has_ended:
            self._selector.unregister(pairs)

    def _read_forget(self) -> None:
        assert self._options.forget_fd is not None
        data = os.read(self._options.forget_fd, 4096)
        if not data:
            self._selector.unregister(self._options.forget_fd)
        *lines, self._half_line = (self._half_line + data).split(b"\n")
        for line in lines:
            for sink in self.sinks:
                if isinstance(sink, RecorderSink):
                    sink.forget(int(line))

    def _lab_has_ended(self) -> None:
        self._selector.unregister(self._cluster.lab.first_process)
        self._lab_ended = True
        self._deadline = time.monotonic() + patient(_END_WITHIN_S)
        self._state = _State.ENDING

    # -- what goes out ---------------------------------------------------------------------------------------------

    def _hand_on(self, records: Sequence[Record]) -> None:
        if self._stop_ns is not None:
            records = records[: bisect_right(records, self._stop_ns, key=itemgetter(0))]
        if self._options.count is not None:
            records = records[: max(0, self._options.count - self.packets)]
        batch = self._tied(records)
        self.packets += len(batch)
        if batch:
            for sink in list(self.sinks):
                self._try(sink, partial(sink.write, batch))
        if self._options.count is not None and self.packets >= self._options.count:
            for process in self.processes:
                process.is_wanted = False
            self._end_now()
        if self._tracker is not None:
            for connection in self._tracker.take_finished(time.time_ns() - self._options.settle_ns):
                self._on_connection(connection)

    def _tied(self, records: Sequence[Record]) -> list[Seen]:
        directions, tracker = self._directions, self._tracker
        batch: list[Seen] = []
        append = batch.append
        for record in records:
            at, same, other = directions[record.point]
            direction = same if record.data[6:12] == at else other
            sighting: Sighting | None = None
            if tracker is not None:
                sighting = tracker.see(record, direction)
                if sighting is not None and sighting.connection.sightings == 1:
                    self._names.meet(read_key(sighting.connection.way[0].key) if sighting.connection.way else _ANY)
                    self._on_new_connection()
            append((record, direction, sighting))
        return batch

    def _try(self, sink: Sink, act: Callable[[], None]) -> None:
        """Let a sink act; one that cannot ends the capture, and the others go on to its end."""
        try:
            act()
        except (TestbedError, OSError) as error:
            self._failure = self._failure or error
            self.sinks.remove(sink)
            sink.close()
            self._end_now()

    def _finish(self) -> None:
        for process in self.processes:
            process.reap()
        if self._stop_ns is None and self._failure is None:  # every point is gone: did the lab take them along?
            for process in self.processes:  # one that is not waited for would keep the lab from ending
                process.close()
            are_killed = all(process.status == -signal.SIGKILL for process in self.processes)
            within_s = _KILLED_LAB_END_WITHIN_S if are_killed else _LAB_END_WITHIN_S
            self._lab_ended = self._lab_ended or bool(self._cluster.lab.why_ended(within_s=within_s))
        self._tell_of_gone(float("inf"))
        self._hand_on(self._merger.ready())
        if self._tracker is not None:
            for connection in self._tracker.take_all():
                self._on_connection(connection)
        self.end_ns = self._stop_ns or time.time_ns()
        for sink in list(self.sinks):
            self._try(sink, partial(sink.finish, self.processes, self.start_ns, self.end_ns))
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def _close_all(self) -> None:
        for process in self.processes:
            process.close()
        for sink in self.sinks:
            sink.close()
        self._cluster.close()

    @property
    def late(self) -> int:
        """How many packets came too late to be in order."""
        return self._merger.late

    @property
    def lost_events(self) -> list[str]:
        """Nodes whose kernel had to throw conntrack events away."""
        return [node for node, watch in self._watches if watch.lost]

    # -- signals ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals_heard(self) -> Iterator[None]:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        old = signal.set_wakeup_fd(writing)
        self._selector.register(reading, selectors.EVENT_READ, lambda: os.read(reading, 64))
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            self.stop()
        elif self._signals == 2:
            self._end_now()
        else:  # a sink that takes nothing more holds us up
            raise KeyboardInterrupt


_ANY = read_key(b"\x00" + bytes(12))  # type: ignore[arg-type]  # a flow that no name is looked up for


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for cycles seldom: every packet is a few objects, none of which refers back."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _direction_of(point: Point) -> tuple[bytes, int, int]:
    """Return a MAC address, and the direction of frames that come from it and of others."""
    if point.peer_mac:
        return point.peer_mac, INBOUND, OUTBOUND
    if point.mac:
        return point.mac, OUTBOUND, INBOUND
    return b"", 0, 0
