"""Who belongs to whom, kept up to date from store events, so that no controller scans all objects of a kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from testbed.model.objects import Key, Object, labels_of, matches_labels, owner_uid
from testbed.registry import Registry
from testbed.store import Event, EventType


class _Buckets:
    """Objects by the facts that a function reads off them; an object is in one bucket per fact."""

    def __init__(self, facts: Callable[[Key, Object], Iterable[Hashable]]) -> None:
        self._facts = facts
        self._buckets: dict[Hashable, dict[Key, Object]] = {}

    def replace(self, key: Key, old: Object | None, new: Object | None) -> None:
        after = tuple(self._facts(key, new)) if new is not None else ()
        if old is not None:
            for fact in self._facts(key, old):
                if fact not in after:
                    bucket = self._buckets[fact]
                    del bucket[key]
                    if not bucket:
                        del self._buckets[fact]
        for fact in after:
            self._buckets.setdefault(fact, {})[key] = new  # type: ignore[assignment]  # after is empty without new

    def objects(self, fact: Hashable) -> list[Object]:
        """Return a bucket's objects, the one that came first at the head."""
        return list(self._buckets.get(fact, {}).values())

    def keys(self, fact: Hashable) -> list[Key]:
        return list(self._buckets.get(fact, {}))

    def count(self, fact: Hashable) -> int:
        return len(self._buckets.get(fact, ()))


class ClusterIndex:
    """Look-ups that several controllers share.

    It stands first among the controllers of a driver, because it learns of changes in the same way: through `keys`.
    """

    watches: frozenset[str] | None = None

    def __init__(self) -> None:
        self._uids: dict[str, Key] = {}
        self._owned = _Buckets(lambda key, obj: ((key.resource, owner_uid(obj)),))  # '': it has no controller
        self._orphans = _Buckets(lambda key, obj: () if owner_uid(obj) else ((key.resource, key.namespace),))
        self._dependents = _Buckets(_referenced_uids)
        self._labelled_pods = _Buckets(_label_facts)
        self._node_pods = _Buckets(_node_facts)
        self._selecting_services = _Buckets(_selector_facts)
        self._slices = _Buckets(_service_name_facts)
        self._in_namespace = _Buckets(lambda key, _obj: ((key.resource, key.namespace),))
        everything = (self._orphans, self._owned, self._dependents)
        self._by_resource: dict[str, tuple[_Buckets, ...]] = {
            "pods": (self._owned, self._orphans, self._dependents, self._labelled_pods, self._node_pods),
            "services": (self._dependents, self._selecting_services),
            "endpointslices.discovery.k8s.io": (self._dependents, self._slices),
            "deployments.apps": (self._dependents, self._in_namespace),
            "replicasets.apps": (*everything, self._in_namespace),
            "daemonsets.apps": (self._dependents, self._in_namespace),
            "jobs.batch": (self._dependents, self._in_namespace),
        }
        self._otherwise = (self._dependents,)

    # --- as a controller: it only takes notice ---

    def keys(self, event: Event) -> Iterable[Key]:
        """Take notice of a change. Nothing is ever to be reconciled."""
        obj = None if event.type is EventType.DELETED else event.object
        uid = str(event.object["metadata"]["uid"])
        if obj is None:
            self._uids.pop(uid, None)
        elif event.type is EventType.ADDED:
            self._uids[uid] = event.key
        if event.key.resource != "events":  # many, and no one's dependents
            for buckets in self._by_resource.get(event.key.resource, self._otherwise):
                buckets.replace(event.key, event.previous, obj)
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Do nothing: an index follows the store and changes nothing in it."""
        return None

    # --- look-ups ---

    def exists(self, uid: str) -> bool:
        return uid in self._uids

    def owned(self, resource: str, uid: str) -> list[Object]:
        """Return the objects whose controlling owner has this uid, oldest first."""
        return self._owned.objects((resource, uid))

    def orphans(self, resource: str, namespace: str) -> list[Object]:
        """Return the objects of a namespace that have no controlling owner, oldest first."""
        return self._orphans.objects((resource, namespace))

    def in_namespace(self, resource: str, namespace: str) -> list[Object]:
        """Return the Deployments, ReplicaSets, DaemonSets or Jobs of a namespace, oldest first."""
        return self._in_namespace.objects((resource, namespace))

    def dependents(self, uid: str) -> list[Key]:
        """Return what names this uid among its owners, controlling or not."""
        return self._dependents.keys(uid)

    def pods_labelled(self, namespace: str, selector: dict[str, str]) -> list[Object]:
        """Return the pods that an equality selector of at least one pair selects, oldest first."""
        facts = [(namespace, label, value) for label, value in selector.items()]
        rarest = min(facts, key=self._labelled_pods.count)
        return [pod for pod in self._labelled_pods.objects(rarest) if matches_labels(selector, labels_of(pod))]

    def pods_on(self, node: str) -> list[Object]:
        """Return the pods that are bound to a node and not finished."""
        return self._node_pods.objects((node, None))

    def count_pods_on(self, node: str, owner: str | None = None) -> int:
        """Return how many unfinished pods a node has, of one owner's uid or (None) of all."""
        return self._node_pods.count((node, owner))

    def services_selecting(self, pod: Object) -> list[Object]:
        """Return the Services of the pod's namespace whose selector matches its labels."""
        labels = labels_of(pod)
        namespace = pod["metadata"]["namespace"]
        return [
            service
            for pair in labels.items()
            for service in self._selecting_services.objects((namespace, *pair))
            if matches_labels(service["spec"]["selector"], labels)
        ]

    def slices_of(self, namespace: str, service: str) -> list[Object]:
        """Return the EndpointSlices that carry a Service's name, whoever wrote them."""
        return self._slices.objects((namespace, service))


def _referenced_uids(_key: Key, obj: Object) -> Iterable[Hashable]:
    return [str(ref.get("uid")) for ref in obj["metadata"].get("ownerReferences") or ()]


def _label_facts(key: Key, pod: Object) -> Iterable[Hashable]:
    return [(key.namespace, label, value) for label, value in labels_of(pod).items()]


def _node_facts(_key: Key, pod: Object) -> Iterable[Hashable]:
    node = pod.get("spec", {}).get("nodeName")
    if not node or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return ()
    return ((node, None), (node, owner_uid(pod)))


def _selector_facts(key: Key, service: Object) -> Iterable[Hashable]:
    # One pair is enough to be found by: a pod that lacks it is not selected.
    selector = service.get("spec", {}).get("selector")
    return ((key.namespace, *min(selector.items())),) if selector else ()


def _service_name_facts(key: Key, endpoint_slice: Object) -> Iterable[Hashable]:
    service = labels_of(endpoint_slice).get("kubernetes.io/service-name")
    return ((key.namespace, service),) if service else ()
