"""Turns, session affinity, tries and proxy ports of userspace mode: no socket, no clock, no chance."""

from __future__ import annotations

from proxy_support import endpoint, endpoint_slice, service, state_of

from testbed.dataplane.balancer import COOL_DOWN_S, Dial, PortPool, Rotation, balanced_endpoints


def rotation(*endpoints: str, affinity_s: int = 0) -> Rotation:
    made = Rotation(affinity_s)
    made.set_endpoints(endpoints, lambda order: None)
    return made


def test_turns() -> None:
    """Each connection gets the next endpoint, and after the last the first, whoever asks."""
    turns = rotation("a:1", "b:1", "c:1")
    assert [turns.next(f"10.0.0.{n % 2}", 0) for n in range(7)] == ["a:1", "b:1", "c:1", "a:1", "b:1", "c:1", "a:1"]


def test_nobody() -> None:
    """Without endpoints there is no turn."""
    assert rotation().next("10.0.0.1", 0) == ""
    assert Dial(rotation(), "10.0.0.1").next(0) is None


def test_a_change_shuffles_and_begins_anew() -> None:
    """A new list is put in another order, of which the first is next; the same list again, in any order, changes nothing."""
    turns = rotation("a:1", "b:1", "c:1")
    turns.next("10.0.0.1", 0)
    turns.set_endpoints(["c:1", "b:1", "a:1"], list.reverse)
    assert turns.next("10.0.0.1", 0) == "b:1"
    turns.set_endpoints(["a:1", "b:1", "c:1", "d:1"], list.reverse)
    assert [turns.next("10.0.0.1", 0) for _ in range(4)] == ["d:1", "c:1", "b:1", "a:1"]


def test_affinity_lasts_from_the_latest_use() -> None:
    """A client keeps its endpoint as long as its pauses are shorter than the time-out; others have their own."""
    turns = rotation("a:1", "b:1", affinity_s=100)
    assert turns.next("10.0.0.1", 0) == "a:1"
    assert turns.next("10.0.0.2", 1) == "b:1"
    assert turns.next("10.0.0.1", 99) == "a:1"
    assert turns.next("10.0.0.1", 198) == "a:1"
    assert turns.next("10.0.0.2", 101) == "a:1"  # its time was over: the next turn
    assert turns.next("10.0.0.1", 298) == "b:1"


def test_purge_forgets_who_is_over_time() -> None:
    """What each sync does: memory does not grow with clients of long ago."""
    turns = rotation("a:1", "b:1", affinity_s=100)
    turns.next("10.0.0.1", 0)
    turns.next("10.0.0.2", 50)
    turns.purge(100)
    assert turns.clients == ("10.0.0.2",)


def test_affinity_survives_a_change_of_others() -> None:
    """Clients of endpoints that stay keep them; those of one that is gone are free."""
    turns = rotation("a:1", "b:1", affinity_s=100)
    turns.next("10.0.0.1", 0)
    turns.next("10.0.0.2", 0)
    turns.set_endpoints(["b:1", "c:1", "d:1"], lambda order: None)
    assert turns.clients == ("10.0.0.2",)
    assert turns.next("10.0.0.2", 1) == "b:1"
    turns.set_affinity(0)
    assert turns.clients == ()


def test_four_tries_each_at_the_next_one() -> None:
    """250 ms, 500 ms, 1 s, 2 s; then the client's connection is given up."""
    dial = Dial(rotation("a:1", "b:1", "c:1"), "10.0.0.1")
    tries = [dial.next(0) for _ in range(5)]
    assert tries == [("a:1", 0.25), ("b:1", 0.5), ("c:1", 1.0), ("a:1", 2.0), None]


def test_a_failed_dial_resets_affinity() -> None:
    """A client bound to an endpoint that does not answer is bound to the one that does."""
    turns = rotation("a:1", "b:1", affinity_s=100)
    assert turns.next("10.0.0.1", 0) == "a:1"
    dial = Dial(turns, "10.0.0.1")
    assert [dial.next(1), dial.next(1)] == [("a:1", 0.25), ("b:1", 0.5)]
    assert turns.next("10.0.0.1", 2) == "b:1"


def test_which_endpoints() -> None:
    """The ready ones, local or not; none that only serve while they terminate."""
    slices = [
        endpoint_slice(
            "web", endpoint("10.0.0.1"), endpoint("10.0.1.1", "node2"), endpoint("10.0.0.2", ready=False),
            endpoint("10.0.0.3", ready=False, serving=True, terminating=True),
        )
    ]  # fmt: skip
    state = state_of([service("web", "172.30.0.1", internalTrafficPolicy="Local")], slices)
    [found] = state.endpoints.values()
    assert balanced_endpoints(found) == ("10.0.0.1:80", "10.0.1.1:80")


def test_ports_of_a_range() -> None:
    """Each is given out once; one that comes back rests for half a second."""
    pool = PortPool(40000, 40019, lambda free: free[0])
    ports = [pool.take(0) for _ in range(20)]
    assert ports == list(range(40000, 40020))
    assert pool.take(0) is None and pool.free_at_s is None
    pool.give_back(40007, 10)
    assert pool.take(10) is None and pool.free_at_s == 10 + COOL_DOWN_S
    assert pool.take(10.5) == 40007
    assert pool.take(11) is None
