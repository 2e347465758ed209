"""Runs controllers: store events make keys dirty, dirty keys are reconciled one after another.

::

    Store ──event──▶ Controller.keys() ──dirty (controller, key)──▶ queue ──▶ Controller.reconcile() ──▶ Registry
                                              ▲                                    │ seconds, conflict, error
                                              └──────────── call_later ◀───────────┘

There are no threads: between two reconciles every controller has seen every change, so none needs the "expectations"
by which upstream's controllers wait for their own writes to come back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from testbed.errors import ApiError
from testbed.model.objects import BY_KEY, Key, namespace_of
from testbed.registry import Registry
from testbed.store import Event, EventType, Subscription

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 30.0
_IMMEDIATE_RETRIES = 5  # of a write that was based on an older state; more of them is an error like any other
# A reconcile that took 10 ms may come again 40 ms later: no object gets more than a fifth of the time, however
# often it changes. Below the threshold the change is not worth a timer.
_REST_PER_WORK = 4.0
_CHEAP_S = 0.002
# Others on the same thread get their turn in between: a thousand new pods are seconds of work.
_TURN_S = 0.05
_FEW = 64  # entries that are not worth looking through for those that are past
_RUN_LIMIT = 20_000  # two controllers that undo each other's work must not stop the lab


class Controller(Protocol):
    """Makes the cluster follow one kind of object."""

    @property
    def watches(self) -> frozenset[str] | None:
        """The resources whose changes `keys` wants to see; None for all."""

    def keys(self, event: Event) -> Iterable[Key]:
        """Return what must be reconciled after a change. Writes nothing."""

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Do what is due for a key, which may be gone; return in how many seconds to look again, None for never."""


class Timer(Protocol):
    """A call that is to come, such as an `asyncio.TimerHandle`."""

    def cancel(self) -> object: ...


_Item = tuple[int, Key]  # number of the controller, what to reconcile


class ControllerDriver:
    """Reconciles what changed, until nothing is left to do.

    Args:
        now_s: A clock that never goes back, in seconds.
        call_later: Calls a function after so many seconds, on the same thread.
        on_error: Told of every failed reconcile. The key is tried again later; the others are not held up.
    """

    def __init__(
        self,
        registry: Registry,
        controllers: Sequence[Controller],
        *,
        now_s: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], Timer],
        on_error: Callable[[Key, Exception], None],
    ) -> None:
        self._registry = registry
        self._controllers = tuple(controllers)
        self._now_s = now_s
        self._call_later = call_later
        self._on_error = on_error
        self._watching: dict[str, list[int]] = {
            resource: [
                number
                for number, controller in enumerate(self._controllers)
                if controller.watches is None or resource in controller.watches
            ]
            for resource in BY_KEY
        }
        self._watching_all = [number for number, one in enumerate(self._controllers) if one.watches is None]
        self._queue: deque[_Item] = deque()
        self._queued: set[_Item] = set()
        self._timers: dict[_Item, tuple[float, Timer]] = {}  # when it is due
        self._rests: dict[_Item, float] = {}  # not again before
        self._most_rests = _FEW
        self._failures: dict[_Item, int] = {}
        self._seen_revision = 0
        self._running = False
        self._has_had_turn = False
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Take notice of all there is, and of every change from now on. Reconciles nothing yet."""
        store = self._registry.store
        self._seen_revision = store.revision
        for resource in BY_KEY:
            for obj in store.list(resource):
                key = Key(resource, namespace_of(obj), obj["metadata"]["name"])
                self._notice(Event(EventType.ADDED, key, obj, None, store.revision))
        self._subscription = store.subscribe(self._notice)

    def stop(self) -> None:
        """See no further change and forget what was pending."""
        if self._subscription is not None:
            self._subscription.cancel()
        self._queue.clear()
        self._queued.clear()
        for item in list(self._timers):
            self._cancel_timer(item)
        self._has_had_turn = False

    def run_pending(self, limit: int = _RUN_LIMIT) -> int:
        """Reconcile until nothing is dirty, and return how many reconciles that took. What waits for a timer stays.

        What takes longer than a turn goes on in the next one. Called from inside a store callback it does nothing but
        come back later: the controllers have not seen yet what they would need to know.
        """
        if self._running or self._has_had_turn or not self._queue:
            return 0
        self._running = True
        done = 0
        until_s = self._now_s() + _TURN_S
        try:
            while self._queue and done < limit and self._seen_revision == self._registry.store.revision:
                if done and self._now_s() >= until_s:
                    self._has_had_turn = True
                    break
                item = self._queue.popleft()
                self._queued.discard(item)
                self._reconcile(item)
                done += 1
        finally:
            self._running = False
        if self._queue:
            self._call_later(0.0, self._run_from_timer)
        return done

    def _run_from_timer(self) -> None:
        self._has_had_turn = False
        self.run_pending()

    def _notice(self, event: Event) -> None:
        self._seen_revision = event.revision
        for number in self._watching.get(event.key.resource, self._watching_all):
            try:
                for key in self._controllers[number].keys(event):
                    self._mark((number, key))
            except Exception as error:  # a subscriber's error would reach whoever wrote the object
                self._on_error(event.key, error)

    def _mark(self, item: _Item) -> None:
        if item in self._queued:
            return
        rest_until = self._rests.get(item)
        if rest_until is not None:
            if self._now_s() < rest_until:
                if item not in self._timers or self._timers[item][0] >= rest_until:
                    self._set_timer(item, rest_until)
                return
            del self._rests[item]
        self._queued.add(item)
        self._queue.append(item)

    def _set_timer(self, item: _Item, due: float) -> None:
        if item in self._timers and self._timers[item][0] == due:
            return
        self._cancel_timer(item)

        def ring() -> None:
            del self._timers[item]
            self._rests.pop(item, None)
            self._mark(item)
            self.run_pending()

        self._timers[item] = due, self._call_later(max(due - self._now_s(), 0.0), ring)

    def _cancel_timer(self, item: _Item) -> None:
        """Have an item ring no more. A timer that is only ignored would be kept until it is due, ten minutes for a Deployment."""
        if timer := self._timers.pop(item, None):
            timer[1].cancel()

    def _rest(self, item: _Item, until: float) -> None:
        self._rests[item] = until
        if len(self._rests) > self._most_rests:  # those of objects that are gone, and never asked about again
            now = self._now_s()
            self._rests = {item: until for item, until in self._rests.items() if until > now}
            self._most_rests = 2 * len(self._rests) + _FEW

    def _reconcile(self, item: _Item) -> None:
        number, key = item
        self._cancel_timer(item)
        began = self._now_s()
        try:
            again_in = self._controllers[number].reconcile(key, self._registry)
        except Exception as error:
            self._retry(item, error)
            return
        self._failures.pop(item, None)
        now = self._now_s()
        cost = now - began
        if cost > _CHEAP_S:
            rest_until = now + _REST_PER_WORK * cost
            self._rest(item, rest_until)
            if item in self._queued:  # its own writes made it dirty again; that can wait, too
                self._queue.remove(item)
                self._queued.discard(item)
                self._set_timer(item, rest_until)
                return
        if again_in is not None:
            self._set_timer(item, now + again_in)

    def _retry(self, item: _Item, error: Exception) -> None:
        if _namespace_is_going(error):
            self._failures.pop(item, None)
            return  # nothing can be created there any more, and nothing has to be
        failures = self._failures[item] = self._failures.get(item, 0) + 1
        if isinstance(error, ApiError) and error.reason == "Conflict" and failures <= _IMMEDIATE_RETRIES:
            self._mark(item)
            return
        self._on_error(item[1], error)
        self._set_timer(item, self._now_s() + min(_FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 20), _MAX_BACKOFF_S))


def _namespace_is_going(error: Exception) -> bool:
    return isinstance(error, ApiError) and any(cause.reason == "NamespaceTerminating" for cause in error.causes)
