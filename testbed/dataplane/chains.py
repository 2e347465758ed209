"""Names of kube-proxy's chains.

Names are hashed because the kernel allows 28 characters; `str(name) + protocol` is what upstream hashes, with nothing
in between, so that our nodes and real ones can be compared chain by chain.

Source: kubernetes pkg/proxy/iptables/proxier.go, portProtoHash (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable
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


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PAIRS = tuple(first + second for first in _ALPHABET for second in _ALPHABET)


def _suffix(text: str) -> str:
    """Return the first 16 letters of a hash in base32: 10 bytes, in steps of two letters, as 20,000 of them are needed."""
    bits = int.from_bytes(sha256(text.encode()).digest()[:10], "big")
    return (
        f"{_PAIRS[bits >> 70]}{_PAIRS[bits >> 60 & 1023]}{_PAIRS[bits >> 50 & 1023]}{_PAIRS[bits >> 40 & 1023]}"
        f"{_PAIRS[bits >> 30 & 1023]}{_PAIRS[bits >> 20 & 1023]}{_PAIRS[bits >> 10 & 1023]}{_PAIRS[bits & 1023]}"
    )


def service_suffix(name: ServicePortName) -> str:
    """Return the part that the SVC, SVL, EXT and FW chains of one service port share."""
    return _suffix(f"{name}{name.protocol.lower()}")


def endpoint_chains(name: ServicePortName, endpoints: Iterable[str]) -> dict[str, str]:
    """Return the KUBE-SEP chains of endpoints (``address:port``) of one service port, by endpoint."""
    stem = f"{name}{name.protocol.lower()}"
    return {endpoint: ENDPOINT_PREFIX + _suffix(stem + endpoint) for endpoint in endpoints}


def endpoint_chain(name: ServicePortName, endpoint: str) -> str:
    """Return the KUBE-SEP chain of one endpoint."""
    return endpoint_chains(name, [endpoint])[endpoint]
