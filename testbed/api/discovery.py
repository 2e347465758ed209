"""Which groups, versions and resources there are, as API discovery tells it. All of it follows from the resource table."""

from __future__ import annotations

from testbed.model.objects import RESOURCES, Object, Resource

#: We validate and default as 1.30 does; the suffix keeps anybody from taking a lab for a cluster.
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


def core_versions() -> Object:
    """Return the answer to /api."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for resource in RESOURCES:
        if resource.group and resource.version not in groups.setdefault(resource.group, []):
            groups[resource.group].append(resource.version)
    return groups


def _group(name: str, versions: list[str]) -> Object:
    served = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": served, "preferredVersion": served[0]}


def api_groups() -> Object:
    """Return the answer to /apis."""
    groups = [_group(name, versions) for name, versions in _groups().items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_group(name: str) -> Object | None:
    """Return the answer to /apis/GROUP, or None."""
    versions = _groups().get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def api_resources() -> Object:
    """Return the answer to /api/v1."""
    return _resource_list("v1", [resource for resource in RESOURCES if not resource.group])


def group_resources(group: str, version: str) -> Object | None:
    """Return the answer to /apis/GROUP/VERSION, or None."""
    chosen = [resource for resource in RESOURCES if (resource.group, resource.version) == (group, version)]
    return _resource_list(f"{group}/{version}", chosen) if group and chosen else None


def _resource_list(group_version: str, resources: list[Resource]) -> Object:
    entries: list[Object] = []
    for resource in resources:
        entries += _entries(resource)
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}


def _entries(resource: Resource) -> list[Object]:
    main: Object = {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": [verb for verb in _VERBS if verb != "deletecollection" or resource.key != "namespaces"],
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
            "kind": {"scale": "Scale", "binding": "Binding", "exec": "PodExecOptions"}.get(subresource, resource.kind),
            "verbs": _SUBRESOURCE_VERBS[subresource],
        }
        if subresource == "scale":
            entry |= {"group": "autoscaling", "version": "v1"}
        entries.append(entry)
    return entries
