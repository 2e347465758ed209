"""Which groups, versions and resources there are, as API discovery tells it. All of it follows from the resource table."""

from __future__ import annotations

from testbed.model.objects import Object, Resource, ResourceTable

#: We validate, default and print as 1.30 does; the suffix keeps anybody from taking a lab for a cluster.
VERSION: Object = {
    "major": "1",
    "minor": "30",
    "gitVersion": "v1.30.0+testbed",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_SUBRESOURCE_VERBS = {
    "status": ["get", "patch", "update"],
    "scale": ["get", "patch", "update"],
    "finalize": ["update"],
    "binding": ["create"],
    "eviction": ["create"],
    "token": ["create"],
    "log": ["get"],
    "exec": ["create", "get"],
    "attach": ["create", "get"],
    "portforward": ["create", "get"],
}
#: Subresource -> group, version and kind of what is sent to it, where that is not the object itself.
_SUBRESOURCE_KINDS = {
    "scale": ("autoscaling", "v1", "Scale"),
    "eviction": ("policy", "v1", "Eviction"),
    "token": ("authentication.k8s.io", "v1", "TokenRequest"),
    "binding": ("", "v1", "Binding"),
    "exec": ("", "v1", "PodExecOptions"),
    "attach": ("", "v1", "PodAttachOptions"),
    "portforward": ("", "v1", "PodPortForwardOptions"),
}
#: Resources that answer a POST and store nothing: group, version, plural, kind, whether they are in a namespace.
REVIEWS: tuple[tuple[str, str, str, str, bool], ...] = (
    ("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", False),
    ("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", False),
    ("authorization.k8s.io", "v1", "localsubjectaccessreviews", "LocalSubjectAccessReview", True),
    ("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False),
    ("authorization.k8s.io", "v1", "selfsubjectrulesreviews", "SelfSubjectRulesReview", False),
    ("authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", False),
)
_AGGREGATED = ("apidiscovery.k8s.io/v2", "apidiscovery.k8s.io/v2beta1")


def core_versions() -> Object:
    """Return the answer to /api."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def _groups(table: ResourceTable) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for resource in table.all():
        if resource.group and resource.version not in groups.setdefault(resource.group, []):
            groups[resource.group].append(resource.version)
    for group, version, *_ in REVIEWS:
        if version not in groups.setdefault(group, []):
            groups[group].append(version)
    return groups


def _group(name: str, versions: list[str]) -> Object:
    served = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": served, "preferredVersion": served[0]}


def api_groups(table: ResourceTable) -> Object:
    """Return the answer to /apis."""
    groups = [_group(name, versions) for name, versions in _groups(table).items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_group(table: ResourceTable, name: str) -> Object | None:
    """Return the answer to /apis/GROUP, or None."""
    versions = _groups(table).get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def group_resources(table: ResourceTable, group: str, version: str) -> Object | None:
    """Return the answer to /api/v1 (group '') or /apis/GROUP/VERSION, or None."""
    if version not in (_groups(table).get(group, []) if group else ["v1"]):
        return None
    entries: list[Object] = []
    for resource in table.all():
        if (resource.group, resource.version) == (group, version):
            entries += _entries(resource)
    entries += [
        {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": ["create"]}
        for its_group, its_version, plural, kind, namespaced in REVIEWS
        if (its_group, its_version) == (group, version)
    ]
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}


def _verbs(resource: Resource) -> list[str]:
    return [verb for verb in _VERBS if verb != "deletecollection" or resource.key != "namespaces"]


def _entries(resource: Resource) -> list[Object]:
    main: Object = {
        "name": resource.plural,
        "singularName": resource.singular_name,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": _verbs(resource),
    }
    if resource.short_names:
        main["shortNames"] = list(resource.short_names)
    if resource.categories:
        main["categories"] = list(resource.categories)
    entries = [main]
    for subresource in resource.subresources:
        entry: Object = {
            "name": f"{resource.plural}/{subresource}",
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": _SUBRESOURCE_KINDS.get(subresource, ("", "", resource.kind))[2],
            "verbs": _SUBRESOURCE_VERBS[subresource],
        }
        group, version, _ = _SUBRESOURCE_KINDS.get(subresource, ("", "", ""))
        if group:
            entry |= {"group": group, "version": version}
        entries.append(entry)
    return entries


def aggregated(table: ResourceTable, path: str, api_version: str) -> Object:
    """Return the answer to /api or /apis for clients that want all of it at once; ``path`` is ``api`` or ``apis``."""
    groups = {"": ["v1"]} if path == "api" else _groups(table)
    items = []
    for group, versions in groups.items():
        described = []
        for version in versions:
            found = group_resources(table, group, version)
            entries = found["resources"] if found else []
            resources = [_aggregated(one, group, version, entries) for one in entries if "/" not in one["name"]]
            described.append({"version": version, "resources": resources, "freshness": "Current"})
        items.append({"metadata": {"name": group, "creationTimestamp": None}, "versions": described})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": api_version, "metadata": {}, "items": items}


def _aggregated(entry: Object, group: str, version: str, entries: list[Object]) -> Object:
    def kind(of: Object) -> Object:
        return {"group": of.get("group", group), "version": of.get("version", version), "kind": of["kind"]}

    described: Object = {
        "resource": entry["name"],
        "responseKind": kind(entry),
        "scope": "Namespaced" if entry["namespaced"] else "Cluster",
        "singularResource": entry["singularName"],
        "verbs": entry["verbs"],
        **{field: entry[field] for field in ("shortNames", "categories") if field in entry},
    }
    prefix = f"{entry['name']}/"
    subresources = [
        {"subresource": one["name"].removeprefix(prefix), "responseKind": kind(one), "verbs": one["verbs"]}
        for one in entries
        if one["name"].startswith(prefix)
    ]
    return {**described, "subresources": subresources} if subresources else described


def aggregated_version(accept: str) -> str | None:
    """Return the apiVersion of aggregated discovery that an Accept header asks for first, or None for the plain form."""
    for entry in accept.split(","):
        media_type, *parameters = [part.strip() for part in entry.split(";")]
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        if media_type != "application/json" and "json" in media_type:
            continue
        if given.get("as") == "APIGroupDiscoveryList" and media_type == "application/json":
            asked = f"{given.get('g')}/{given.get('v')}"
            if asked in _AGGREGATED:
                return asked
        elif media_type in ("application/json", "*/*", "application/*"):
            return None
    return None
