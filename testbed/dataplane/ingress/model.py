"""nginx's configuration as values: what `translate` decides and `render` writes down.

::

    Document ─┬─ Server (a host) ── Location (a path) ── proxied to an Upstream, a redirect, or a status
              ├─ Upstream (a Service's port): POD:PORT …
              ├─ Map, Split, Zone, Geo: what locations need at the level of http
              └─ files: certificates, password files; named by their content, never by what a user wrote
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from testbed.dataplane.ingress.annotations import Annotations
from testbed.dataplane.ingress.settings import Options, Settings

NO_ANNOTATIONS = Annotations()
#: Up to so many upstreams keep as many idle connections as is said for all of them; more than that share.
_FULL_CONNECTION_POOLS: Final = 10
_LEAST_KEPT_CONNECTIONS: Final = 32


class Raw(str):
    """Text that is nginx syntax already: made of checked parts, and not to be quoted."""

    __slots__ = ()


NOTHING = Raw("")


@dataclass(frozen=True, slots=True)
class IngressKey:
    """Which Ingress; ``str()`` of it is what comments, logs and errors show."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A port of a Service, as a rule names it.

    ``servers`` are ``ADDRESS:PORT``, sorted; ``external`` is the name and port of an ExternalName Service.
    """

    name: str  # 'dev-svc-lb-80': what logs show, and the upstream's name
    namespace: str
    service: str
    port: str
    servers: tuple[str, ...] = ()
    external: tuple[str, int] | None = None
    is_missing: bool = False  # there is no such Service, or no such port of it

    @property
    def can_serve(self) -> bool:
        return bool(self.servers) or self.external is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One ``upstream`` block. ``method`` is the line that chooses ('' for turns); ``backups`` serve when ``servers`` fail."""

    name: str
    servers: tuple[str, ...]
    backups: tuple[str, ...] = ()
    method: Raw = NOTHING
    source: tuple[str, str, str] = ("", "", "")  # namespace, Service, port whose ready endpoints the servers are


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """One ``map`` block: rows are source and result, as nginx text."""

    source: Raw
    variable: str
    rows: tuple[tuple[Raw, Raw], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One ``split_clients`` block: shares of the hashes of ``key``, as percentage with two decimals or ``*``, and values."""

    variable: str
    key: Raw
    shares: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """A ``limit_req_zone`` (with ``rate``, ``5r/s``) or ``limit_conn_zone``."""

    name: str
    key: Raw
    rate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geo:
    """A ``geo`` block: 1 for addresses in ``networks``, else 0."""

    variable: str
    networks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalAuth:
    """An ``auth_request``."""

    location: str  # of the subrequest
    url: str
    host: str
    signin_location: str = ""
    signin: str = ""
    response_headers: tuple[tuple[str, str], ...] = ()  # header and the variable that holds it
    set_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """What a location says to other origins' scripts; empty variables leave their headers out."""

    origin: str  # variable
    preflight: str  # variable: '1' for an OPTIONS request of an allowed origin
    credentials: str  # variable, or ''


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPages:
    """Statuses for which another Service makes the page."""

    codes: tuple[int, ...]
    location: str  # name of the named location, before '_CODE'
    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """One ``location`` block of a server."""

    modifier: str  # '', '=' or '~*'
    uri: str
    ingress: IngressKey | None
    path: str
    backend: Backend
    annotations: Annotations = NO_ANNOTATIONS
    target: Raw = NOTHING  # what stands after ``proxy_pass scheme://``
    alternative: str = ""  # variable that holds the canary's name when it was chosen
    status: int = 0  # answered at once, without a backend
    deny_reason: str = ""
    default_backend: Backend | None = None  # serves instead of a 503
    redirects_to_tls: bool = False
    rewrite: tuple[str, str] | None = None
    sticky_header: str = ""  # variable
    auth_file: str = ""
    external_auth: ExternalAuth | None = None
    cors: Cors | None = None
    limits: tuple[Raw, ...] = ()
    response_headers: tuple[tuple[str, str], ...] = ()
    error_pages: ErrorPages | None = None
    mirror: str = ""  # location of the mirror's subrequest
    upstream_tls_checks: bool = False

    @property
    def scheme(self) -> str:
        protocol = self.annotations.backend_protocol
        return {"HTTPS": "https", "GRPC": "grpc", "GRPCS": "grpcs", "AUTO_HTTP": "$scheme"}.get(protocol, "http")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCertificates:
    """Who must show a certificate to a server."""

    authority_file: str
    verify: str
    depth: int
    match_cn: str = ""
    error_page: str = ""
    passes_on: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One host. ``host`` is '_' for requests that name no other."""

    host: str
    locations: tuple[Location, ...]
    aliases: tuple[str, ...] = ()
    certificate: str = ""  # file; '': the default server's
    certificate_secret: str = ""  # name of the Secret that it comes from; '': the default certificate
    certificate_expires_s: float = 0.0  # seconds since 1970; 0: not known
    app_root: str = ""
    www_redirect: str = ""  # another host, whose requests are sent here
    client_certificates: ClientCertificates | None = None
    ssl_ciphers: str = ""
    prefers_own_ciphers: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """All of it. ``notes`` are for the log: what was ignored, and in which Ingress."""

    settings: Settings
    options: Options
    resolvers: tuple[str, ...] = ()
    default_certificate: str = ""
    upstreams: tuple[Upstream, ...] = ()
    servers: tuple[Server, ...] = ()
    maps: tuple[Map, ...] = ()
    splits: tuple[Split, ...] = ()
    zones: tuple[Zone, ...] = ()
    geos: tuple[Geo, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[tuple[IngressKey, str], ...] = ()
    caches_auth: bool = False
    referenced: frozenset[tuple[str, str]] = frozenset()  # Services that are named anywhere
    complicated: frozenset[tuple[str, str]] = frozenset()  # Services on whose endpoints more than upstreams depends

    @property
    def kept_connections(self) -> int:
        """How many idle connections a worker keeps to each upstream; fewer when there are many upstreams.

        Upstream's number is for all backends together. nginx makes room for each when it reads its configuration, 60 KiB
        for 320: with 1,500 upstreams that was half of the time and of the memory of a reload.
        """
        wanted = self.settings.upstream_keepalive_connections
        each = _FULL_CONNECTION_POOLS * wanted // max(1, len(self.upstreams))
        return min(wanted, max(_LEAST_KEPT_CONNECTIONS, each))

    @property
    def server_names_hash(self) -> tuple[int, int]:
        """``server_names_hash_max_size`` and ``_bucket_size`` for these hosts (powers of two)."""
        names = [name for server in self.servers for name in (server.host, *server.aliases, server.www_redirect)]
        longest = max((len(name) for name in names), default=0)
        return _power_of_two(max(1024, 2 * len(names))), _power_of_two(max(64, longest + 32))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
