"""Asks targets in turn, a new connection each, and says which requests failed. Runs inside a lab, as a program of its own.

Standard input: lines of JSON, each the whole list of ``[key, address, port]`` to ask from then on; each is answered by a line
``{"asking": number}``, after which nothing of the list before is under way. With the end of the input it ends, and says
``{"answered": {key: number}}``. A request that failed is a line ``{"failed": key, "begin": s, "end": s, "why": text}``.

Each target is asked from ports of its own: a node whose IPVS remembers a connection through its NodePort takes another one
from the same port to the same pod, through a ClusterIP of the client's node, for the first, and its answers go astray
(docs/proxy-modes.md). That is IPVS, on every cluster, and not what is looked for here.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice

from testbed.bench.clients import bind_next

PATIENCE_S = 5.0
PORTS = range(33_000, 61_000)
SHARES = 16
"""Three apps, each with a NodePort on three nodes and two ports of its ClusterIP."""
REQUEST = b"GET / HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n"


class Ports:
    """The ports that each target is asked from, in turn.

    ``start``: how many each has been asked from before. A load that begins goes on after the one that has ended: a SYN that met
    no rules, because userspace mode's kube-proxy had just been killed, is remembered by connection tracking for two minutes, and
    the next one from that port meets none either.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._turns: dict[tuple[str, int], Iterator[int]] = {}

    def bind(self, connection: socket.socket, target: tuple[str, int]) -> None:
        if target not in self._turns:
            ports = PORTS[len(self._turns) % SHARES :: SHARES]
            self._turns[target] = islice(cycle(ports), self._start % len(ports), None)
        bind_next(connection, self._turns[target])


def ask(address: str, port: int, ports: Ports) -> str:
    """Return why there was no answer, '' when there was one."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_S)
            ports.bind(connection, (address, port))
            connection.connect((address, port))
            connection.sendall(REQUEST)
            answer = b""
            while data := connection.recv(65536):
                answer += data
    except OSError as error:
        return f"{address}:{port}: {error}"
    return "" if answer.startswith(b"HTTP/1.1 200 ") else f"{address}:{port} answered {answer[:60]!r}"


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main(rate: float) -> None:
    targets: list[tuple[str, str, int]] = []
    answered: Counter[str] = Counter()
    ports = Ports(start=int(time.monotonic() * rate / 2))  # no target is asked more often for long
    turn = 0
    due = time.monotonic()
    while True:
        if select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
            line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]  # nothing is kept back from select
            if not line:
                break
            targets = json.loads(line)
            say(asking=len(targets))
            continue
        due = time.monotonic() + 1 / rate
        if not targets:
            continue
        turn += 1
        key, address, port = targets[turn % len(targets)]
        begin = time.monotonic()
        why = ask(address, port, ports)
        if why:
            say(failed=key, begin=begin, end=time.monotonic(), why=why)
        else:
            answered[key] += 1
    say(answered=answered)


if __name__ == "__main__":
    main(float(sys.argv[1]))
