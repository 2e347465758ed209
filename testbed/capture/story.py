"""What there is to tell about a connection: text for people, JSON for programs, Mermaid for documents. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from testbed.capture.journeys import INBOUND, OUTBOUND, Connection, Passage
from testbed.capture.names import Directory
from testbed.capture.points import Point
from testbed.model.flows import PROTOCOL_NAMES, Flow, FlowKey, read_key

_DIRECTIONS = {INBOUND: "in", OUTBOUND: "out"}


@dataclass(frozen=True, slots=True)
class Translation:
    """What a node made of a packet."""

    node: str
    before: Flow
    after: Flow
    undone: bool  # of an answer: translated back


Step = Passage | Translation


class Storyteller:
    """Knows the points and the names of addresses."""

    def __init__(self, points: Sequence[Point], directory: Directory) -> None:
        self.points = points
        self.directory = directory

    # -- pieces ----------------------------------------------------------------------------------------------------

    def steps(self, connection: Connection, *, answer: bool = False) -> list[Step]:
        """Return the passages of the first packet (or answer), and the translations between and after them."""
        passages = connection.answer if answer else connection.way
        table = _translations(connection, answer)
        found: list[Step] = []
        for number, passage in enumerate(passages):
            found.append(passage)
            following = passages[number + 1].key if number + 1 < len(passages) else None
            found += _between(passage.key, following, table, answer)
        return found

    def headline(self, connection: Connection) -> str:
        """Return ``FROM → TO [→ ENDPOINT]``, in names."""
        flow = _first_flow(connection)
        if flow is None:
            return "?"
        parts = [
            self.directory.who(flow.source).text,
            self.directory.of(flow.destination, flow.port, flow.protocol).text,
        ]
        end = self.endpoint(connection)
        if parts[-1] == end.split(" on ")[0]:
            parts.pop()
        if end and end != parts[-1]:
            parts.append(end)
        return " → ".join(parts)

    def endpoint(self, connection: Connection) -> str:
        """Return who the connection reaches at last, behind every translation and proxy."""
        flow = _last_flow(connection.continues or connection)
        if flow is None:
            return ""
        name = self.directory.of(flow.destination, flow.port, flow.protocol)
        return f"{name.text} on {name.node}" if name.node else name.text

    def outcome(self, connection: Connection) -> str:
        """Return how it began: answered, refused, or where the first packet was seen last."""
        label = connection.answer_label
        if not connection.way:
            return "only answers were seen"
        if connection.answer:
            where = self.points[connection.answer[0].point].place
            if label.startswith("ICMP"):
                return f"refused ({label}), first seen at {where}"
            if "RST" in label:
                return f"refused (RST), first seen at {where}"
            took = connection.answer[-1].time_ns - connection.way[0].time_ns
            return f"answered in {_duration(took)}"
        last = connection.way[-1]
        again = f", sent {connection.resent + 1} times" if connection.resent else ""
        return f"no answer{again}: last seen at {self.points[last.point].name}{_direction(last, ' going ')}"

    def comment(self, connection: Connection, is_forward: bool) -> str:
        """Return the comment of every packet of a connection in one direction."""
        arrow = "" if is_forward else ", answer"
        more = f", goes on as connection {connection.continues.number}" if connection.continues else ""
        return f"connection {connection.number}: {self.headline(connection)}{arrow}{more}"

    def step_comment(self, connection: Connection, step: int, *, answer: bool) -> str:
        """Return the comment of the first packet (or answer) at one point: where on its way that is, and what was done to it."""
        passages = connection.answer if answer else connection.way
        here = passages[step]
        what = connection.answer_label if answer else connection.way_label
        text = f"{what}, point {step + 1}: {self.points[here.point].name}{_direction(here, ' ')}"
        if step:
            before = passages[step - 1]
            text += f", +{_duration(here.time_ns - before.time_ns)}"
            done = _between(before.key, here.key, _translations(connection, answer), answer)
            text += "".join(f"; {each.node}: {self.describe(each)}" for each in done)
        return text

    def describe(self, step: Translation) -> str:
        """Return a translation in words."""
        parts = []
        before, after = step.before, step.after
        if step.undone:
            if (after.source, after.source_port) != (before.source, before.source_port):
                parts.append(f"source back to {after.sender}")
            if (after.destination, after.port) != (before.destination, before.port):
                parts.append(f"destination back to {after.receiver}")
            return ", ".join(parts)
        if (after.destination, after.port) != (before.destination, before.port):
            name = self.directory.who(after.destination)
            verb = "redirected to its own" if name.place == step.node else "DNAT to"
            shown = "" if name.place == step.node or name.text == str(after.destination) else f" ({name.text})"
            parts.append(f"{verb} {after.receiver}{shown}")
        if (after.source, after.source_port) != (before.source, before.source_port):
            name = self.directory.who(after.source)
            verb = "masqueraded as" if name.place == step.node else "SNAT to"
            parts.append(f"{verb} {after.sender}")
        return ", ".join(parts)

    # -- forms -----------------------------------------------------------------------------------------------------

    def text(self, connection: Connection) -> str:
        """Return the journey as lines."""
        flow = _first_flow(connection)
        protocol = PROTOCOL_NAMES.get(flow.protocol, f"protocol {flow.protocol}") if flow else ""
        lines = [
            f"connection {connection.number} ({protocol}): {self.headline(connection)}",
            f"  {self.outcome(connection)}",
        ]
        if connection.continues is not None:
            lines.append(f"  the proxy goes on with it as connection {connection.continues.number}")
        width = max((len(point.name) for point in self.points), default=0)
        start = connection.way[0].time_ns if connection.way else connection.first_ns
        for answer, label in ((False, connection.way_label), (True, f"{connection.answer_label} (answer)")):
            steps = self.steps(connection, answer=answer)
            if steps:
                lines.append(f"  {label}")
                lines += self._step_lines(steps, width, start)
        return "\n".join(lines)

    def _step_lines(self, steps: Sequence[Step], width: int, start_ns: int) -> Iterator[str]:
        before: Passage | None = None
        for step in steps:
            if isinstance(step, Translation):
                yield f"    {'':12} {'':10}  {step.node + ':':{width}}       {self.describe(step)}"
                continue
            since = f"+{_duration(step.time_ns - before.time_ns)}" if before else ""
            at = _duration(step.time_ns - start_ns)
            name = self.points[step.point].name
            yield (
                f"    {at:>12} {since:>10}  {name:{width}} {_DIRECTIONS.get(step.direction, ''):>4}  {read_key(step.key)}"
            )
            before = step

    def as_dict(self, connection: Connection) -> dict[str, Any]:
        """Return the journey as JSON values; docs/capture.md describes the fields."""
        flow = _first_flow(connection)
        start = connection.way[0].time_ns if connection.way else connection.first_ns
        document: dict[str, Any] = {
            "number": connection.number,
            "protocol": PROTOCOL_NAMES.get(flow.protocol, str(flow.protocol)) if flow else "",
            "start": rfc3339(start),
            "from": {"address": flow.sender, "name": self.directory.who(flow.source).text} if flow else None,
            "to": {
                "address": flow.receiver,
                "name": self.directory.of(flow.destination, flow.port, flow.protocol).text,
            } if flow else None,
            "endpoint": self.endpoint(connection),
            "outcome": self.outcome(connection),
            "packets": connection.packets,
            "sightings": connection.sightings,
            "continues_as": connection.continues.number if connection.continues else None,
        }  # fmt: skip
        for name, label, answer in (("way", connection.way_label, False), ("answer", connection.answer_label, True)):
            steps = [self._step_dict(step, start) for step in self.steps(connection, answer=answer)]
            document[name] = {"packet": label, "steps": steps} if steps else None
        return document

    def _step_dict(self, step: Step, start_ns: int) -> dict[str, Any]:
        if isinstance(step, Translation):
            return {
                "node": step.node, "translation": self.describe(step), "before": [step.before.sender, step.before.receiver],
                "after": [step.after.sender, step.after.receiver],
            }  # fmt: skip
        flow = read_key(step.key)
        return {
            "point": self.points[step.point].name,
            "direction": _DIRECTIONS.get(step.direction),
            "microseconds": (step.time_ns - start_ns) / 1000,
            "packet": [flow.sender, flow.receiver],
        }

    def mermaid(self, connection: Connection) -> str:
        """Return the journey as a Mermaid sequence diagram."""
        both = [(answer, self.steps(connection, answer=answer)) for answer in (False, True)]
        order = list(
            dict.fromkeys(
                self.points[step.point].name for _, steps in both for step in steps if isinstance(step, Passage)
            )
        )
        names = {name: f"p{number}" for number, name in enumerate(order)}
        lines = ["sequenceDiagram", f"    title connection {connection.number}: {_plain(self.headline(connection))}"]
        lines += [f"    participant {names[name]} as {_plain(name)}" for name in order]
        for answer, steps in both:
            lines += self._arrows(steps, names, connection.answer_label if answer else connection.way_label, answer)
        if not connection.answer and connection.way:
            last = names[self.points[connection.way[-1].point].name]
            lines.append(f"    Note over {last}: {_plain(self.outcome(connection))}")
        return "\n".join(lines)

    def _arrows(self, steps: Sequence[Step], names: Mapping[str, str], label: str, answer: bool) -> Iterator[str]:
        before: Passage | None = None
        for step in steps:
            if isinstance(step, Translation):
                where = names[self.points[before.point].name] if before else next(iter(names.values()))
                yield f"    Note over {where}: {_plain(f'{step.node}: {self.describe(step)}')}"
                continue
            name = names[self.points[step.point].name]
            if before is not None:
                arrow = "-->>" if answer else "->>"
                source, since = names[self.points[before.point].name], _duration(step.time_ns - before.time_ns)
                yield f"    {source}{arrow}{name}: {_plain(f'{label} {read_key(step.key)} (+{since})')}"
            before = step


def _translations(connection: Connection, answer: bool) -> dict[FlowKey, tuple[str, FlowKey]]:
    """Return key as a packet comes -> the node that translates it, and the key it leaves with."""
    table: dict[FlowKey, tuple[str, FlowKey]] = {}
    for node, entry in connection.entries:
        if entry.is_translated:
            key, after = (entry.reply, entry.handed_back) if answer else (entry.original, entry.sent_on)
            table[key] = (node, after)
    return table


def _between(
    key: FlowKey, until: FlowKey | None, table: Mapping[FlowKey, tuple[str, FlowKey]], answer: bool
) -> list[Translation]:  # fmt: skip
    """Return the translations that lead from one key to another; with ``until`` None all that follow."""
    found: list[Translation] = []
    while key != until and key in table and len(found) < len(table):
        node, after = table[key]
        found.append(Translation(node, read_key(key), read_key(after), answer))
        key = after
    return found


def _first_flow(connection: Connection) -> Flow | None:
    if connection.way:
        return read_key(connection.way[0].key)
    if connection.entries:
        return read_key(connection.entries[0].entry.original)
    return read_key(min(connection.forward)) if connection.forward else None


def _last_flow(connection: Connection) -> Flow | None:
    if not connection.way:
        return read_key(connection.entries[-1].entry.sent_on) if connection.entries else None
    key = connection.way[-1].key
    following = _between(key, None, _translations(connection, False), False)
    return following[-1].after if following else read_key(key)


def _direction(passage: Passage, before: str) -> str:
    return f"{before}{_DIRECTIONS[passage.direction]}" if passage.direction in _DIRECTIONS else ""


def _duration(time_ns: int) -> str:
    if abs(time_ns) < 1_000_000:
        return f"{time_ns / 1000:.1f} µs"
    if abs(time_ns) < 1_000_000_000:
        return f"{time_ns / 1e6:.2f} ms"
    return f"{time_ns / 1e9:.3f} s"


def rfc3339(time_ns: int) -> str:
    """Return a time of day in UTC, to the nanosecond."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def _plain(text: str) -> str:
    """Return text without what ends a statement of Mermaid's."""
    return text.replace(";", ",").replace("#", "")
