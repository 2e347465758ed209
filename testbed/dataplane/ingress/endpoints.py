"""The quick way for what happens most: pods come and go, and nothing else changes. Pure.

Everything but the ``server`` lines of upstreams stays as it is, so neither Ingresses nor annotations need to be read again,
and the text that users had a part in is the one that ``nginx -t`` has seen. What is not that simple goes the long way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from testbed.dataplane.ingress.model import Document, Location
from testbed.dataplane.ingress.world import Name, World, endpoint_addresses, service_port


def with_endpoints(document: Document, world: World, changed: Collection[Name]) -> Document | None:
    """Return the document with today's endpoints of the changed Services, or None when it must be made anew.

    It must be when a backend becomes able to serve or unable to (its locations change between proxying and 503), and
    when cookies, subsets or canaries are made of its endpoints.
    """
    names = set(changed) & document.referenced
    if names & document.complicated:
        return None
    slices = world.slices_by_service(names)
    served = set()
    upstreams = []
    for upstream in document.upstreams:
        namespace, service, port = upstream.source
        if (namespace, service) in names:
            served.add((namespace, service))
            ports = ((world.services.get((namespace, service)) or {}).get("spec") or {}).get("ports") or ()
            found = service_port(ports, port)
            servers = endpoint_addresses(slices.get((namespace, service), ()), found) if found else ()
            if not servers:
                return None
            if servers != upstream.servers:
                upstream = replace(upstream, servers=servers)
        upstreams.append(upstream)
    # A Service without an upstream may be one that answered 503 until now.
    if names - served:
        return None
    return replace(document, upstreams=tuple(upstreams))


def same_but_for_endpoints(old: Document, new: Document) -> bool:
    """Say whether two documents made of the same Ingresses proxy the same locations, if perhaps to other addresses.

    Then nothing that a user wrote is in the one and not in the other: a location that answers 503 leaves out what its
    annotations ask for.
    """
    return [_shape(one) for one in _locations(old)] == [_shape(one) for one in _locations(new)]


def _locations(document: Document) -> list[Location]:
    return [one for server in document.servers for one in server.locations]


def _shape(one: Location) -> tuple[str, str, int, bool, str, str]:
    return one.modifier, one.uri, one.status, one.default_backend is None, one.deny_reason, one.alternative
