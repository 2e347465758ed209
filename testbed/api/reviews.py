"""Reviews: resources that answer a question and store nothing. Everybody who is somebody may do everything."""

from __future__ import annotations

from testbed.api.access import User
from testbed.api.discovery import REVIEWS
from testbed.model.objects import Object
from testbed.registry.errors import bad_request

_WHY = "a lab has no RBAC: whoever has credentials may do everything"


def review_kind(path: str) -> str | None:
    """Return the kind of a review's URL path, or None."""
    parts = path.strip("/").split("/")
    if len(parts) == 6 and parts[3] == "namespaces":
        parts = [*parts[:3], parts[5]]
    if len(parts) != 4 or parts[0] != "apis":
        return None
    return next((kind for group, version, plural, kind, _ in REVIEWS if [group, version, plural] == parts[1:]), None)


def answer(kind: str, review: Object, user: User, owner_of: dict[str, User]) -> Object:
    """Return a review with its status. ``owner_of`` has the owner of a TokenReview's token, when there is one."""
    spec = review.get("spec") or {}
    if not isinstance(spec, dict):
        raise bad_request("spec is not a JSON object")
    status: Object
    match kind:
        case "SelfSubjectReview":
            status = {"userInfo": _user_info(user)}
        case "TokenReview":
            owner = owner_of.get(str(spec.get("token", "")))
            status = {"authenticated": True, "user": _user_info(owner)} if owner else {"error": "invalid bearer token"}
        case "SelfSubjectRulesReview":
            rule = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
            status = {
                "resourceRules": [rule],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                "incomplete": False,
            }
        case _:
            status = {"allowed": True, "reason": _WHY}
    return {**review, "metadata": review.get("metadata") or {"creationTimestamp": None}, "status": status}


def _user_info(user: User) -> Object:
    return {"username": user.name, "groups": list(user.groups), **({"uid": user.uid} if user.uid else {})}
