"""Names of kube-proxy's chains.

Names are hashed because the kernel allows 28 characters; `str(name) + protocol` is what upstream hashes, with nothing
in between, so that our nodes and real ones can be compared chain by chain.

Source: kubernetes pkg/proxy/iptables/proxier.go, portProtoHash (v1.30).
"""

from __future__ import annotations

from base64 import b32encode
from functools import lru_cache
from hashlib import sha256

from testbed.model.service import ServicePortName

SERVICES = "KUBE-SERVICES"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQ = "KUBE-MARK-MASQ"
FORWARD = "KUBE-FORWARD"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
FIREWALL = "KUBE-FIREWALL"
CANARY = "KUBE-PROXY-CANARY"

CLUSTER_PREFIX = "KUBE-SVC-"
LOCAL_PREFIX = "KUBE-SVL-"
EXTERNAL_PREFIX = "KUBE-EXT-"
SOURCE_RANGES_PREFIX = "KUBE-FW-"
ENDPOINT_PREFIX = "KUBE-SEP-"
SERVICE_PREFIXES = (CLUSTER_PREFIX, LOCAL_PREFIX, EXTERNAL_PREFIX, SOURCE_RANGES_PREFIX, ENDPOINT_PREFIX)


def _suffix(text: str) -> str:
    return b32encode(sha256(text.encode()).digest()[:10]).decode()  # 10 bytes are 16 letters


@lru_cache(maxsize=65536)
def service_suffix(name: ServicePortName) -> str:
    """Return the part that the SVC, SVL, EXT and FW chains of one service port share."""
    return _suffix(f"{name}{name.protocol.lower()}")


@lru_cache(maxsize=262144)
def endpoint_chain(name: ServicePortName, endpoint: str) -> str:
    """Return the KUBE-SEP chain of one endpoint (``address:port``) of one service port."""
    return ENDPOINT_PREFIX + _suffix(f"{name}{name.protocol.lower()}{endpoint}")
