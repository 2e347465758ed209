"""Leader election by a Lease, so that of several controllers one acts.

Source: client-go tools/leaderelection; controller-runtime's defaults: a lease lasts 15 s and is renewed every 2 s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

from testbed.errors import ApiError, TestbedError
from testbed.model.objects import Object

LEASES: Final = "leases.coordination.k8s.io"
_LASTS_S: Final = 15
_RENEW_EVERY_S: Final = 2.0
_RENEW_WITHIN_S: Final = 10.0


class LeaseApi(Protocol):
    """What is needed of `testbed.api.client.ApiClient`."""

    def get(self, resource: str, namespace: str, name: str) -> Object: ...

    def create(self, obj: Object) -> Object: ...

    def update(self, obj: Object, *, subresource: str = "") -> Object: ...


class Leadership:
    """Whether this process leads. Who is identity's own holder already goes on at once: a container that was started again."""

    def __init__(
        self, api: LeaseApi, namespace: str, name: str, identity: str, log: Callable[[str], None],
        *, lasts_s: int = _LASTS_S,
    ) -> None:  # fmt: skip
        self._api = api
        self._namespace = namespace
        self._name = name
        self._lasts_s = lasts_s
        self._identity = identity
        self._log = log
        self.is_leader = threading.Event()
        self._seen: tuple[str, float] = ("", 0.0)  # of the other's lease: its renewTime, and when we saw it first
        self._renewed_s = 0.0
        self._released = False
        self._lock = threading.Lock()  # of the lease: a renewal must not take it again while it is given back

    def start(self) -> None:
        """Try to lead, for ever, from a thread of its own."""
        threading.Thread(target=self._run, name="leader-election", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.try_once(time.monotonic())
            time.sleep(_RENEW_EVERY_S if self.is_leader.is_set() else _RENEW_EVERY_S / 4)

    def try_once(self, now_s: float) -> None:
        """Take or renew the lease if that is possible."""
        with self._lock:
            if not self._released:
                self._try(now_s)

    def _try(self, now_s: float) -> None:
        try:
            leads = self._take(now_s)
        except (TestbedError, OSError) as error:
            leads = self.is_leader.is_set() and now_s - self._renewed_s < _RENEW_WITHIN_S
            if not isinstance(error, ApiError) or error.code not in (404, 409):
                self._log(f"lease {self._namespace}/{self._name}: {error}")
        else:
            self._renewed_s = now_s if leads else self._renewed_s
        if leads and not self.is_leader.is_set():
            self._log(f"successfully acquired lease {self._namespace}/{self._name}")
            self.is_leader.set()
        elif not leads and self.is_leader.is_set():
            self._log(f"lost lease {self._namespace}/{self._name}")
            self.is_leader.clear()

    def _take(self, now_s: float) -> bool:
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        try:
            lease = self._api.get(LEASES, self._namespace, self._name)
        except ApiError as error:
            if error.code != 404:
                raise
            spec = self._spec(moment, moment, 0)
            metadata = {"name": self._name, "namespace": self._namespace}
            self._api.create(
                {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            )
            return True
        spec = lease.get("spec") or {}
        holder, renewed = spec.get("holderIdentity") or "", str(spec.get("renewTime") or "")
        if holder not in ("", self._identity):
            if renewed != self._seen[0]:
                self._seen = (renewed, now_s)
            if now_s - self._seen[1] < float(spec.get("leaseDurationSeconds") or self._lasts_s):
                return False
        changes = int(spec.get("leaseTransitions") or 0) + (holder != self._identity)
        began = spec.get("acquireTime", moment) if holder == self._identity else moment
        self._api.update(
            {
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **lease,
                "spec": self._spec(moment, began, changes),
            }
        )  # fmt: skip
        return True

    def _spec(self, moment: str, began: str, changes: int) -> Object:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._lasts_s,
            "acquireTime": began,
            "renewTime": moment,
            "leaseTransitions": changes,
        }

    def release(self) -> None:
        """Give the lease back, so that the next one need not wait for its end, and leave it to others from now on."""
        with self._lock:
            self._released = True
            if self.is_leader.is_set():
                self._give_back()

    def _give_back(self) -> None:
        try:
            lease = self._api.get(LEASES, self._namespace, self._name)
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                self._api.update(
                    {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **lease, "spec": spec}
                )  # fmt: skip
        except (TestbedError, OSError):
            return  # the namespace may be going
