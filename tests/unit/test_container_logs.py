"""What is kept of a container's output, and what of it `kubectl logs` gets to see."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from testbed.api.streams import STDERR, STDOUT, LogOptions, chosen_container, log_options, status_of_end
from testbed.errors import ApiError
from testbed.kubelet.logs import ContainerLog
from testbed.kubelet.server import log_to_read

SECOND = 10**9
T0 = 1_704_067_200 * SECOND  # 2024-01-01T00:00:00Z


class Clock:
    def __init__(self) -> None:
        self.now_ns = T0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> ContainerLog:
    """A log of four lines, ten seconds apart."""
    made = ContainerLog(clock)
    for text in (b"one\n", b"two\n", b"three\n", b"four\n"):
        made.write(STDOUT, text)
        clock.now_ns += 10 * SECOND
    return made


def read(log: ContainerLog, **options: Any) -> str:
    async def collect() -> bytes:
        return b"".join([piece async for piece in log.read(LogOptions(**options))])

    return asyncio.run(collect()).decode()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({}, "one\ntwo\nthree\nfour\n", id="all of it"),
        pytest.param({"tail_lines": 2}, "three\nfour\n", id="the last lines"),
        pytest.param({"tail_lines": 0}, "", id="no lines"),
        pytest.param({"tail_lines": 9}, "one\ntwo\nthree\nfour\n", id="more lines than there are"),
        pytest.param({"since_s": 15}, "four\n", id="the last seconds"),
        pytest.param({"since_time_ns": T0 + 10 * SECOND}, "two\nthree\nfour\n", id="since a moment"),
        pytest.param({"since_s": 35, "tail_lines": 1}, "four\n", id="the last line of the last seconds"),
        pytest.param({"limit_bytes": 6}, "one\ntw", id="so many bytes"),
        pytest.param({"tail_lines": 1, "timestamps": True}, "2024-01-01T00:00:30.000000000Z four\n", id="with times"),
    ],
)
def test_what_is_read(log: ContainerLog, options: dict[str, Any], text: str) -> None:
    """Each option leaves what Kubernetes says it leaves."""
    assert read(log, **options) == text


def test_lines_appear_when_they_are_complete(clock: Clock) -> None:
    """A line that comes in parts is one line, whatever the other stream says meanwhile; the rest comes at the end."""
    log = ContainerLog(clock)
    log.write(STDOUT, b"spl")
    log.write(STDERR, b"oops\n")
    assert read(log) == "oops\n"
    log.write(STDOUT, b"it\nlast")
    assert read(log) == "oops\nsplit\n"
    log.close()
    assert read(log) == "oops\nsplit\nlast"


def test_the_oldest_lines_are_dropped(clock: Clock) -> None:
    """A container that writes without end keeps what fits, and a line without end appears in parts."""
    log = ContainerLog(clock, max_bytes=100)
    for number in range(1000):
        log.write(STDOUT, b"%08d\n" % number)
    assert read(log).split() == [f"{number:08d}" for number in range(989, 1000)]
    log = ContainerLog(clock)
    log.write(STDOUT, b"x" * 20_000)
    assert read(log) == "x" * 20_000


def test_following(clock: Clock) -> None:
    """What is written later comes at once, a slow reader misses what has been dropped, and the end ends it."""

    async def follow() -> list[bytes]:
        log = ContainerLog(clock, max_bytes=8)
        log.write(STDOUT, b"one\n")
        pieces = log.read(LogOptions(follow=True))
        seen = [await anext(pieces)]
        coming = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        log.write(STDOUT, b"two\n")
        seen.append(await coming)
        for text in (b"three\n", b"four\n", b"five\n"):
            log.write(STDOUT, text)
        seen.append(await anext(pieces))
        coming = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        log.close()
        with pytest.raises(StopAsyncIteration):
            await coming
        return seen

    assert asyncio.run(follow()) == [b"one\n", b"two\n", b"five\n"]


ENDED = {"terminated": {"containerID": "testbed://first", "exitCode": 1}}
RUNNING = {"state": {"running": {}}, "containerID": "testbed://second", "lastState": ENDED}


@pytest.mark.parametrize(
    ("status", "previous", "found"),
    [
        pytest.param(RUNNING, False, "second", id="running"),
        pytest.param(RUNNING, True, "first", id="running, the one before"),
        pytest.param({"state": ENDED}, False, "first", id="ended"),
        pytest.param({"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ENDED}, False, "first",
                     id="waits to start again"),
        pytest.param({"state": {"waiting": {"reason": "ContainerCreating"}}}, False,
                     'container "web" in pod "p" is waiting to start: ContainerCreating', id="never started"),
        pytest.param({"state": {"waiting": {"reason": "ImagePullBackOff"}}}, False,
                     'container "web" in pod "p" is waiting to start: trying and failing to pull image', id="no image"),
        pytest.param({**RUNNING, "lastState": {}}, True,
                     'previous terminated container "web" in pod "p" not found', id="nothing before"),
    ],
)  # fmt: skip
def test_which_start_is_meant(status: dict[str, Any], previous: bool, found: str) -> None:
    """The log of the last start, or of the one before it; refusals are the kubelet's."""
    try:
        answer = log_to_read(status, "p", "web", previous=previous)
    except ApiError as error:
        assert error.code == 400
        answer = error.message
    assert answer == found


POD = {
    "metadata": {"name": "p"},
    "spec": {"initContainers": [{"name": "init"}], "containers": [{"name": "a"}, {"name": "b"}]},
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a container name must be specified for pod p, choose one of: [init a b]"),
        ("c", "container c is not valid for pod p"),
    ],
)
def test_containers_that_are_not_chosen(name: str, message: str) -> None:
    """A pod of several containers needs a name, one that it has."""
    with pytest.raises(ApiError) as refused:
        chosen_container(POD, name)
    assert (refused.value.code, refused.value.message) == (400, message)
    assert chosen_container(POD, "init") == "init"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"tailLines": "-1"}, 'PodLogOptions "p" is invalid: tailLines: Invalid value: -1: must be greater than or equal to 0'),
        ({"limitBytes": "0"}, 'PodLogOptions "p" is invalid: limitBytes: Invalid value: 0: must be greater than 0'),
        ({"tailLines": "x"}, "invalid tailLines 'x': strconv.ParseInt: parsing \"x\": invalid syntax"),
    ],
)  # fmt: skip
def test_log_options_that_make_no_sense(query: dict[str, str], message: str) -> None:
    """Refused in the words of the API server."""
    with pytest.raises(ApiError) as refused:
        log_options(query, "p")
    assert refused.value.message == message


def test_the_status_that_ends_an_exec() -> None:
    """The exit code is a cause, where every client looks for it."""
    assert status_of_end(0, ["true"]) == {"metadata": {}, "status": "Success"}
    ended = status_of_end(3, ["sh", "-c", "exit 3"])
    assert ended["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}
    assert ended["reason"] == "NonZeroExitCode"
