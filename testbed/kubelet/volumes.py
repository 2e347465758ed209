"""A pod's volumes as the runtime makes them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from testbed.errors import ApiError
from testbed.kubelet.environment import Find, MissingReference, data_of, downward_value
from testbed.kubelet.runtime import Mount, Volume
from testbed.model.objects import Object

_KNOWN = ("configMap", "secret", "emptyDir", "hostPath", "downwardAPI", "projected")

_DEFAULT_MODE = 0o644  # ConfigMapVolumeSourceDefaultMode, and the others'


class UnsupportedVolume(LookupError):
    """A kind of volume that nothing here can make; the message names volume and kind."""


#: Returns a token with which a pod may speak to the API.
TokenOf = Callable[[Object], str]


def volumes_of(
    pod: Object, *, find: Find, pod_ip: str, host_ip: str, token_of: TokenOf | None = None
) -> tuple[Volume, ...]:
    """Return the volumes of a pod with their files. Without ``token_of``, projected volumes have no token in them.

    Raises:
        MissingReference: a ConfigMap, Secret or ServiceAccount is not there (yet); the message is what the kubelet's event says.
        UnsupportedVolume: e.g. a persistentVolumeClaim.
    """
    return tuple(_volume(volume, pod, find, pod_ip, host_ip, token_of) for volume in pod["spec"].get("volumes") or ())


def _volume(
    volume: Mapping[str, Any], pod: Object, find: Find, pod_ip: str, host_ip: str, token_of: TokenOf | None
) -> Volume:
    name = volume["name"]
    kind = next((kind for kind in _KNOWN if volume.get(kind) is not None), "")
    if kind == "hostPath":
        return Volume(name=name, host_path=volume["hostPath"]["path"], host_type=volume["hostPath"].get("type", ""))
    others = [field for field in volume if field != "name"]
    if kind == "emptyDir" or not others:
        return Volume(name=name)
    if not kind:
        raise UnsupportedVolume(f'volume "{name}": {others[0]} volumes are not supported here')
    try:
        return Volume(
            name=name,
            files=source_files(kind, volume[kind], pod, find, pod_ip, host_ip, token_of),
            default_mode=volume[kind].get("defaultMode", _DEFAULT_MODE),
            modes=_modes(volume[kind]),
            group=(pod["spec"].get("securityContext") or {}).get("fsGroup"),
        )
    except MissingReference as error:
        raise MissingReference(f'MountVolume.SetUp failed for volume "{name}" : {error}') from error


def _modes(source: Mapping[str, Any]) -> dict[str, int]:
    """Return the modes that single files ask for, by relative path."""
    parts = [inner for part in source.get("sources") or () for inner in part.values()] or [source]
    items = [item for part in parts for item in part.get("items") or ()]
    return {item["path"]: item["mode"] for item in items if item.get("mode") is not None}


def source_files(
    kind: str, source: Mapping[str, Any], pod: Object, find: Find, pod_ip: str, host_ip: str,
    token_of: TokenOf | None = None,
) -> dict[str, str]:  # fmt: skip
    """Return relative path -> text of one volume source (also of each part of a projected one)."""
    if kind == "projected":
        files: dict[str, str] = {}
        for part in source.get("sources") or ():
            for inner, value in part.items():
                if inner == "serviceAccountToken" and token_of is not None:
                    try:
                        files[value["path"]] = token_of(pod)
                    except ApiError as error:  # the account goes before its pods when their namespace is deleted
                        raise MissingReference(f"failed to fetch token: {error.message}") from error
                if inner in ("configMap", "secret", "downwardAPI"):
                    files |= source_files(inner, value, pod, find, pod_ip, host_ip)
        return files
    if kind == "downwardAPI":
        return {
            item["path"]: downward_value(item["fieldRef"]["fieldPath"], pod, pod_ip=pod_ip, host_ip=host_ip)
            for item in source.get("items") or ()
            if "fieldRef" in item
        }
    resource = "configmaps" if kind == "configMap" else "secrets"
    name = source.get("name") or source.get("secretName") or ""
    optional = bool(source.get("optional"))
    data = data_of(find, resource, name, optional=optional)
    items = source.get("items")
    if not items:
        return dict(data)
    missing = [item["key"] for item in items if item["key"] not in data]
    if missing and not optional:
        kind_name = "configmap" if kind == "configMap" else "secret"
        raise MissingReference(f"{kind_name} references non-existent config key: {missing[0]}")
    return {item["path"]: data[item["key"]] for item in items if item["key"] in data}


def mounts_of(container: Mapping[str, Any]) -> tuple[Mount, ...]:
    return tuple(
        Mount(
            volume=mount["name"],
            path=mount["mountPath"],
            sub_path=mount.get("subPath") or "",
            read_only=bool(mount.get("readOnly")),
        )
        for mount in container.get("volumeMounts") or ()
    )


def live_sources(pod: Object) -> tuple[tuple[str, str], ...]:
    """Return (resource, name) of every ConfigMap and Secret that a pod mounts: what its files follow."""
    found = []
    for volume in pod["spec"].get("volumes") or ():
        parts = (volume.get("projected") or {}).get("sources") or [volume]
        for part in parts:
            for kind, resource in (("configMap", "configmaps"), ("secret", "secrets")):
                source = part.get(kind)
                if source:
                    found.append((resource, source.get("name") or source.get("secretName") or ""))
    return tuple(dict.fromkeys(found))
