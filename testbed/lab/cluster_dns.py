"""Cluster DNS as kubeadm installs it: ConfigMap, Deployment and Service in kube-system. Pure.

What differs from kubeadm's: the API is reached by its socket, as kube-proxy does, and there are no memory limits.
Source: kubernetes cmd/kubeadm/app/phases/addons/dns/manifests.go (v1.30).
"""

from __future__ import annotations

from typing import Any

from testbed.model.objects import Object
from testbed.model.topology import Topology

COREDNS_IMAGE = "registry.k8s.io/coredns/coredns:v1.11.1"
DNS_REPLICAS = 2
DNS_LABELS = {"k8s-app": "kube-dns"}


def corefile(domain: str) -> str:
    """Return kubeadm's Corefile for a cluster's domain."""
    return f"""\
.:53 {{
    errors
    health {{
       lameduck 5s
    }}
    ready
    kubernetes {domain} in-addr.arpa ip6.arpa {{
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }}
    prometheus :9153
    forward . /etc/resolv.conf {{
       max_concurrent 1000
    }}
    cache 30 {{
       disable success {domain}
       disable denial {domain}
    }}
    loop
    reload
    loadbalance
}}
"""


def dns_objects(topology: Topology, *, api_folder: str) -> list[Object]:
    """Return the objects of cluster DNS, in creation order; none when the topology has no address for it.

    Args:
        api_folder: the node's folder with the API's socket, given to the pods as a hostPath volume.
    """
    if topology.cluster.dns is None:
        return []
    return [
        _object("v1", "ServiceAccount", "coredns", {}),
        _object("v1", "ConfigMap", "coredns", {}, data={"Corefile": corefile(topology.cluster.domain)}),
        _object("apps/v1", "Deployment", "coredns", DNS_LABELS, spec=_deployment(api_folder)),
        _service(str(topology.cluster.dns)),
    ]


def _object(api_version: str, kind: str, name: str, labels: dict[str, str], **fields: Any) -> Object:
    metadata: Object = {"name": name, "namespace": "kube-system"}
    if labels:
        metadata["labels"] = dict(labels)
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def _deployment(api_folder: str) -> Object:
    container = {
        "name": "coredns",
        "image": COREDNS_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "env": [{"name": "TESTBED_API_SOCKET", "value": "/var/run/testbed/api.sock"}],
        "ports": [
            {"containerPort": 53, "name": "dns", "protocol": "UDP"},
            {"containerPort": 53, "name": "dns-tcp", "protocol": "TCP"},
            {"containerPort": 9153, "name": "metrics", "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "70Mi"}},
        "livenessProbe": {
            "httpGet": {"path": "/health", "port": 8080, "scheme": "HTTP"},
            "initialDelaySeconds": 60,
            "timeoutSeconds": 5,
            "successThreshold": 1,
            "failureThreshold": 5,
        },
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181, "scheme": "HTTP"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config-volume", "mountPath": "/etc/coredns", "readOnly": True},
            {"name": "api", "mountPath": "/var/run/testbed"},
        ],
    }
    spread = {
        "weight": 100,
        "podAffinityTerm": {
            "labelSelector": {"matchExpressions": [{"key": "k8s-app", "operator": "In", "values": ["kube-dns"]}]},
            "topologyKey": "kubernetes.io/hostname",
        },
    }
    pod = {
        "priorityClassName": "system-cluster-critical",
        "serviceAccountName": "coredns",
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [spread]}},
        "tolerations": [
            {"key": "CriticalAddonsOnly", "operator": "Exists"},
            {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"},
        ],
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "containers": [container],
        # The pods' own resolv.conf is the node's: that is whom names outside the cluster are asked of.
        "dnsPolicy": "Default",
        "volumes": [
            {
                "name": "config-volume",
                "configMap": {"name": "coredns", "items": [{"key": "Corefile", "path": "Corefile"}]},
            },
            {"name": "api", "hostPath": {"path": api_folder, "type": "Directory"}},
        ],
    }
    return {
        "replicas": DNS_REPLICAS,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
        "selector": {"matchLabels": DNS_LABELS},
        "template": {"metadata": {"labels": DNS_LABELS}, "spec": pod},
    }


def _service(address: str) -> Object:
    labels = {**DNS_LABELS, "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"}
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
        {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
    ]
    service = _object(
        "v1", "Service", "kube-dns", labels, spec={"clusterIP": address, "selector": DNS_LABELS, "ports": ports}
    )
    service["metadata"]["annotations"] = {"prometheus.io/port": "9153", "prometheus.io/scrape": "true"}
    return service
