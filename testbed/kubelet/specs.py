"""A pod's specification as requests to the runtime. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from testbed.kubelet.environment import Find, MissingReference, container_environment, expand, skipped_variables
from testbed.kubelet.runtime import ContainerSpec, SandboxSpec, Volume
from testbed.kubelet.texts import hosts_file, resolv_conf
from testbed.kubelet.volumes import mounts_of
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, name_of, namespace_of
from testbed.programs.catalogue import Catalogue, PodInfo, stands_in


class RefusedContainer(LookupError):
    """A container that the kubelet does not start: ``CreateContainerConfigError`` and this message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a container: the request, and what the kubelet must know of the image."""

    spec: ContainerSpec
    stop_signal: signal.Signals
    is_stand_in: bool
    skipped: tuple[str, ...] = ()  # a message for each envFrom with keys that no variable can be called


def sandbox_spec(
    pod: Object, *, node: str, hostname: str, address: IPv4Address, pod_cidr: IPv4Network, volumes: tuple[Volume, ...],
    cluster: ClusterConfig, node_resolv_conf: str,
) -> SandboxSpec:  # fmt: skip
    """Return the request for a pod's sandbox; ``address`` is the node's for hostNetwork."""
    on_host = bool(pod["spec"].get("hostNetwork"))
    return SandboxSpec(
        pod_uid=pod["metadata"]["uid"],
        namespace=namespace_of(pod),
        pod_name=name_of(pod),
        node=node,
        hostname=hostname,
        address=None if on_host else address,
        network=None if on_host else pod_cidr,
        etc_files={
            "hosts": hosts_file(pod, hostname, address, cluster.domain),
            "hostname": f"{hostname}\n",
            "resolv.conf": resolv_conf(pod, cluster, node_resolv_conf),
        },
        volumes=volumes,
    )


def container_start(
    pod: Object, container: Mapping[str, Any], catalogue: Catalogue, *, container_id: str, find: Find,
    services: Mapping[str, str], pod_ip: str, host_ip: str,
) -> Start:  # fmt: skip
    """Return one start of a container.

    Raises:
        RefusedContainer: a ConfigMap or Secret for its environment is missing, there is no command to run, or it must
            not run as root and would.
        InvalidImageName: the image reference cannot be read.
    """
    image = catalogue.lookup(container["image"])
    try:
        env = container_environment(
            container, pod, find=find, base={**services, **image.env}, pod_ip=pod_ip, host_ip=host_ip
        )
    except MissingReference as error:
        raise RefusedContainer(str(error)) from error
    identity = PodInfo(
        namespace=namespace_of(pod),
        pod=name_of(pod),
        node=pod["spec"].get("nodeName", ""),
        address=pod_ip,
        ports=tuple((port.get("protocol", "TCP"), port["containerPort"]) for port in container.get("ports") or ()),
    )
    command = [expand(word, env) for word in container.get("command") or ()]
    arguments = [expand(word, env) for word in container.get("args") or ()]
    program = catalogue.program(image, container["image"], command, arguments, identity)
    if not program.argv and not program.builtin:
        raise RefusedContainer("no command specified")
    security = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    uid = int(security.get("runAsUser", image.uid))
    if security.get("runAsNonRoot") and uid == 0:
        raise RefusedContainer("container has runAsNonRoot and image will run as root")
    groups = [*(security.get("supplementalGroups") or ()), *([security["fsGroup"]] if "fsGroup" in security else ())]
    capabilities = security.get("capabilities") or {}
    spec = ContainerSpec(
        container_id=container_id,
        pod_uid=pod["metadata"]["uid"],
        name=container["name"],
        argv=tuple(program.argv),
        builtin=program.builtin,
        builtin_args=program.builtin_args,
        env=env,
        cwd=container.get("workingDir") or image.cwd,
        uid=uid,
        gid=int(security.get("runAsGroup", 0)),
        groups=tuple(int(group) for group in groups),
        add_capabilities=_names(capabilities.get("add")),
        drop_capabilities=_names(capabilities.get("drop")),
        privileged=bool(security.get("privileged")),
        files=image.files(identity),
        own_folders=image.own_folders,
        file_capabilities=image.file_capabilities,
        mounts=mounts_of(container),
        stdin=bool(container.get("stdin")),
        tty=bool(container.get("tty")),
    )
    return Start(
        spec=spec,
        stop_signal=signal.Signals[image.stop_signal],
        is_stand_in=stands_in(image, program),
        skipped=tuple(skipped_variables(container, namespace_of(pod), find=find)),
    )


def _names(capabilities: list[str] | None) -> tuple[str, ...]:
    return tuple(name.upper().removeprefix("CAP_") for name in capabilities or ())


def not_honoured(pod: Object, container: Mapping[str, Any]) -> list[str]:
    """Return the fields of a container that ask for something which nothing here provides."""
    security = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    fields = [
        f"securityContext.{name}"
        for name in ("readOnlyRootFilesystem", "seLinuxOptions", "seccompProfile", "appArmorProfile", "procMount")
        if security.get(name)
    ]
    limits = (container.get("resources") or {}).get("limits")
    if limits:
        fields.append("resources.limits")
    if (container.get("livenessProbe") or {}).get("grpc") or (container.get("readinessProbe") or {}).get("grpc"):
        fields.append("grpc probes")
    return fields
