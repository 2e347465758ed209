"""From values to the text of nginx.conf. Pure: the same document gives the same bytes.

Every expression of the template is written as one quoted word, with ``$`` taken away, unless the template says that it is
something else: ``raw`` (checked text of our own making, a number, one of a closed set), ``plain`` (a quoted word where nginx
reads no variables: paths, expressions), ``with_variables`` (a quoted word whose variables were checked).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from testbed.dataplane.ingress.model import NO_ANNOTATIONS, Document, Location, Raw, Server, Upstream
from testbed.dataplane.ingress.quoting import quoted, quoted_value
from testbed.dataplane.ingress.settings import UPSTREAM_LOG_FORMAT
from testbed.dataplane.ingress.values import bytes_of

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATION_FILE: Final = "/etc/nginx/generation.conf"
#: Where nginx tells of each request (UDP): a full buffer drops, while a Unix socket holds ten datagrams and then complains.
METRICS_ADDRESS: Final = ("127.0.0.1", 10247)
_WORD = re.compile(r"[A-Za-z0-9_./:@=%*~^-]+", re.ASCII)
_HEADER_ANNOTATIONS: Final = ("upstream_vhost", "connection_proxy_header", "x_forwarded_prefix")


def render_generation(number: int) -> str:
    """Return the file that tells workers which generation they are; nginx.conf itself stays the same text."""
    return f'map "" $generation {{ default "{number}"; }}\n'


def _finalize(value: Any) -> Any:
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool) or value is None:
        raise TypeError(f"{value!r} is no text of nginx.conf")
    if isinstance(value, int):
        return str(value)
    text = str(value)
    return text if _WORD.fullmatch(text) else quoted_value(text)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined  # 60 ms: not for who only imports this

    environment = Environment(  # noqa: S701  # this is no HTML; _finalize quotes
        finalize=_finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # Blocks of a macro are text already, and must not be quoted once more.
    environment.globals.update(
        raw=lambda value: Raw(str(value)),
        plain=lambda value: Raw(quoted(str(value))),
        with_variables=lambda value: Raw(quoted_value(str(value), variables=True)),
        server_name=_server_name,
        temp_file_size=_temp_file_size,
        with_path=lambda url: url if urlsplit(url.split("$")[0]).path or "$" in url else f"{url}/",
        mirror_host=lambda url: urlsplit(url.split("$")[0]).netloc,
        none_given=NO_ANNOTATIONS,
    )
    return environment


def _server_name(host: str) -> Raw:
    """Return a host as ``server_name`` takes it; ``*.`` is exactly one label, so it becomes an expression."""
    if host.startswith("*."):
        return Raw(quoted(rf"~^(?<subdomain>[\w-]+)\.{re.escape(host[2:])}$"))
    return Raw(quoted(host))


def _temp_file_size(wanted: str, buffer: str) -> Raw:
    """Return a size that nginx takes: 0, or at least one buffer."""
    too_small = 0 < bytes_of(wanted) < bytes_of(buffer)
    return Raw(buffer if too_small else wanted)


@dataclass(frozen=True, slots=True)
class _ShownLocation:
    """A location with what the template asks of it."""

    location: Location

    def __getattr__(self, name: str) -> Any:
        return getattr(self.location, name)

    @property
    def has_answer_headers(self) -> bool:
        one = self.location
        return bool(one.sticky_header or one.cors or one.response_headers or one.external_auth)

    @property
    def has_request_headers(self) -> bool:
        one = self.location
        said = any(getattr(one.annotations, name) for name in _HEADER_ANNOTATIONS)
        authenticated = one.external_auth is not None and bool(one.external_auth.response_headers)
        return said or authenticated or one.upstream_tls_checks or one.default_backend is not None


@dataclass(frozen=True, slots=True)
class _ShownServer:
    server: Server

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    @property
    def locations(self) -> list[_ShownLocation]:
        return [_ShownLocation(one) for one in self.server.locations]

    @property
    def auxiliaries(self) -> list[_ShownLocation]:
        """One location for each subrequest and named location that this server's locations need."""
        found: dict[str, Location] = {}
        for one in self.server.locations:
            if one.status or one.annotations.temporal_redirect or one.annotations.permanent_redirect:
                continue
            if one.external_auth:
                found.setdefault(one.external_auth.location, replace(one, mirror="", error_pages=None))
            if one.mirror:
                found.setdefault(one.mirror, replace(one, external_auth=None, error_pages=None))
            if one.error_pages:
                found.setdefault(one.error_pages.location, replace(one, mirror="", external_auth=None))
        return [_ShownLocation(found[name]) for name in sorted(found)]


class Renderer:
    """Renders documents; keeps the text of servers and upstreams that have not changed since the last one."""

    def __init__(self) -> None:
        self._common: tuple[Any, ...] = ()
        self._macros: Any = None
        # By identity first: comparing takes longer than most of the rest. The objects are kept, so that no id is reused.
        self._servers: dict[int, tuple[Server, str]] = {}
        self._upstreams: dict[Upstream, str] = {}

    def render(self, document: Document) -> str:
        """Return the text of nginx.conf."""
        common = (document.settings, document.options, document.default_certificate, document.kept_connections)
        if common != self._common or self._macros is None:
            self._common = common
            self._servers, self._upstreams = {}, {}
        self._macros = _template().make_module(_variables(document))
        macros = self._macros
        upstreams = {one: self._upstreams.get(one) or macros.upstream(one) for one in document.upstreams}
        servers: dict[int, tuple[Server, str]] = {}
        by_value: dict[Server, str] = {}
        for one in document.servers:
            known = self._servers.get(id(one))
            if known is None and self._servers and not by_value:
                by_value = dict(self._servers.values())
            servers[id(one)] = known or (one, by_value.get(one) or macros.server(_ShownServer(one)))
        self._upstreams, self._servers = upstreams, servers
        texts = (text for _, text in servers.values())
        return "".join((str(macros), macros.head(), "\n", *upstreams.values(), *texts, macros.tail()))


def render(document: Document) -> str:
    """Return the text of nginx.conf for a document."""
    return Renderer().render(document)


@cache
def _template() -> Any:
    text = files("testbed.dataplane.ingress").joinpath("nginx.conf.j2").read_text(encoding="utf-8")
    return _environment().from_string(text)


def _variables(document: Document) -> dict[str, Any]:
    settings = document.settings
    return {
        "s": settings,
        "o": document.options,
        "resolvers": document.resolvers,
        "default_certificate": document.default_certificate,
        "maps": document.maps,
        "splits": document.splits,
        "zones": document.zones,
        "geos": document.geos,
        "caches_auth": document.caches_auth,
        "kept_connections": document.kept_connections,
        "hash_sizes": document.server_names_hash,
        "generation_file": Raw(GENERATION_FILE),
        "metrics_address": Raw("{}:{}".format(*METRICS_ADDRESS)),
        # Each is a line to read for each location, so they are there only if somebody looks at them.
        "names_ingress": document.options.enable_metrics or settings.log_format_upstream != UPSTREAM_LOG_FORMAT,
        "log_format": _log_format(settings.log_format_upstream),
        "forwarded_for": Raw("$full_x_forwarded_for" if settings.compute_full_forwarded_for else "$remote_addr"),
        "preserves_slash": lambda said: (
            settings.preserve_trailing_slash if said.preserve_trailing_slash is None else said.preserve_trailing_slash
        ),
    }


def _log_format(text: str) -> Raw:
    """Return the format as one word in the quotes that it does not need itself."""
    if text == UPSTREAM_LOG_FORMAT:
        return Raw(f"'{text}'")
    return Raw(quoted_value(text, variables=True))
