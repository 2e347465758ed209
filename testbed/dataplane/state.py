"""The input of every backend: service ports and their endpoints, as of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from testbed.model.service import Endpoint, ServicePort, ServicePortName


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyState:
    """Services and endpoints to render. Endpoints of names that are no service port are of no use, and may be there."""

    services: Mapping[ServicePortName, ServicePort]
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]]

    @property
    def endpoint_count(self) -> int:
        return sum(len(self.endpoints.get(name, ())) for name in self.services)
