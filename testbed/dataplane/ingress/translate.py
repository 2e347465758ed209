"""From objects to nginx's configuration as values. Pure: the same objects give the same document.

::

    Ingress rules ──▶ one Server a host ──▶ locations, in the order in which nginx must try them
    backend of a path ──▶ Service port ──▶ ready endpoints of its EndpointSlices ──▶ Upstream

Hostile objects may come in (admission is not everywhere): whatever does not pass its check is left out, noted, and
changes nothing else.

Source: kubernetes/ingress-nginx internal/ingress/controller/controller.go (v1.10), and reference behaviour of its
nginx.tmpl; decisions that differ from it are in docs/ingress.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from testbed.dataplane.ingress.annotations import Annotations, parse_annotations
from testbed.dataplane.ingress.features import Canary, Features
from testbed.dataplane.ingress.model import (
    Backend,
    ClientCertificates,
    Document,
    IngressKey,
    Location,
    Raw,
    Server,
    Upstream,
)
from testbed.dataplane.ingress.secrets import KeyPair, authority, file_name, key_pair
from testbed.dataplane.ingress.settings import Options, Settings
from testbed.dataplane.ingress.values import BadValue, refuse_control, regex
from testbed.dataplane.ingress.world import Backends, Name, World, key_of, our_ingresses
from testbed.model.objects import Object

CATCH_ALL: Final = "_"
DEFAULT_BACKEND: Final = "upstream-default-backend"
_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_PATH = re.compile(r"/[^\x00-\x20\x7f-\x9f\"'\\;{}#$\u2028\u2029]*")
_STRICT_PATH = re.compile(r"/[A-Za-z0-9._/-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An Ingress with its annotations read."""

    ingress: Object
    key: IngressKey
    annotations: Annotations


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRule:
    """One path of a rule; ``order`` is its place among all, so that the oldest comes first."""

    host: str
    path: str
    path_type: str
    backend: Object | None
    source: Parsed
    order: int


@dataclass(slots=True)
class _Host:
    """A server in the making."""

    name: str
    rules: dict[tuple[str, str], PathRule] = field(default_factory=dict)
    canaries: dict[tuple[str, str], PathRule] = field(default_factory=dict)
    sources: list[Parsed] = field(default_factory=list)
    fallback: PathRule | None = None  # what takes '/' when no rule does

    @property
    def uses_regex(self) -> bool:
        """Say whether one of its Ingresses makes every location of this host a regular expression."""
        return any(
            rule.source.annotations.use_regex or _rewrites(rule)
            for rule in self.rules.values()
        )  # fmt: skip


def _rewrites(rule: PathRule) -> bool:
    target = rule.source.annotations.rewrite_target
    return target is not None and target != rule.path


def translate(
    world: World, options: Options, *, default_certificate: bytes = b"", resolvers: tuple[str, ...] = ()
) -> Document:
    """Return the configuration for these objects.

    Args:
        default_certificate: PEM of the certificate and key for hosts that have none.
        resolvers: addresses of DNS servers, for ExternalName Services and external authentication.
    """
    return _Translation(world, options, default_certificate, resolvers).run()


def path_problem(path: str, path_type: str, annotations: Annotations, settings: Settings) -> str:
    """Return why a path may not be used, or ''."""
    try:
        refuse_control(path)
    except BadValue as error:
        return str(error)
    if not path.startswith("/"):
        return "must be an absolute path"
    if path_type == "ImplementationSpecific" and (annotations.use_regex or annotations.rewrite_target is not None):
        try:
            regex(path)
        except BadValue as error:
            return str(error)
        return ""
    if path_type in ("Exact", "Prefix") and settings.strict_validate_path_type:
        if not _STRICT_PATH.fullmatch(path):
            return f"path {path} cannot be used with pathType {path_type}"
    elif not _PATH.fullmatch(path):
        return "must not contain blanks, quotes, or any of ; { } # $ and \\"
    return ""


def host_problem(host: str) -> str:
    """Return why a host may not be used, or ''."""
    return "" if len(host) <= 253 and _HOST.fullmatch(host) else "must be a host name, or one after '*.'"


class _Translation:
    """One run; collects what is found on the way."""

    def __init__(
        self, world: World, options: Options, default_certificate: bytes, resolvers: tuple[str, ...]
    ) -> None:  # fmt: skip
        self._world = world
        self._options = options
        self._resolvers = resolvers
        self._settings, self._settings_notes = world.settings(options)
        self._backends = Backends(world, options)
        self._upstreams: dict[str, Upstream] = {}
        self._notes: list[tuple[IngressKey, str]] = []
        self._files: dict[str, bytes] = {}
        self._default_certificate = default_certificate
        self._pairs: dict[Name, KeyPair | None] = {}
        self._default = self._default_backend()
        self._features = Features(
            world, self._settings, self._backends, use=self._use, note=self._note, add_file=self._add_file,
            has_resolvers=bool(resolvers),
        )  # fmt: skip

    def run(self) -> Document:
        parsed = [self._parse(one) for one in our_ingresses(self._world, self._options)]
        hosts = self._hosts(parsed)
        aliases = self._aliases(hosts)
        redirects = self._www_redirects(hosts)
        servers = tuple(
            self._server(hosts[name], aliases.get(name, ()), redirects.get(name, "")) for name in sorted(hosts)
        )
        default = self._named_pair(self._options.default_ssl_certificate)
        pem = default.pem if default else self._default_certificate
        return Document(
            settings=self._settings,
            options=self._options,
            resolvers=self._resolvers,
            default_certificate=self._add_file(pem, "pem") if pem else "",
            upstreams=tuple(self._upstreams[name] for name in sorted(self._upstreams, key=_upstream_order)),
            servers=servers,
            maps=self._features.maps,
            splits=self._features.splits,
            zones=self._features.zones,
            geos=self._features.geos,
            files=dict(sorted(self._files.items())),
            notes=tuple(self._notes),
            caches_auth=self._features.caches_auth,
            referenced=self._backends.referenced,
            complicated=frozenset(self._features.complicated | self._default_service()),
        )

    # -- what every part may use -------------------------------------------------------------------------------------

    def _note(self, key: IngressKey, text: str) -> None:
        self._notes.append((key, text))

    def _add_file(self, content: bytes, suffix: str) -> str:
        path = file_name(content, suffix)
        self._files[path] = content
        return path

    def _use(self, upstream: Upstream) -> str:
        """Have an upstream written, and return its name."""
        self._upstreams[upstream.name] = upstream
        return upstream.name

    # -- reading Ingresses -------------------------------------------------------------------------------------------

    def _parse(self, ingress: Object) -> Parsed:
        settings = self._settings
        annotations, problems = parse_annotations(
            ingress["metadata"].get("annotations") or {},
            most_risk=settings.annotations_risk_level,
            blocked_words=settings.annotation_value_word_blocklist,
        )
        key = key_of(ingress)
        for problem in problems:
            self._note(key, f"{problem.message}; it is ignored")
        return Parsed(ingress=ingress, key=key, annotations=annotations)

    def _hosts(self, parsed: Iterable[Parsed]) -> dict[str, _Host]:
        hosts = {CATCH_ALL: _Host(CATCH_ALL)}
        order = 0
        for source in parsed:
            spec = source.ingress.get("spec") or {}
            for rule in spec.get("rules") or ():
                name = str(rule.get("host") or "") or CATCH_ALL
                if name != CATCH_ALL and host_problem(name):
                    self._note(source.key, f"host {name!r} {host_problem(name)}; it is ignored")
                    continue
                found = hosts.setdefault(name, _Host(name))
                for path in (rule.get("http") or {}).get("paths") or ():
                    order += 1
                    self._add_rule(found, path, source, order)
                # A canary says nothing about the server as a whole.
                if source not in found.sources and not source.annotations.canary:
                    found.sources.append(source)
            order += 1
            self._add_fallbacks(hosts, spec, source, order)
        return hosts

    def _add_rule(self, host: _Host, path: Object, source: Parsed, order: int) -> None:
        text, path_type = str(path.get("path") or "/"), str(path.get("pathType") or "ImplementationSpecific")
        problem = path_problem(text, path_type, source.annotations, self._settings)
        if problem:
            self._note(source.key, f"path {text[:200]!r} of host {host.name!r} {problem}; it is ignored")
            return
        rule = PathRule(
            host=host.name, path=text, path_type=path_type, backend=path.get("backend"), source=source, order=order
        )  # fmt: skip
        table = host.canaries if source.annotations.canary else host.rules
        first = table.setdefault((text, path_type), rule)
        if first is not rule:
            words = f"host {host.name!r} and path {text!r} is already defined in ingress {first.source.key}"
            self._note(source.key, f"{words}; the older one serves")

    def _add_fallbacks(self, hosts: dict[str, _Host], spec: Object, source: Parsed, order: int) -> None:
        """Take ``spec.defaultBackend`` as '/' of the Ingress's hosts; without rules, of the server for all others."""
        if spec.get("defaultBackend") is None or source.annotations.canary:
            return
        names = [str(rule.get("host") or "") or CATCH_ALL for rule in spec.get("rules") or ()] or [CATCH_ALL]
        for name in names:
            host = hosts.get(name)
            if host is not None and host.fallback is None:
                host.fallback = PathRule(
                    host=name, path="/", path_type="Prefix", backend=spec["defaultBackend"], source=source, order=order
                )  # fmt: skip
                if source not in host.sources:
                    host.sources.append(source)

    def _aliases(self, hosts: dict[str, _Host]) -> dict[str, tuple[str, ...]]:
        taken = set(hosts)
        found: dict[str, tuple[str, ...]] = {}
        for host in sorted(hosts.values(), key=lambda one: one.name):
            if host.name == CATCH_ALL:
                continue
            for source in host.sources:
                wanted = [alias.lower() for alias in source.annotations.server_alias]
                if not wanted or host.name in found:
                    continue
                free = [alias for alias in wanted if alias not in taken and not host_problem(alias)]
                for alias in set(wanted) - set(free):
                    self._note(source.key, f"server-alias {alias!r} is somebody else's host; it is ignored")
                taken.update(free)
                found[host.name] = tuple(free)
        return found

    def _www_redirects(self, hosts: dict[str, _Host]) -> dict[str, str]:
        """Return host -> the other of ``foo`` and ``www.foo``, whose requests are sent to it."""
        found = {}
        for name, host in hosts.items():
            if (
                name == CATCH_ALL
                or name.startswith("*")
                or not any(one.annotations.from_to_www_redirect for one in host.sources)
            ):
                continue
            other = name.removeprefix("www.") if name.startswith("www.") else f"www.{name}"
            if other not in hosts:
                found[name] = other
        return found

    # -- servers -----------------------------------------------------------------------------------------------------

    def _server(self, host: _Host, aliases: tuple[str, ...], www_redirect: str) -> Server:
        pair, secret_name = self._certificate(host)
        has_tls = pair is not None
        client, ciphers, prefers = None, "", None
        app_root = ""
        for source in host.sources:  # the first Ingress to say something about the server as a whole is heard
            client = client or self._client_certificates(source)
            ciphers = ciphers or source.annotations.ssl_ciphers or ""
            app_root = app_root or source.annotations.app_root or ""
            if prefers is None:
                prefers = source.annotations.ssl_prefer_server_ciphers
        return Server(
            host=host.name,
            locations=tuple(self._locations(host, has_tls=has_tls, has_client_certificates=client is not None)),
            aliases=aliases,
            certificate=self._add_file(pair.pem, "pem") if pair else "",
            certificate_secret=secret_name,
            certificate_expires_s=pair.expires_s if pair else 0.0,
            app_root=app_root,
            www_redirect=www_redirect,
            client_certificates=client,
            ssl_ciphers=ciphers,
            prefers_own_ciphers=prefers,
        )

    def _certificate(self, host: _Host) -> tuple[KeyPair | None, str]:
        """Return the certificate of a host, and the name of its Secret.

        It is that of the first TLS section that names the host, else any listed one that covers it.
        """
        sections = [
            (source, section)
            for source in host.sources
            for section in (source.ingress.get("spec") or {}).get("tls") or ()
        ]
        for source, section in sections:
            if host.name in [str(name).lower() for name in section.get("hosts") or ()]:
                # Without a Secret of its own the host still has TLS: with the default certificate (and the redirect).
                own = self._section_pair(source, section)
                return (own, str(section["secretName"])) if own else (self._default_pair(), "")
        for source, section in sections:
            pair = self._section_pair(source, section)
            if pair is not None and pair.covers(host.name):
                return pair, str(section["secretName"])
        return None, ""

    def _section_pair(self, source: Parsed, section: Object) -> KeyPair | None:
        name = str(section.get("secretName") or "")
        if not name:
            return None
        place = (source.key.namespace, name)
        if place not in self._pairs:
            self._pairs[place] = key_pair(self._world.secrets.get(place))
        if self._pairs[place] is None:
            state = "is not there" if place not in self._world.secrets else "holds no certificate with its key"
            self._note(source.key, f"Secret {place[0]}/{place[1]} {state}; the default certificate is used")
        return self._pairs[place]

    def _default_pair(self) -> KeyPair | None:
        named = self._named_pair(self._options.default_ssl_certificate)
        if named is not None:
            return named
        return KeyPair(self._default_certificate, (), 0.0) if self._default_certificate else None

    def _named_pair(self, reference: str) -> KeyPair | None:
        namespace, slash, name = reference.partition("/")
        return key_pair(self._world.secrets.get((namespace, name))) if slash else None

    def _client_certificates(self, source: Parsed) -> ClientCertificates | None:
        said = source.annotations
        if said.auth_tls_secret is None or said.auth_tls_verify_client == "off":
            return None
        namespace, name = self._features.own(source.key, said.auth_tls_secret, "auth-tls-secret")
        pem = authority(self._world.secrets.get((namespace, name))) if name else None
        if pem is None:
            self._note(source.key, f"auth-tls-secret: Secret {namespace}/{name} holds no ca.crt; nobody is let in")
            return ClientCertificates(authority_file="", verify="on", depth=0)
        return ClientCertificates(
            authority_file=self._add_file(pem, "ca.pem"),
            verify=said.auth_tls_verify_client,
            depth=said.auth_tls_verify_depth,
            match_cn=said.auth_tls_match_cn or "",
            error_page=said.auth_tls_error_page or "",
            passes_on=said.auth_tls_pass_certificate_to_upstream,
        )

    # -- locations ---------------------------------------------------------------------------------------------------

    def _locations(self, host: _Host, *, has_tls: bool, has_client_certificates: bool) -> Iterator[Location]:
        by_regex = host.uses_regex
        rules = sorted(host.rules.values(), key=_location_order)
        # An Exact path keeps its '=' whatever a Prefix beside it would also like to have it for.
        claimed = set() if by_regex else {("=", rule.path) for rule in rules if rule.path_type == "Exact"}
        made: dict[tuple[str, str], Location] = {}
        for rule in rules:
            template: Location | None = None
            for key in location_keys(rule, by_regex=by_regex):
                if key in made or (key in claimed and rule.path_type != "Exact"):
                    continue
                if template is None:
                    template = self._location(host, rule, has_tls=has_tls)
                    if has_client_certificates:
                        template = replace(template, upstream_tls_checks=True)
                made[key] = replace(template, modifier=key[0], uri=key[1])
        if ("", "/") not in made:
            made[("", "/")] = self._root(host, has_tls=has_tls)
        yield from made.values()
        # Asked for /foo, nginx would send the client on to an Exact /foo/ (301): Exact means that it goes elsewhere.
        for modifier, uri in list(made):
            bare = uri.rstrip("/")
            if modifier == "=" and uri.endswith("/") and bare and ("=", bare) not in made:
                longest = max((text for kind, text in made if not kind and bare.startswith(text)), key=len)
                yield replace(made[("", longest)], modifier="=", uri=bare)

    def _root(self, host: _Host, *, has_tls: bool) -> Location:
        """Return the '/' of a server that no rule gives: the Ingress's own default backend, or everybody's."""
        if host.fallback is not None:
            return replace(self._location(host, host.fallback, has_tls=has_tls), modifier="", uri="/")
        first = host.sources[0].key if host.sources and host.name != CATCH_ALL else None
        return Location(
            modifier="", uri="/", ingress=first, path="/", backend=self._default,
            target=Raw(self._use(Upstream(name=DEFAULT_BACKEND, servers=self._default.servers))),
        )  # fmt: skip

    def _default_service(self) -> set[Name]:
        namespace, slash, name = self._options.default_backend_service.partition("/")
        return {(namespace, name)} if slash else set()

    def _default_backend(self) -> Backend:
        namespace, _, name = self._options.default_backend_service.partition("/")
        if name:
            found = self._backends.first_port(namespace, name)
            if found.servers:
                return replace(found, name=DEFAULT_BACKEND)
        own = f"127.0.0.1:{self._options.default_server_port}"
        return Backend(name=DEFAULT_BACKEND, namespace="", service="", port="", servers=(own,))

    def _location(self, host: _Host, rule: PathRule, *, has_tls: bool) -> Location:
        source, said = rule.source, rule.source.annotations
        backend = self._backends.find(source.key.namespace, rule.backend, cluster_ip=said.service_upstream)
        location = Location(
            modifier="", uri="", ingress=source.key, path=rule.path, backend=backend, annotations=said,
            rewrite=(rule.path, said.rewrite_target) if said.rewrite_target is not None and _rewrites(rule) else None,
            redirects_to_tls=self._redirects_to_tls(said, has_tls=has_tls),
        )  # fmt: skip
        canary = host.canaries.get((rule.path, rule.path_type))
        alternative = None
        if canary is not None:
            alternative = Canary(
                key=canary.source.key,
                backend=self._backends.find(canary.source.key.namespace, canary.backend),
                annotations=canary.source.annotations,
            )
        return self._features.add(location, alternative)

    def _redirects_to_tls(self, said: Annotations, *, has_tls: bool) -> bool:
        settings = self._settings
        forced = settings.force_ssl_redirect if said.force_ssl_redirect is None else said.force_ssl_redirect
        wanted = settings.ssl_redirect if said.ssl_redirect is None else said.ssl_redirect
        return forced or (has_tls and wanted)


def _upstream_order(name: str) -> tuple[bool, str]:
    """The default backend first: nearly every server names it, and nginx goes through upstreams from the first on."""
    return name != DEFAULT_BACKEND, name


def _location_order(rule: PathRule) -> tuple[int, tuple[int, ...], int, int]:
    """Longest path first, then the greater text, then Exact: the order in which expressions must be tried."""
    return -len(rule.path), tuple(-ord(char) for char in rule.path), rule.path_type != "Exact", rule.order


def location_keys(rule: PathRule, *, by_regex: bool) -> list[tuple[str, str]]:
    """Return modifier and argument of the ``location`` blocks that stand for one path.

    A Prefix is made of elements, so ``/foo`` takes ``/foo`` and ``/foo/…`` but not ``/foox``. A Prefix ``/foo/`` takes
    ``/foo`` too, to which nginx on its own would answer 301 (docs/ingress.md).
    """
    path = rule.path
    own = rule.source.annotations
    if by_regex:
        is_own_regex = own.use_regex or own.rewrite_target is not None
        if rule.path_type == "Prefix" and not is_own_regex and not path.endswith("/"):
            return [("~*", f"^{path}/"), ("~*", f"^{path}")]
        return [("~*", f"^{path}")]
    if rule.path_type == "Exact":
        return [("=", path)]
    if rule.path_type == "Prefix" and path != "/":
        bare = path.rstrip("/")
        return [("", f"{bare}/"), ("=", bare)] if bare else [("", "/")]
    return [("", path)]
