"""A pod's specification as requests to the runtime. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from testbed.kubelet.environment import Find, MissingReference, container_environment, expand
from testbed.kubelet.runtime import ContainerSpec, SandboxSpec, Volume
from testbed.kubelet.texts import hosts_file, resolv_conf
from testbed.kubelet.volumes import mounts_of
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, name_of, namespace_of
from testbed.programs.catalogue import Image, PodIdentity, Program, program_of

_ALL_CAPABILITIES = "ALL"


class RefusedContainer(LookupError):
    """A container that the kubelet does not start: ``CreateContainerConfigError`` and this message."""


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


def container_spec(
    pod: Object, container: Mapping[str, Any], image: Image, *, container_id: str, find: Find,
    services: Mapping[str, str], pod_ip: str, host_ip: str,
) -> tuple[ContainerSpec, Program]:  # fmt: skip
    """Return the request for one start of a container, and the program it runs.

    Raises:
        RefusedContainer: a ConfigMap or Secret for its environment is missing, or it must not run as root and would.
    """
    try:
        env = container_environment(
            container, pod, find=find, base={**services, **image.env}, pod_ip=pod_ip, host_ip=host_ip
        )
    except MissingReference as error:
        raise RefusedContainer(str(error)) from error
    identity = PodIdentity(
        namespace=namespace_of(pod),
        pod=name_of(pod),
        node=pod["spec"].get("nodeName", ""),
        pod_ip=pod_ip,
        container=container["name"],
    )
    command = [expand(word, env) for word in container.get("command") or ()]
    arguments = [expand(word, env) for word in container.get("args") or ()]
    program = program_of(image, dict(container), identity, command, arguments)
    security = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    uid = int(security.get("runAsUser", program.uid))
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
        cwd=container.get("workingDir") or program.cwd,
        uid=uid,
        gid=int(security.get("runAsGroup", 0)),
        groups=tuple(int(group) for group in groups),
        add_capabilities=_names(capabilities.get("add")),
        drop_capabilities=_names(capabilities.get("drop")),
        privileged=bool(security.get("privileged")),
        files=program.files,
        mounts=mounts_of(container),
    )
    return spec, program


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
