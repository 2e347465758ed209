"""The store: revisions, optimistic locking, listing, and subscriptions that miss nothing and repeat nothing."""

from __future__ import annotations

import pytest
from registry_support import NOW, make_store

from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.store import Event, EventType, Store


def thing(name: str, namespace: str = "dev", **fields: object) -> Object:
    return {"metadata": {"name": name, "namespace": namespace}, **fields}


@pytest.fixture
def store() -> Store:
    return make_store()


def test_create_fills_what_only_the_server_knows(store: Store) -> None:
    """A new object has a uid, a creation time and the revision of its creation; the caller's dict stays as it was."""
    given = thing("a")
    stored = store.create("pods", given)
    assert stored["metadata"] == {
        "name": "a", "namespace": "dev", "uid": "uid-1", "creationTimestamp": NOW, "resourceVersion": "1",
    }  # fmt: skip
    assert given == thing("a")
    assert store.get("pods", "dev", "a") is stored


def test_one_name_once(store: Store) -> None:
    """The same name in the same namespace is refused with Kubernetes' text, and the first object stays."""
    first = store.create("services", thing("a"))
    with pytest.raises(ApiError, match='^services "a" already exists$') as refused:
        store.create("services", thing("a"))
    assert (refused.value.code, refused.value.reason) == (409, "AlreadyExists")
    assert store.list("services") == [first]
    store.create("services", thing("a", "prod"))
    store.create("pods", thing("a"))


def test_list_is_sorted_and_by_namespace(store: Store) -> None:
    """Lists come by namespace and name, whatever the order of creation."""
    for namespace, name in (("b", "x"), ("a", "z"), ("a", "y")):
        store.create("pods", thing(name, namespace))
    assert [obj["metadata"]["name"] for obj in store.list("pods")] == ["y", "z", "x"]
    assert [obj["metadata"]["name"] for obj in store.list("pods", "b")] == ["x"]
    assert store.list("pods", "none") == store.list("nodes") == []


def test_stale_update_is_a_conflict(store: Store) -> None:
    """An update that was based on an older revision is refused, in Kubernetes' words."""
    old = store.create("services", thing("x"))
    store.update("services", {**old, "spec": 1})
    with pytest.raises(ApiError) as refused:
        store.update("services", {**old, "spec": 2})
    assert str(refused.value) == (
        'Operation cannot be fulfilled on services "x": the object has been modified; please apply your changes to the latest '
        "version and try again"
    )
    assert refused.value.code == 409
    assert store.update("services", thing("x", spec=3))["spec"] == 3, "without a version, the last writer wins"


def test_the_same_again_is_no_event(store: Store) -> None:
    """Writing what is there already changes no revision and tells nobody."""
    stored = store.create("pods", thing("a", spec=1))
    seen: list[Event] = []
    store.subscribe(seen.append)
    assert store.update("pods", thing("a", spec=1)) is stored
    assert (seen, store.revision) == ([], 1)


@pytest.mark.parametrize("operation", ["update", "delete"])
def test_absent_objects_are_not_found(store: Store, operation: str) -> None:
    """Updating and deleting what is not there is a 404."""
    with pytest.raises(ApiError, match='^deployments.apps "nope" not found$') as refused:
        if operation == "update":
            store.update("deployments.apps", thing("nope"))
        else:
            store.delete("deployments.apps", "dev", "nope")
    assert refused.value.details == {"name": "nope", "kind": "deployments", "group": "apps"}


def test_deletion_takes_a_revision(store: Store) -> None:
    """The last state of a deleted object carries the revision of its deletion, so that a watch can go on from it."""
    store.create("pods", thing("a"))
    assert store.delete("pods", "dev", "a")["metadata"]["resourceVersion"] == "2"
    assert store.get("pods", "dev", "a") is None


def test_subscribers_see_every_change_of_their_resource_in_order(store: Store) -> None:
    """A subscriber of pods sees pods only, with the state before and after; one of everything sees all."""
    pods: list[Event] = []
    everything: list[Event] = []
    subscription = store.subscribe(pods.append, "pods")
    store.subscribe(everything.append)
    created = store.create("pods", thing("a"))
    store.create("services", thing("a"))
    changed = store.update("pods", {**created, "spec": 1})
    store.delete("pods", "dev", "a")
    subscription.cancel()
    store.create("pods", thing("b"))
    assert [(event.type, event.revision) for event in pods] == [
        (EventType.ADDED, 1), (EventType.MODIFIED, 3), (EventType.DELETED, 4),
    ]  # fmt: skip
    assert pods[1].previous is created and pods[1].object is changed
    assert [event.revision for event in everything] == [1, 2, 3, 4, 5]


def test_resuming_replays_what_was_missed(store: Store) -> None:
    """Subscribing from a revision brings the events after it, then the new ones, each once."""
    for name in "abc":
        store.create("pods", thing(name))
    seen: list[int] = []
    store.subscribe(lambda event: seen.append(event.revision), "pods", since=1)
    store.create("pods", thing("d"))
    assert seen == [2, 3, 4]


def test_compacted_history_is_gone() -> None:
    """A revision that the history no longer reaches is 410 Expired; the oldest one that it does reach still works."""
    store = make_store(history=2)
    for name in "abcd":
        store.create("pods", thing(name))
    with pytest.raises(ApiError, match=r"^too old resource version: 1 \(2\)$") as refused:
        store.subscribe(lambda event: None, since=1)
    assert (refused.value.code, refused.value.reason) == (410, "Expired")
    seen: list[int] = []
    store.subscribe(lambda event: seen.append(event.revision), since=2)
    assert seen == [3, 4]


def test_a_revision_from_another_store_makes_the_watcher_list_again(store: Store) -> None:
    """A revision in the future cannot be ours, so it is expired, too."""
    with pytest.raises(ApiError) as refused:
        store.subscribe(lambda event: None, since=7)
    assert refused.value.code == 410


def test_a_subscriber_that_writes_keeps_the_order_for_all(store: Store) -> None:
    """What a subscriber writes reaches everybody after the event that it reacted to."""
    late: list[int] = []

    def react(event: Event) -> None:
        if event.key.resource == "pods":
            store.create("events", thing(f"for-{event.key.name}"))

    store.subscribe(react)
    store.subscribe(lambda event: late.append(event.revision))
    store.create("pods", thing("a"))
    store.create("pods", thing("b"))
    assert late == [1, 2, 3, 4]


def test_a_subscriber_that_writes_during_its_replay_keeps_the_order(store: Store) -> None:
    """Events that a subscriber causes while it catches up come after those that it had missed."""
    store.create("pods", thing("a"))
    store.create("pods", thing("b"))
    seen: list[int] = []

    def react(event: Event) -> None:
        seen.append(event.revision)
        if event.key.resource == "pods":
            store.create("events", thing(f"for-{event.key.name}"))

    store.subscribe(react, since=0)
    assert seen == [1, 2, 3, 4]


def test_a_subscriber_that_fails_costs_the_others_nothing(store: Store) -> None:
    """The other subscribers still hear of the change, and the error reaches the writer."""
    seen: list[int] = []

    def fail(event: Event) -> None:
        raise ValueError("no")

    store.subscribe(fail, "pods")
    store.subscribe(lambda event: seen.append(event.revision), "pods")
    with pytest.raises(ValueError, match="no"):
        store.create("pods", thing("a"))
    assert seen == [1]
    assert store.get("pods", "dev", "a") is not None
