"""Asks targets in turn, a new connection each, and says which requests failed. Runs inside a lab, as a program of its own.

Standard input: lines of JSON, each the whole list of ``[key, address, port]`` to ask from then on; each is answered by a line
``{"asking": number}``, after which nothing of the list before is under way. With the end of the input it ends, and says
``{"answered": {key: number}}``. A request that failed is a line ``{"failed": key, "begin": s, "end": s, "why": text}``.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections import Counter

PATIENCE_S = 5.0
REQUEST = b"GET / HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n"


def ask(address: str, port: int) -> str:
    """Return why there was no answer, '' when there was one."""
    try:
        with socket.create_connection((address, port), timeout=PATIENCE_S) as connection:
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
        why = ask(address, port)
        if why:
            say(failed=key, begin=begin, end=time.monotonic(), why=why)
        else:
            answered[key] += 1
    say(answered=answered)


if __name__ == "__main__":
    main(float(sys.argv[1]))
