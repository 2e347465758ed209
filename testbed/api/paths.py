"""What a URL names.

::

    /api/v1/namespaces/NS/services/NAME/status       /apis/GROUP/VERSION/…
    └─ discovery    └────── Target ──────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from testbed.model.objects import Object, Resource, ResourceTable

_BUILT_IN = ResourceTable()


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL names. ``namespace`` is None when none is given; ``name`` and ``subresource`` may be empty."""

    resource: Resource
    namespace: str | None
    name: str
    subresource: str

    @property
    def space(self) -> str:
        return self.namespace or ""

    def described(self) -> Object:
        """Return what the authorizer's refusals say of it."""
        plural = self.resource.plural + (f"/{self.subresource}" if self.subresource else "")
        key = f"{plural}.{self.resource.group}" if self.resource.group else plural
        return {
            "key": key, "resource": plural, "group": self.resource.group, "namespace": self.space, "name": self.name,
        }  # fmt: skip


def parse_path(raw_path: str, resources: ResourceTable = _BUILT_IN) -> Target | None:
    """Return what ``/api/v1/…`` or ``/apis/GROUP/VERSION/…`` names, or None.

    Segments are split before they are unquoted, so an encoded slash stays part of a name (and is refused as such).
    """
    segments = [unquote(segment) for segment in raw_path.strip("/").split("/")]
    if segments[:2] == ["api", "v1"]:
        group, version, rest = "", "v1", segments[2:]
    elif segments[0] == "apis" and len(segments) > 3:
        group, version, rest = segments[1], segments[2], segments[3:]
    else:
        return None
    namespace = None
    # /namespaces/NAME and /namespaces/NAME/status are a Namespace; /namespaces/NAME/OTHER is something in it.
    if len(rest) >= 3 and rest[0] == "namespaces" and not (group == "" and rest[2] in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    if not 1 <= len(rest) <= 3 or not all(rest):
        return None
    plural, name, subresource = (*rest, "", "")[:3]
    resource = resources.find(group, version, plural)
    if resource is None or (namespace is not None and not resource.namespaced):
        return None
    if subresource and subresource not in resource.subresources:
        return None
    if name and resource.namespaced and namespace is None:
        return None
    return Target(resource, namespace, name, subresource)


#: HTTP method -> verb of one object and of a collection, as RBAC calls them.
_VERBS = {"GET": ("get", "list"), "HEAD": ("get", "list"), "POST": ("create", "create"), "PUT": ("update", "update"),
          "PATCH": ("patch", "patch"), "DELETE": ("delete", "deletecollection")}  # fmt: skip


def verb_of(method: str, target: Target | None, *, is_watch: bool) -> str:
    """Return what a request wants to do, as RBAC calls it."""
    if target is None:
        return method.lower()
    one, many = _VERBS.get(method, (method.lower(), method.lower()))
    if target.name:
        return one
    return "watch" if is_watch and many == "list" else many
