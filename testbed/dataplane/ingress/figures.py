"""What a configuration says about its objects, as figures for /metrics. Pure.

Source: kubernetes/ingress-nginx internal/ingress/metric/collectors/controller.go (v1.10).
"""

from __future__ import annotations

from typing import Final

from testbed.dataplane.ingress.model import Document, IngressKey

NO_SERVICE: Final = "no-service"
NO_ENDPOINT: Final = "no-endpoint"


def orphans(document: Document) -> dict[tuple[IngressKey, str], bool]:
    """Return for each Ingress whether one of its paths leads to no Service, and whether one leads to no endpoint."""
    found: dict[tuple[IngressKey, str], bool] = {}
    for server in document.servers:
        for location in server.locations:
            # What goes to the default backend of all was asked for by nobody.
            if location.ingress is None or not location.backend.namespace:
                continue
            missing = location.backend.is_missing
            idle = not missing and not location.backend.can_serve
            for kind, is_so in ((NO_SERVICE, missing), (NO_ENDPOINT, idle)):
                key = location.ingress, kind
                found[key] = found.get(key, False) or is_so
    return found


def certificate_ends(document: Document) -> dict[tuple[str, str], float]:
    """Return host and Secret -> the second since 1970 at which the certificate's time is over."""
    return {
        (server.host, server.certificate_secret): server.certificate_expires_s
        for server in document.servers
        if server.certificate_expires_s
    }
