"""The objects a new cluster begins with, as kubeadm would make them: pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any, Final

from testbed.lab.cluster_dns import dns_objects
from testbed.model.objects import Object
from testbed.model.topology import Topology

KUBE_PROXY_IMAGE = "registry.k8s.io/kube-proxy:v1.30.0"
_CONFIG_FILE = "config.conf"


#: What kubeadm writes, in its order, so that the recipes that people apply to it work here as well, such as MetalLB's
#: ``sed -e "s/strictARP: false/strictARP: true/"``. Source: kubeadm v1.30, `kubectl -n kube-system get cm kube-proxy -o yaml`.
_KUBEADM: Final[Mapping[str, Any]] = {
    "bindAddress": "0.0.0.0",
    "bindAddressHardFail": False,
    "clientConnection": {
        "acceptContentTypes": "", "burst": 0, "contentType": "", "kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf", "qps": 0,
    },
    "clusterCIDR": "",
    "configSyncPeriod": "0s",
    "conntrack": {
        "maxPerCore": None, "min": None, "tcpBeLiberal": False, "tcpCloseWaitTimeout": None, "tcpEstablishedTimeout": None,
        "udpStreamTimeout": "0s", "udpTimeout": "0s",
    },
    "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
    "detectLocalMode": "",
    "enableProfiling": False,
    "healthzBindAddress": "",
    "hostnameOverride": "",
    "iptables": {
        "localhostNodePorts": None, "masqueradeAll": False, "masqueradeBit": None, "minSyncPeriod": "1s", "syncPeriod": "0s",
    },
    "ipvs": {
        "excludeCIDRs": None, "minSyncPeriod": "0s", "scheduler": "", "strictARP": False, "syncPeriod": "0s",
        "tcpFinTimeout": "0s", "tcpTimeout": "0s", "udpTimeout": "0s",
    },
    "metricsBindAddress": "",
    "mode": "",
    "nftables": {"masqueradeAll": False, "masqueradeBit": None, "minSyncPeriod": "1s", "syncPeriod": "0s"},
    "nodePortAddresses": None,
    "oomScoreAdj": None,
    "portRange": "",
    "showHiddenMetricsForVersion": "",
}  # fmt: skip


def proxy_configuration(topology: Topology, mode: str) -> dict[str, Any]:
    """Return the KubeProxyConfiguration of a lab: the topology's fields, over what kubeadm writes.

    Mode iptables is '', as there.
    """
    document: dict[str, Any] = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        **_KUBEADM,
        "clusterCIDR": str(topology.cluster.pod_cidr),
    }
    for name, value in topology.kube_proxy.items():
        known = document.get(name)
        document[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return {**document, "mode": "" if mode == "iptables" else mode}


def _kubeconfig(address: IPv4Address, port: int) -> str:
    """Return kubeconfig.conf as kubeadm writes it. Our kube-proxy uses the API's socket; people and tools read this."""
    return f"""apiVersion: v1
kind: Config
clusters:
- cluster:
    certificate-authority: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt
    server: https://{address}:{port}
  name: default
contexts:
- context:
    cluster: default
    namespace: default
    user: default
  name: default
current-context: default
users:
- name: default
  user:
    tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token
"""


def system_objects(
    topology: Topology, *, proxy_config_text: str, api_folder: str, api: tuple[IPv4Address, int], iptables_backend: str
) -> list[Object]:
    """Return the ServiceCIDR and Service ``kubernetes``, kube-proxy's own objects and those of cluster DNS, in creation order.

    Args:
        proxy_config_text: a KubeProxyConfiguration in YAML, what the ConfigMap holds as ``config.conf``.
        api_folder: the node's folder with the API's socket, given to kube-proxy as a hostPath volume.
        api: where the API listens inside the lab.
        iptables_backend: which iptables kube-proxy uses.
    """
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": [str(topology.cluster.service_cidr)]},
        },
        _kubernetes_service(topology, api[1]),
        *_kubernetes_endpoints(*api),
        _object("v1", "ServiceAccount", "kube-proxy"),
        _object(
            "v1",
            "ConfigMap",
            "kube-proxy",
            data={_CONFIG_FILE: proxy_config_text, "kubeconfig.conf": _kubeconfig(*api)},
        ),
        _kube_proxy(api_folder, iptables_backend),
        *dns_objects(topology, api_folder=api_folder),
    ]


def _object(api_version: str, kind: str, name: str, **fields: Any) -> Object:
    metadata = {"name": name, "namespace": "kube-system", "labels": {"k8s-app": name}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def _kubernetes_endpoints(address: IPv4Address, port: int) -> list[Object]:
    """Return what the API server itself writes: kubernetes pkg/controlplane/reconcilers (v1.30)."""
    named = {"name": "kubernetes", "namespace": "default"}
    ports = [{"name": "https", "port": port, "protocol": "TCP"}]
    return [
        {
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {**named, "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": [{"ip": str(address)}], "ports": ports}],
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**named, "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [str(address)], "conditions": {"ready": True}}],
            "ports": ports,
        },
    ]


def _kubernetes_service(topology: Topology, port: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "clusterIP": str(topology.cluster.service_cidr.network_address + 1),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}],
        },
    }


def _kube_proxy(api_folder: str, iptables_backend: str) -> Object:
    labels = {"k8s-app": "kube-proxy"}
    container = {
        "name": "kube-proxy",
        "image": KUBE_PROXY_IMAGE,
        "command": [
            "/usr/local/bin/kube-proxy",
            f"--config=/var/lib/kube-proxy/{_CONFIG_FILE}",
            "--hostname-override=$(NODE_NAME)",
        ],
        "env": [
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "TESTBED_API_SOCKET", "value": "/var/run/testbed/api.sock"},
            {"name": "XTABLES_LOCKFILE", "value": "/run/xtables.lock"},
            {"name": "TESTBED_IPTABLES_BACKEND", "value": iptables_backend},
        ],
        "securityContext": {"privileged": True},
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 10256}, "periodSeconds": 10},
        "volumeMounts": [
            {"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"},
            {"name": "api", "mountPath": "/var/run/testbed"},
            {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
        ],
    }
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "hostNetwork": True,
            "priorityClassName": "system-node-critical",
            "serviceAccountName": "kube-proxy",
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"operator": "Exists"}],
            "containers": [container],
            "volumes": [
                {"name": "kube-proxy", "configMap": {"name": "kube-proxy"}},
                {"name": "api", "hostPath": {"path": api_folder, "type": "Directory"}},
                # the lock of whoever else uses iptables on the node
                {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
            ],
        },
    }
    spec = {"selector": {"matchLabels": labels}, "template": template, "updateStrategy": {"type": "RollingUpdate"}}
    return _object("apps/v1", "DaemonSet", "kube-proxy", spec=spec)
