"""What annotations add to a location: where its requests go, who may send them, and what is said in the answer.

Stock nginx has no Lua, so what upstream decides per request in Lua is said with nginx's own words:

=================  ===========================================================================================
canary             ``split_clients`` for the weight, ``map`` over header and cookie, ``proxy_pass http://$variable``
affinity cookie    one ``upstream`` a peer, the others as backup; ``map`` from the cookie to it; ``Set-Cookie`` when new
hash by subset     the subset is chosen by ``split_clients`` over the key
ewma               ``random two least_conn``
limits             ``limit_req``, ``limit_conn`` with a key that is empty for exempted addresses
=================  ===========================================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from testbed.dataplane.ingress.annotations import Annotations
from testbed.dataplane.ingress.model import (
    Backend,
    Cors,
    ErrorPages,
    ExternalAuth,
    Geo,
    IngressKey,
    Location,
    Map,
    Raw,
    Split,
    Upstream,
    Zone,
)
from testbed.dataplane.ingress.quoting import quoted, quoted_value
from testbed.dataplane.ingress.secrets import password_file
from testbed.dataplane.ingress.settings import Settings
from testbed.dataplane.ingress.values import BadValue, header_name, header_value, refuse_control
from testbed.dataplane.ingress.world import Backends, Name, World

_CORS_CLOSED: Final = Raw('""')
_SAFE_COOKIE = re.compile(r"\w+", re.ASCII)


def digest(*parts: object) -> str:
    """Return 16 characters that stand for these values in the name of something of nginx's."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """The alternative Ingress of a location: it only says where some of the requests go instead."""

    key: IngressKey
    backend: Backend
    annotations: Annotations


class Features:
    """Adds to locations, and gathers what they need at the level of http.

    Args:
        use: has an upstream written, and returns its name.
        note: takes an Ingress and a line about it.
        add_file: takes a file's content and suffix, and returns its path.
        has_resolvers: whether names can be looked up while nginx runs.
    """

    def __init__(
        self, world: World, settings: Settings, backends: Backends, *, use: Callable[[Upstream], str],
        note: Callable[[IngressKey, str], None], add_file: Callable[[bytes, str], str], has_resolvers: bool,
    ) -> None:  # fmt: skip
        self._world = world
        self._settings = settings
        self._backends = backends
        self._use = use
        self._note = note
        self._add_file = add_file
        self._has_resolvers = has_resolvers
        self._maps: dict[str, Map] = {}
        self._splits: dict[str, Split] = {}
        self._zones: dict[str, Zone] = {}
        self._geos: dict[str, Geo] = {}
        self.caches_auth = False
        self.complicated: set[Name] = set()

    @property
    def maps(self) -> tuple[Map, ...]:
        return tuple(self._maps[name] for name in sorted(self._maps))

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._splits[name] for name in sorted(self._splits))

    @property
    def zones(self) -> tuple[Zone, ...]:
        return tuple(self._zones[name] for name in sorted(self._zones))

    @property
    def geos(self) -> tuple[Geo, ...]:
        return tuple(self._geos[name] for name in sorted(self._geos))

    def own(self, key: IngressKey, reference: Name, what: str) -> Name:
        """Return namespace and name of what an annotation refers to; ('', '') when it is another namespace's."""
        namespace = reference[0] or key.namespace
        if namespace != key.namespace and not self._settings.allow_cross_namespace_resources:
            self._note(key, f"{what}: {namespace}/{reference[1]} is in another namespace, which is not allowed")
            return "", ""
        return namespace, reference[1]

    def add(self, location: Location, canary: Canary | None) -> Location:
        """Return the location with all that its annotations ask for; ``canary``: the alternative Ingress's."""
        said, key = location.annotations, location.ingress
        assert key is not None
        if said.temporal_redirect or said.permanent_redirect:
            return location
        location = self._guards(location, said, key)
        if location.deny_reason:
            return replace(location, status=503)
        location = self._default_backend(location, said, key)
        if not location.backend.can_serve or (location.backend.external and not self._has_resolvers):
            if location.default_backend is None:
                return replace(location, status=503)
        else:
            location = self._target(location, said, canary)
        return self._extras(location, said, key)

    def _complicates(self, backend: Backend) -> None:
        """Remember that more than one upstream's servers depend on a backend's endpoints (`endpoints.py`)."""
        self.complicated.add((backend.namespace, backend.service))

    # -- where requests go -------------------------------------------------------------------------------------------

    def _target(self, location: Location, said: Annotations, canary: Canary | None) -> Location:
        place = ""
        if said.affinity or canary is not None:
            # One Ingress may have several hosts, of which each may have a canary of its own.
            place = digest(location.ingress, location.path, location.backend.name, canary.key if canary else "")
        target, sticky = self._balanced(location.backend, said, place)
        location = replace(location, target=target, sticky_header=sticky)
        if canary is not None:
            self._complicates(canary.backend)
        if canary is None or not canary.backend.servers:
            return location
        backend, rules = canary.backend, canary.annotations
        other, _ = self._balanced(backend, replace(rules, affinity=None), digest(place, "canary"))
        chosen = self._canary(place, rules, _as_value(target), _as_value(other))
        shown = f"alternative_{place}"
        rows = ((_as_value(other), Raw(quoted(backend.name))), (Raw("default"), Raw('""')))
        self._add_map(Map(source=Raw(f"${chosen}"), variable=shown, rows=rows))
        return replace(location, target=Raw(f"${chosen}"), alternative=shown)

    def _canary(self, place: str, rules: Annotations, main: Raw, other: Raw) -> str:
        """Return the variable that holds where a request goes: header first, then cookie, then weight."""
        default = main
        share = min(1.0, rules.canary_weight / rules.canary_weight_total)
        if share >= 1:
            default = other
        elif round(share * 10_000) > 0:
            name = f"split_{place}"
            # $request_id is drawn for each request.
            shares = ((f"{share * 100:.2f}%", "canary"), ("*", "main"))
            self._splits[name] = Split(variable=name, key=Raw('"$request_id"'), shares=shares)
            weighed = f"weighed_{place}"
            self._add_map(
                Map(
                    source=Raw(f"$split_{place}"),
                    variable=weighed,
                    rows=((Raw("canary"), other), (Raw("default"), main)),
                )
            )
            default = Raw(f"${weighed}")
        always_or_never = ((Raw("always"), other), (Raw("never"), main))
        if rules.canary_by_cookie:
            name = f"by_cookie_{place}"
            by_cookie = (*always_or_never, (Raw("default"), default))
            self._add_map(Map(source=self._cookie(rules.canary_by_cookie), variable=name, rows=by_cookie))
            default = Raw(f"${name}")
        name = f"canary_{place}"
        if not rules.canary_by_header:
            self._add_map(Map(source=Raw('""'), variable=name, rows=((Raw("default"), default),)))
            return name
        rows: tuple[tuple[Raw, Raw], ...] = always_or_never
        if rules.canary_by_header_value is not None:
            # quoted, and never read as an expression or as one of map's own words
            literal = Raw(quoted("\\" + rules.canary_by_header_value))
            if rules.canary_by_header_value[:1] not in ("~", "\\") and rules.canary_by_header_value not in (
                "default", "hostnames", "include", "volatile",
            ):  # fmt: skip
                literal = Raw(quoted(rules.canary_by_header_value))
            rows = ((literal, other),)
        elif rules.canary_by_header_pattern is not None:
            rows = ((Raw(quoted(f"~{rules.canary_by_header_pattern}")), other),)
        header = rules.canary_by_header.lower().replace("-", "_")
        self._add_map(Map(source=Raw(f"$http_{header}"), variable=name, rows=(*rows, (Raw("default"), default))))
        return name

    def _balanced(self, backend: Backend, said: Annotations, place: str) -> tuple[Raw, str]:
        """Return what to pass requests to, and the variable of the cookie to set ('' for none)."""
        if backend.external is not None:
            return Raw(f"$external_name:{backend.external[1]}"), ""
        if said.affinity == "cookie":
            return self._sticky(backend, said, place)
        if said.upstream_hash_by and said.upstream_hash_by_subset:
            return self._subsets(backend, said), ""
        return Raw(self._upstream(backend, said)), ""

    def _upstream(self, backend: Backend, said: Annotations) -> str:
        method = Raw("")
        if said.upstream_hash_by:
            method = Raw(f"hash {quoted_value(said.upstream_hash_by, variables=True)} consistent;")
        elif (said.load_balance or self._settings.load_balance) == "ewma":
            method = Raw("random two least_conn;")
        name = backend.name
        if said.service_upstream or method:
            # The same Service may be balanced otherwise by another Ingress.
            name = f"{name}-{digest(method, said.service_upstream)[:8]}"
        source = (backend.namespace, backend.service, backend.port)
        if said.service_upstream or backend.external is not None:
            source = ("", "", "")
        return self._use(Upstream(name=name, servers=backend.servers, method=method, source=source))

    def _subsets(self, backend: Backend, said: Annotations) -> Raw:
        self._complicates(backend)
        size = said.upstream_hash_by_subset_size
        parts = [backend.servers[at : at + size] for at in range(0, len(backend.servers), size)]
        if len(parts) > 1 and len(parts[-1]) < size:  # the last subset is filled up from the first, as upstream
            parts[-1] = (*parts[-1], *parts[0][: size - len(parts[-1])])
        place = digest(backend.name, said.upstream_hash_by, size)
        names = [
            self._use(Upstream(name=f"{backend.name}-subset-{place[:8]}-{number}", servers=servers))
            for number, servers in enumerate(parts)
        ]
        if len(names) == 1:
            return Raw(names[0])
        variable = f"subset_{place}"
        # split_clients hashes its key (MurmurHash2) and cuts the range of hashes into equal parts.
        part = f"{10_000 // len(names) / 100:.2f}%"
        shares = (*((part, name) for name in names[:-1]), ("*", names[-1]))
        key = Raw(quoted_value(str(said.upstream_hash_by), variables=True))
        self._splits[variable] = Split(variable=variable, key=key, shares=shares)
        return Raw(f"${variable}")

    def _cookie(self, name: str) -> Raw:
        """Return the variable with a cookie's value; nginx has none of its own for names with ``-``."""
        if _SAFE_COOKIE.fullmatch(name):
            return Raw(f"$cookie_{name}")
        variable = f"cookie_of_{digest(name)}"
        found = Raw(quoted(f"~(?:^|;\\s*){re.escape(name)}=([^;]*)"))
        self._add_map(
            Map(source=Raw("$http_cookie"), variable=variable, rows=((found, Raw("$1")), (Raw("default"), Raw('""'))))
        )
        return Raw(f"${variable}")

    def _sticky(self, backend: Backend, said: Annotations, place: str) -> tuple[Raw, str]:
        self._complicates(backend)
        plain = self._upstream(backend, replace(said, affinity=None))
        keys = {server: f"{digest(backend.name, server)}|{digest(backend.name)}" for server in backend.servers}
        peers = {}
        for server in backend.servers:
            others = tuple(one for one in backend.servers if one != server)
            name = f"{backend.name}-peer-{digest(backend.name, server)}"
            peers[server] = self._use(Upstream(name=name, servers=(server,), backups=others))
        target, served, header = f"sticky_{place}", f"served_{place}", f"sticky_cookie_{place}"
        rows = tuple((Raw(quoted(key)), Raw(peers[server])) for server, key in keys.items())
        source = self._cookie(said.session_cookie_name)
        self._add_map(Map(source=source, variable=target, rows=(*rows, (Raw("default"), Raw(plain)))))
        # After tries elsewhere $upstream_addr is a list; who answered comes last.
        tries = tuple(
            (Raw(quoted(f"~(?:^|[ ,:]){re.escape(server)}$")), Raw(quoted(key))) for server, key in keys.items()
        )
        self._add_map(Map(source=Raw("$upstream_addr"), variable=served, rows=(*tries, (Raw("default"), Raw('""')))))
        path = said.session_cookie_path or "/"
        parts = [f"{said.session_cookie_name}=$1", f"Path={path}"]
        if said.session_cookie_domain:
            parts.append(f"Domain={said.session_cookie_domain}")
        age = said.session_cookie_max_age if said.session_cookie_max_age is not None else said.session_cookie_expires
        if age is not None:
            parts.append(f"Max-Age={age}")
        if said.session_cookie_samesite:
            parts.append(f"SameSite={said.session_cookie_samesite}")
        if said.session_cookie_secure:
            parts.append("Secure")
        parts.append("HttpOnly")
        text = quoted("; ".join(parts))
        # New without a cookie that names a peer of today; with change-on-failure also when another peer had to answer.
        wanted = [(Raw(quoted(f"~^{re.escape(plain)}:(.+)$")), Raw(text))]
        if said.session_cookie_change_on_failure:
            wanted = [
                *((Raw(quoted(f"{peers[server]}:{key}")), Raw('""')) for server, key in keys.items()),
                (Raw(quoted("~^[^:]+:(.+)$")), Raw(text)),
            ]
        self._add_map(
            Map(source=Raw(f'"${target}:${served}"'), variable=header, rows=(*wanted, (Raw("default"), Raw('""'))))
        )
        return Raw(f"${target}"), header

    def _default_backend(self, location: Location, said: Annotations, key: IngressKey) -> Location:
        name = said.default_backend
        backend = self._backends.first_port(key.namespace, name) if name else None
        codes = said.custom_http_errors or self._settings.custom_http_errors
        if backend is not None:
            self._complicates(backend)
        if backend is None or not backend.servers:
            return location
        self._use(Upstream(name=backend.name, servers=backend.servers))
        if codes:
            pages = ErrorPages(codes=codes, location=f"@errors_{digest(backend.name)}", backend=backend)
            location = replace(location, error_pages=pages)
        return location if location.backend.can_serve else replace(location, default_backend=backend)

    # -- who may send requests ---------------------------------------------------------------------------------------

    def _guards(self, location: Location, said: Annotations, key: IngressKey) -> Location:
        if said.auth_type == "basic":
            if said.auth_secret is None:
                return replace(location, deny_reason="auth-secret is missing")
            namespace, name = self.own(key, said.auth_secret, "auth-secret")
            try:
                content = password_file(self._world.secrets.get((namespace, name)), said.auth_secret_type)
            except BadValue as error:
                self._note(key, f"auth-secret {namespace}/{name}: {error}; the location is closed")
                return replace(location, deny_reason=str(error))
            location = replace(location, auth_file=self._add_file(content, "htpasswd"))
        if said.auth_url:
            if not self._has_resolvers:
                return replace(location, deny_reason="auth-url: there is no DNS server to ask")
            location = replace(location, external_auth=self._external_auth(said, key, location))
        limits = self._limits(said, key)
        return replace(location, limits=limits) if limits else location

    def _external_auth(self, said: Annotations, key: IngressKey, location: Location) -> ExternalAuth:
        place = digest(key, location.path, "auth")
        url = str(said.auth_url)
        headers: tuple[tuple[str, str], ...] = ()
        if said.auth_proxy_set_headers:
            headers = self._headers_of(key, said.auth_proxy_set_headers, "auth-proxy-set-headers")
        if said.auth_cache_key:
            self.caches_auth = True
        signin = ""
        if said.auth_signin:
            parameter = said.auth_signin_redirect_param or "rd"
            joiner = "&" if "?" in said.auth_signin else "?"
            signin = said.auth_signin
            if not re.search(rf"[?&]{re.escape(parameter)}=", signin):
                signin += f"{joiner}{parameter}=$pass_access_scheme://$http_host$escaped_request_uri"
        return ExternalAuth(
            location=f"/_external-auth-{place}",
            url=url,
            host=urlsplit(url.split("$")[0]).netloc,
            signin_location=f"@signin_{place}" if signin else "",
            signin=signin,
            response_headers=tuple((name, f"auth_header_{digest(name)}") for name in said.auth_response_headers),
            set_headers=headers,
        )

    def _headers_of(self, key: IngressKey, reference: Name, what: str) -> tuple[tuple[str, str], ...]:
        """Return the headers that a ConfigMap holds; those that cannot be headers are left out."""
        namespace, name = self.own(key, reference, what)
        data = (self._world.configmaps.get((namespace, name)) or {}).get("data") or {}
        if not name or (namespace, name) not in self._world.configmaps:
            self._note(key, f"{what}: ConfigMap {reference[0] or key.namespace}/{reference[1]} is not there")
        found = []
        for header in sorted(data):
            try:
                found.append((header_name(header), str(header_value(refuse_control(str(data[header]))))))
            except BadValue as error:
                self._note(
                    key, f"{what}: header {header[:100]!r} of ConfigMap {namespace}/{name} {error}; it is left out"
                )
        return tuple(found)

    def _limits(self, said: Annotations, key: IngressKey) -> tuple[Raw, ...]:
        if not (said.limit_rps or said.limit_rpm or said.limit_connections):
            return ()
        wanted = []
        place = digest(key, "limit")
        limit_key = Raw("$binary_remote_addr")
        if said.limit_allowlist:
            self._geos[f"exempt_{place}"] = Geo(variable=f"exempt_{place}", networks=said.limit_allowlist)
            rows = ((Raw("0"), Raw("$binary_remote_addr")), (Raw("1"), Raw('""')))
            self._add_map(Map(source=Raw(f"$exempt_{place}"), variable=f"limited_{place}", rows=rows))
            limit_key = Raw(f"$limited_{place}")
        for rate, unit in ((said.limit_rps, "s"), (said.limit_rpm, "m")):
            if rate:
                zone = f"requests_{unit}_{place}"
                self._zones[zone] = Zone(name=zone, key=limit_key, rate=f"{rate}r/{unit}")
                burst = min(rate * said.limit_burst_multiplier, 2**30)
                wanted.append(Raw(f"limit_req zone={zone} burst={burst} nodelay;"))
        if said.limit_connections:
            zone = f"connections_{place}"
            self._zones[zone] = Zone(name=zone, key=limit_key)
            wanted.append(Raw(f"limit_conn {zone} {said.limit_connections};"))
        return tuple(wanted)

    # -- what is said in the answer, and to others -------------------------------------------------------------------

    def _extras(self, location: Location, said: Annotations, key: IngressKey) -> Location:
        if said.enable_cors:
            location = replace(location, cors=self._cors(said, key))
        if said.mirror_target:
            location = replace(location, mirror=f"/_mirror-{digest(key, said.mirror_target)}")
        if said.custom_headers:
            headers = self._headers_of(key, said.custom_headers, "custom-headers")
            allowed = {name.lower() for name in self._settings.global_allowed_response_headers}
            for name, _ in headers:
                if name.lower() not in allowed:
                    self._note(key, f"custom-headers: {name} is not in global-allowed-response-headers; it is left out")
            location = replace(
                location, response_headers=tuple(pair for pair in headers if pair[0].lower() in allowed)
            )  # fmt: skip
        return location

    def _cors(self, said: Annotations, key: IngressKey) -> Cors:
        place = digest(key, "cors", *said.cors_allow_origin)
        origin, preflight, credentials = f"cors_{place}", f"preflight_{place}", f"cors_credentials_{place}"
        if "*" in said.cors_allow_origin:
            rows: tuple[tuple[Raw, Raw], ...] = ((Raw("default"), Raw('"*"')),)
        else:
            rows = tuple(
                (Raw(quoted(f"~*^{_origin_regex(one)}$")), Raw("$http_origin")) for one in said.cors_allow_origin
            )
            rows += ((Raw("default"), _CORS_CLOSED),)
        self._add_map(Map(source=Raw("$http_origin"), variable=origin, rows=rows))
        self._add_map(
            Map(
                source=Raw(f'"$request_method:${origin}"'),
                variable=preflight,
                rows=((Raw(quoted("~^OPTIONS:.")), Raw('"1"')), (Raw("default"), Raw('""'))),
            )
        )
        self._add_map(
            Map(
                source=Raw(f"${origin}"),
                variable=credentials,
                rows=((Raw('""'), Raw('""')), (Raw("default"), Raw('"true"'))),
            )
        )
        return Cors(
            origin=origin, preflight=preflight, credentials=credentials if said.cors_allow_credentials else ""
        )  # fmt: skip

    def _add_map(self, made: Map) -> None:
        self._maps[made.variable] = made


def _as_value(target: Raw) -> Raw:
    return target if target.startswith("$") else Raw(quoted(target))


def _origin_regex(origin: str) -> str:
    """Return an expression for an origin; ``*.`` stands for one label, and one without scheme for http and https."""
    scheme, separator, rest = origin.partition("://")
    if not separator:
        scheme, rest = "https?", origin
    if origin == "null":
        return "null"
    wildcard = rest.startswith("*.")
    host = re.escape(rest.removeprefix("*."))
    return f"{scheme}://" + (rf"([A-Za-z0-9-]+\.){host}" if wildcard else host)
