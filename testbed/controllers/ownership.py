"""Which objects a controller may call its own: adopted by selector, kept by owner reference, released by label.

Source: kubernetes pkg/controller/controller_ref_manager.go (v1.30).
"""

from __future__ import annotations

from testbed.controllers.index import ClusterIndex
from testbed.controllers.pods import controller_reference, is_finished
from testbed.model.objects import Object, is_terminating, labels_of, owner_uid
from testbed.registry import Registry


def matches_selector(selector: Object | None, labels: dict[str, str]) -> bool:
    """Say whether a LabelSelector selects labels. None selects nothing, an empty one everything."""
    if selector is None:
        return False
    if any(labels.get(label) != value for label, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_meets(term, labels) for term in selector.get("matchExpressions") or ())


def _meets(term: Object, labels: dict[str, str]) -> bool:
    label, operator = term["key"], term["operator"]
    values: list[str] = term.get("values") or []
    if operator == "In":
        return labels.get(label) in values
    if operator == "NotIn":
        return labels.get(label) not in values
    return bool((label in labels) == (operator == "Exists"))


def claim(registry: Registry, index: ClusterIndex, owner: Object, resource: str) -> list[Object]:
    """Return the objects that ``owner`` controls, oldest first, after adopting and releasing what its selector says."""
    selector = owner["spec"].get("selector")
    kept: list[Object] = []
    for obj in index.owned(resource, owner["metadata"]["uid"]):
        if is_terminating(obj) or matches_selector(selector, labels_of(obj)):
            kept.append(obj)
        else:
            _set_owner(registry, resource, obj, None, owner["metadata"]["uid"])
    if is_terminating(owner):
        return kept
    for obj in index.orphans(resource, owner["metadata"]["namespace"]):
        adoptable = not is_terminating(obj) and not (resource == "pods" and is_finished(obj))
        if adoptable and matches_selector(selector, labels_of(obj)):
            kept.append(_set_owner(registry, resource, obj, owner, owner["metadata"]["uid"]))
    return kept


def owner_in(owners: list[Object], uid: str) -> Object | None:
    return next((owner for owner in owners if owner["metadata"]["uid"] == uid), None)


def possible_owners(owners: list[Object], obj: Object) -> list[Object]:
    """Return the owner of an object if it is among ``owners``, or all that would adopt it if it has none."""
    uid = owner_uid(obj)
    if uid:
        return [owner for owner in owners if owner["metadata"]["uid"] == uid]
    return [owner for owner in owners if matches_selector(owner["spec"].get("selector"), labels_of(obj))]


def _set_owner(registry: Registry, resource: str, obj: Object, owner: Object | None, uid: str) -> Object:
    metadata = obj["metadata"]
    references = [ref for ref in metadata.get("ownerReferences") or () if ref.get("uid") != uid]
    if owner is not None:
        references.append(controller_reference(owner))
    return registry.update(resource, {**obj, "metadata": {**metadata, "ownerReferences": references}})
