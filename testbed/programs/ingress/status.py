"""Writes the controller's address into the Ingresses, while this replica leads.

Upstream does so once a minute; here it follows within a second, so that nobody waits to see it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from testbed.dataplane.ingress.settings import Options
from testbed.dataplane.ingress.status import Address, needs_nodes, published_addresses
from testbed.dataplane.ingress.world import INGRESSES, Name
from testbed.errors import ApiError, TestbedError
from testbed.model.objects import Object, labels_of
from testbed.programs.lease import LeaseApi

_EVERY_S: Final = 0.5
#: Labels that differ between replicas of one workload, or between its generations.
_VARYING_LABELS: Final = ("pod-template-hash", "controller-revision-hash", "pod-template-generation")


class StatusApi(LeaseApi, Protocol):
    """What is needed of `testbed.api.client.ApiClient`."""

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]: ...

    def patch(
        self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = ""
    ) -> Object: ...  # fmt: skip


class StatusPublisher:
    """Keeps the status of this controller's Ingresses.

    Args:
        pod: namespace and name of the pod it runs in.
        see: returns our Ingresses, all Ingresses, and all Services, as of now.
    """

    def __init__(
        self, api: StatusApi, options: Options, pod: Name, is_leader: threading.Event,
        see: Callable[[], tuple[Mapping[Name, Object], Mapping[Name, Object], Mapping[Name, Object]]],
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._api = api
        self._options = options
        self._pod = pod
        self._is_leader = is_leader
        self._see = see
        self._log = log
        self._written: dict[Name, list[Address]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Publish for ever, from a thread of its own."""
        threading.Thread(target=self._run, name="status", daemon=True).start()

    def _run(self) -> None:
        while True:
            if self._is_leader.is_set():
                self.publish_once()
            time.sleep(_EVERY_S)

    def publish_once(self) -> None:
        """Write what differs; one Ingress that cannot be written does not hold up the others."""
        with self._lock:
            if self._stopped:
                return
            ours, every, services = self._see()
            try:
                addresses = self._addresses(services)
            except (TestbedError, OSError) as error:
                self._log(f"finding the addresses to publish: {error}")
                return
            for name, ingress in ours.items():
                self._write(name, ingress, addresses)
            for name in [name for name in self._written if name not in ours]:
                # Somebody else's now, or nobody's: what we wrote goes, unless another has written since.
                written = self._written.pop(name)
                left = every.get(name)
                if left is not None and written and _shown(left) == written:
                    self._write(name, left, [])
                    self._written.pop(name, None)

    def _addresses(self, services: Mapping[Name, Object]) -> list[Address]:
        if not needs_nodes(self._options):
            return published_addresses(self._options, services)
        return published_addresses(self._options, services, self._replicas(), self._api.list("nodes")[0])

    def _replicas(self) -> list[Object]:
        namespace, name = self._pod
        own = self._api.get("pods", namespace, name)
        labels = {key: value for key, value in labels_of(own).items() if key not in _VARYING_LABELS}
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        return self._api.list("pods", namespace, label_selector=selector)[0] if selector else [own]

    def _write(self, name: Name, ingress: Object, addresses: list[Address]) -> None:
        if _shown(ingress) == addresses or (not addresses and not _shown(ingress)):
            self._written[name] = addresses
            return
        patch: dict[str, Any] = {"status": {"loadBalancer": {"ingress": addresses or None}}}
        try:
            self._api.patch(INGRESSES, *name, patch, subresource="status")
            self._written[name] = addresses
        except (TestbedError, OSError) as error:
            if not isinstance(error, ApiError) or error.code not in (404, 409):
                self._log(f"status of ingress {name[0]}/{name[1]}: {error}")

    def stop(self) -> None:
        """Clear the addresses when no other replica is left to serve; somebody who leads no longer writes nothing."""
        with self._lock:
            self._stopped = True
            if not self._is_leader.is_set() or not self._options.update_status_on_shutdown:
                return
            try:
                others = [
                    pod
                    for pod in self._replicas()
                    if pod["metadata"]["name"] != self._pod[1]
                    and "deletionTimestamp" not in pod["metadata"]
                    and (pod.get("status") or {}).get("phase") == "Running"
                ]
                if others:
                    return
            except (TestbedError, OSError) as error:
                self._log(f"looking for other replicas: {error}")
                return
            ours, _, _ = self._see()
            for name, ingress in ours.items():
                self._write(name, ingress, [])


def _shown(ingress: Object) -> list[Address]:
    found: list[Address] = ((ingress.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return found
