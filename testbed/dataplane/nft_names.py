"""Names in kube-proxy's nftables table.

nft allows long names, so they say what they are for; the hash before them keeps apart what cutting would make equal.
It is shorter than, and of another text than, that of the iptables chains (`chains`).

Source: kubernetes pkg/proxy/nftables/proxier.go, servicePortChainNameBase, servicePortEndpointChainNamePrefix (v1.36).
"""

from __future__ import annotations

from base64 import b32encode
from functools import lru_cache
from hashlib import sha256
from typing import Final

from testbed.model.service import ServicePortName

FAMILY: Final = "ip"
TABLE: Final = "kube-proxy"

CLUSTER_IPS: Final = "cluster-ips"
NODE_PORT_IPS: Final = "nodeport-ips"
HAIRPIN: Final = "hairpin-connections"
SERVICE_IPS: Final = "service-ips"
SERVICE_NODE_PORTS: Final = "service-nodeports"
NO_ENDPOINT_SERVICES: Final = "no-endpoint-services"
NO_ENDPOINT_NODE_PORTS: Final = "no-endpoint-nodeports"
FIREWALL_IPS: Final = "firewall-ips"

SERVICES: Final = "services"
MASQUERADING: Final = "masquerading"
REJECT: Final = "reject-chain"
FIREWALL_CHECK: Final = "firewall-check"
SERVICE_ENDPOINTS_CHECK: Final = "service-endpoints-check"
NODE_PORT_ENDPOINTS_CHECK: Final = "nodeport-endpoints-check"
CLUSTER_IPS_CHECK: Final = "cluster-ips-check"

CLUSTER_PREFIX: Final = "service-"
LOCAL_PREFIX: Final = "local-"
EXTERNAL_PREFIX: Final = "external-"
FIREWALL_PREFIX: Final = "firewall-"
ENDPOINT_PREFIX: Final = "endpoint-"
AFFINITY_PREFIX: Final = "affinity-"

#: nft(8) allows 255; upstream leaves room for the prefixes.
_LONGEST: Final = 240


def _hashed(text: str) -> str:
    name = f"{b32encode(sha256(text.encode()).digest()[:5]).decode()}-{text}"  # 5 bytes are 8 letters
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def _plain(name: ServicePortName) -> str:
    return f"{name.namespace}/{name.name}/{name.protocol.lower()}/{name.port}"


@lru_cache(maxsize=65536)
def service_base(name: ServicePortName) -> str:
    """Return what the service-, local-, external- and firewall- chains of one service port are called after the prefix."""
    return _hashed(_plain(name))


@lru_cache(maxsize=262144)
def endpoint_base(name: ServicePortName, address: str, port: int) -> str:
    """Return what the endpoint- chain and affinity- set of one endpoint are called after the prefix."""
    return _hashed(f"{_plain(name)}__{address.replace(':', '.')}/{port}")
