"""The Node object that a kubelet registers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from testbed.model.objects import Object
from testbed.model.topology import NodeSpec

KUBELET_VERSION = "v1.30.0"
RUNTIME_VERSION = "testbed://0.1.0"
KUBELET_PORT = 10250
_ANNOTATIONS = {
    "node.alpha.kubernetes.io/ttl": "0",
    "volumes.kubernetes.io/controller-managed-attach-detach": "true",
}
_NO_PRESSURE = (
    ("MemoryPressure", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    ("DiskPressure", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    ("PIDPressure", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine says of itself."""

    kernel: str
    os_image: str
    architecture: str  # amd64, arm64
    cpus: int
    memory_kib: int
    storage_kib: int = 0
    machine_id: str = ""
    system_uuid: str = ""
    boot_id: str = ""


def node_object(spec: NodeSpec, machine: Machine, now: str) -> Object:
    """Return a Node as a kubelet with a topology's labels and taints registers it."""
    labels = {
        "beta.kubernetes.io/arch": machine.architecture,
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": machine.architecture,
        "kubernetes.io/hostname": spec.name,
        "kubernetes.io/os": "linux",
        **spec.labels,
    }
    taints = [
        {"key": taint.key, "effect": taint.effect, **({"value": taint.value} if taint.value else {})}
        for taint in spec.taints
    ]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": spec.name, "labels": labels, "annotations": dict(_ANNOTATIONS)},
        "spec": {
            "podCIDR": str(spec.pod_cidr),
            "podCIDRs": [str(spec.pod_cidr)],
            **({"taints": taints} if taints else {}),
        },
        "status": node_status(spec, machine, now),
    }


def node_status(spec: NodeSpec, machine: Machine, now: str) -> dict[str, object]:
    capacity = {
        "cpu": str(machine.cpus),
        "ephemeral-storage": f"{machine.storage_kib}Ki",
        "hugepages-1Gi": "0",
        "hugepages-2Mi": "0",
        "memory": f"{machine.memory_kib}Ki",
        "pods": str(spec.max_pods),
    }
    times = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    conditions = [
        {"type": type_, "status": "False", "reason": reason, "message": message, **times}
        for type_, reason, message in _NO_PRESSURE
    ]
    message = "kubelet is posting ready status"
    conditions.append({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": message, **times})
    return {
        "addresses": [
            {"type": "InternalIP", "address": str(spec.address)},
            {"type": "Hostname", "address": spec.name},
        ],
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": conditions,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
        "nodeInfo": {
            "bootID": machine.boot_id,
            "machineID": machine.machine_id,
            "systemUUID": machine.system_uuid,
            "architecture": machine.architecture,
            "containerRuntimeVersion": RUNTIME_VERSION,
            "kernelVersion": machine.kernel,
            "kubeletVersion": KUBELET_VERSION,
            "kubeProxyVersion": KUBELET_VERSION,
            "operatingSystem": "linux",
            "osImage": machine.os_image,
        },
    }


class PodAddresses:
    """The addresses of one node's pod CIDR: the first is the bridge's; given out in turn, so a freed one rests a while."""

    def __init__(self, network: IPv4Network) -> None:
        self._network = network
        self._used: set[int] = set()
        self._next = 2

    def allocate(self) -> IPv4Address | None:
        """Return a free address, or None when there is none."""
        size = self._network.num_addresses
        for step in range(size):
            offset = 2 + (self._next - 2 + step) % max(1, size - 3)  # not the network's, bridge's, broadcast
            if offset not in self._used and offset < size - 1:
                self._used.add(offset)
                self._next = offset + 1
                return self._network[offset]
        return None

    def release(self, address: IPv4Address) -> None:
        self._used.discard(int(address) - int(self._network.network_address))
