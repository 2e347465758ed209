"""The annotations of an Ingress: names, checks, defaults and risks.

A text that its check refuses is a problem for the admission webhook, which names the annotation; the generator, which may
meet such an object all the same (written while the webhook was away), goes on as if the annotation were not there.

Source: kubernetes/ingress-nginx internal/ingress/annotations (v1.10 to v1.15).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cache
from typing import Any, Final

from testbed.dataplane.ingress import values
from testbed.dataplane.ingress.values import BadValue, Check

PREFIX: Final = "nginx.ingress.kubernetes.io/"
SNIPPETS: Final = ("auth-snippet", "configuration-snippet", "modsecurity-snippet", "server-snippet", "stream-snippet")
ALIASES: Final = {"whitelist-source-range": "allowlist-source-range", "limit-whitelist": "limit-allowlist"}


class Risk(IntEnum):
    """How much an annotation lets its author do beyond his own Ingress."""

    LOW = 0
    MEDIUM = 1
    HIGH = 2
    CRITICAL = 3


def _annotation(check: Check, default: Any = None, risk: Risk = Risk.LOW) -> Any:
    return field(default=default, metadata={"check": check, "risk": risk})


_CIDRS = values.several(values.cidr, "addresses and CIDRs")
_TIMEOUT = values.integer(1, 2_147_483)
_SWITCH = values.one_of("on", "off")
_HEADERS = values.several(values.header_name, "header names")
_COOKIE_AGE = values.integer(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What the annotations of one Ingress say. None: not given, so that the ConfigMap or nginx decides.

    A field is its annotation's name with ``_`` for ``-``.
    """

    # where requests go
    rewrite_target: str | None = _annotation(values.rewrite_target, risk=Risk.MEDIUM)
    use_regex: bool = _annotation(values.boolean, False)
    app_root: str | None = _annotation(values.plain_path, risk=Risk.MEDIUM)
    permanent_redirect: str | None = _annotation(values.redirect_target, risk=Risk.MEDIUM)
    permanent_redirect_code: int = _annotation(values.status_code, 301)
    temporal_redirect: str | None = _annotation(values.redirect_target, risk=Risk.MEDIUM)
    temporal_redirect_code: int = _annotation(values.status_code, 302)
    from_to_www_redirect: bool = _annotation(values.boolean, False)
    ssl_redirect: bool | None = _annotation(values.boolean)
    force_ssl_redirect: bool | None = _annotation(values.boolean)
    preserve_trailing_slash: bool | None = _annotation(values.boolean)
    server_alias: tuple[str, ...] = _annotation(values.several(values.host, "host names"), (), Risk.HIGH)

    # the backend
    backend_protocol: str = _annotation(
        values.one_of("HTTP", "HTTPS", "GRPC", "GRPCS", "FCGI", "AUTO_HTTP", upper=True), "HTTP"
    )
    service_upstream: bool = _annotation(values.boolean, False)
    default_backend: str | None = _annotation(values.object_name)
    upstream_vhost: str | None = _annotation(values.host_and_port)
    upstream_hash_by: str | None = _annotation(values.hash_key, risk=Risk.HIGH)
    upstream_hash_by_subset: bool = _annotation(values.boolean, False)
    upstream_hash_by_subset_size: int = _annotation(values.integer(1, 1000), 3)
    load_balance: str | None = _annotation(values.one_of("round_robin", "ewma"))
    affinity: str | None = _annotation(values.one_of("cookie"))
    affinity_mode: str = _annotation(values.one_of("balanced", "persistent"), "balanced")
    session_cookie_name: str = _annotation(values.token, "INGRESSCOOKIE")
    session_cookie_path: str | None = _annotation(values.plain_path)
    session_cookie_domain: str | None = _annotation(values.host)
    session_cookie_max_age: int | None = _annotation(_COOKIE_AGE)
    session_cookie_expires: int | None = _annotation(_COOKIE_AGE)
    session_cookie_samesite: str | None = _annotation(values.one_of("Strict", "Lax", "None"))
    session_cookie_secure: bool = _annotation(values.boolean, False)
    session_cookie_change_on_failure: bool = _annotation(values.boolean, False)
    canary: bool = _annotation(values.boolean, False)
    canary_by_header: str | None = _annotation(values.header_name)
    canary_by_header_value: str | None = _annotation(values.header_value)
    canary_by_header_pattern: str | None = _annotation(values.regex)
    canary_by_cookie: str | None = _annotation(values.token)
    canary_weight: int = _annotation(values.integer(0, 1_000_000), 0)
    canary_weight_total: int = _annotation(values.integer(1, 1_000_000), 100)

    # how a request is passed on
    proxy_body_size: str | None = _annotation(values.body_size, risk=Risk.MEDIUM)
    client_body_buffer_size: str | None = _annotation(values.buffer_size)
    proxy_connect_timeout: int | None = _annotation(_TIMEOUT)
    proxy_read_timeout: int | None = _annotation(_TIMEOUT)
    proxy_send_timeout: int | None = _annotation(_TIMEOUT)
    proxy_buffering: str | None = _annotation(_SWITCH)
    proxy_buffer_size: str | None = _annotation(values.buffer_size)
    proxy_buffers_number: int | None = _annotation(values.integer(2, 1024))
    proxy_max_temp_file_size: str | None = _annotation(values.body_size)
    proxy_request_buffering: str | None = _annotation(_SWITCH)
    proxy_next_upstream: str | None = _annotation(values.retry_conditions, risk=Risk.MEDIUM)
    proxy_next_upstream_timeout: int | None = _annotation(values.integer(0, 86400))
    proxy_next_upstream_tries: int | None = _annotation(values.integer(0, 1000))
    proxy_http_version: str | None = _annotation(values.one_of("1.0", "1.1"))
    proxy_redirect_from: str | None = _annotation(
        lambda text: text if text in ("off", "default") else values.redirect_target(text), risk=Risk.MEDIUM
    )
    proxy_redirect_to: str | None = _annotation(
        lambda text: text if text == "off" else values.redirect_target(text), risk=Risk.MEDIUM
    )
    proxy_cookie_path: tuple[str, str] | None = _annotation(
        values.pair(values.plain_path, values.plain_path, " ", "two paths")
    )
    proxy_cookie_domain: tuple[str, str] | None = _annotation(
        values.pair(values.host, values.host, " ", "two host names")
    )
    connection_proxy_header: str | None = _annotation(values.token)
    x_forwarded_prefix: str | None = _annotation(values.plain_path)
    custom_headers: tuple[str, str] | None = _annotation(values.reference, risk=Risk.MEDIUM)
    enable_access_log: bool = _annotation(values.boolean, True)
    mirror_target: str | None = _annotation(values.url(variables=True), risk=Risk.HIGH)
    mirror_host: str | None = _annotation(values.host_and_port, risk=Risk.HIGH)
    mirror_request_body: str | None = _annotation(_SWITCH)
    custom_http_errors: tuple[int, ...] = _annotation(values.several(values.status_code, "status codes"), ())

    # limits and guards
    limit_connections: int | None = _annotation(values.integer(1, 1_000_000))
    limit_rps: int | None = _annotation(values.integer(1, 1_000_000))
    limit_rpm: int | None = _annotation(values.integer(1, 1_000_000))
    limit_burst_multiplier: int = _annotation(values.integer(1, 10_000), 5)
    limit_rate: int | None = _annotation(values.integer(0, 1 << 20))
    limit_rate_after: int | None = _annotation(values.integer(0, 1 << 20))
    limit_allowlist: tuple[str, ...] = _annotation(_CIDRS, ())
    allowlist_source_range: tuple[str, ...] = _annotation(_CIDRS, (), Risk.MEDIUM)
    denylist_source_range: tuple[str, ...] = _annotation(_CIDRS, (), Risk.MEDIUM)
    satisfy: str | None = _annotation(values.one_of("all", "any"))
    auth_type: str | None = _annotation(values.one_of("basic"))
    auth_secret: tuple[str, str] | None = _annotation(values.reference, risk=Risk.MEDIUM)
    auth_secret_type: str = _annotation(values.one_of("auth-file", "auth-map"), "auth-file")
    auth_realm: str = _annotation(values.realm, "Authentication Required", Risk.MEDIUM)
    auth_url: str | None = _annotation(values.url(variables=True), risk=Risk.HIGH)
    auth_method: str | None = _annotation(values.method)
    auth_signin: str | None = _annotation(values.redirect_target, risk=Risk.HIGH)
    auth_signin_redirect_param: str | None = _annotation(values.token)
    auth_response_headers: tuple[str, ...] = _annotation(_HEADERS, (), Risk.MEDIUM)
    auth_proxy_set_headers: tuple[str, str] | None = _annotation(values.reference, risk=Risk.MEDIUM)
    auth_cache_key: str | None = _annotation(values.hash_key, risk=Risk.MEDIUM)
    auth_cache_duration: str | None = _annotation(values.matching(
        re.compile(r"([1-5][0-9]{2} )*[0-9]{1,6}[smhd]", re.ASCII), "status codes and a time, 200 202 401 5m"
    ))  # fmt: skip
    auth_tls_secret: tuple[str, str] | None = _annotation(values.reference, risk=Risk.MEDIUM)
    auth_tls_verify_client: str = _annotation(values.one_of("on", "off", "optional", "optional_no_ca"), "on")
    auth_tls_verify_depth: int = _annotation(values.integer(0, 100), 1)
    auth_tls_match_cn: str | None = _annotation(values.cn_pattern, risk=Risk.HIGH)
    auth_tls_error_page: str | None = _annotation(values.redirect_target, risk=Risk.HIGH)
    auth_tls_pass_certificate_to_upstream: bool = _annotation(values.boolean, False)
    ssl_ciphers: str | None = _annotation(
        values.matching(re.compile(r"[A-Za-z0-9!:+@=_-]{1,512}", re.ASCII), "a list of OpenSSL ciphers")
    )
    ssl_prefer_server_ciphers: bool | None = _annotation(values.boolean)

    # CORS
    enable_cors: bool = _annotation(values.boolean, False)
    cors_allow_origin: tuple[str, ...] = _annotation(values.several(values.origin, "origins"), ("*",), Risk.MEDIUM)
    cors_allow_methods: tuple[str, ...] = _annotation(
        values.several(values.method, "methods"), ("GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")
    )
    cors_allow_headers: tuple[str, ...] = _annotation(_HEADERS, (
        "DNT", "Keep-Alive", "User-Agent", "X-Requested-With", "If-Modified-Since", "Cache-Control", "Content-Type",
        "Range", "Authorization",
    ), Risk.MEDIUM)  # fmt: skip
    cors_allow_credentials: bool = _annotation(values.boolean, True)
    cors_max_age: int = _annotation(values.integer(0), 1_728_000)
    cors_expose_headers: tuple[str, ...] = _annotation(
        values.several(lambda text: text if text == "*" else values.header_name(text), "header names"), (), Risk.MEDIUM
    )


@dataclass(frozen=True, slots=True)
class AnnotationProblem:
    """An annotation that is not used, and why, as upstream's webhook words it."""

    name: str
    message: str


@cache
def _table() -> Mapping[str, tuple[str, Check, Risk]]:
    """Return annotation name (without prefix) -> field, check, risk."""
    table = {
        one.name.replace("_", "-"): (one.name, one.metadata["check"], one.metadata["risk"])
        for one in fields(Annotations)
    }
    return {**table, **{alias: table[name] for alias, name in ALIASES.items()}}


def known_annotations() -> tuple[str, ...]:
    """Return the names, with prefix, of everything that is understood."""
    return tuple(sorted(PREFIX + name for name in _table()))


def parse_annotations(
    annotations: Mapping[str, str], *, most_risk: Risk = Risk.HIGH, blocked_words: tuple[str, ...] = ()
) -> tuple[Annotations, tuple[AnnotationProblem, ...]]:
    """Return what the annotations say, and those that are refused, in the order of their names."""
    table = _table()
    found: dict[str, Any] = {}
    problems = []
    for full_name in sorted(annotations):
        name = full_name.removeprefix(PREFIX)
        if name == full_name:
            continue
        text = annotations[full_name]
        if name in SNIPPETS:
            message = (
                f"{full_name} annotation cannot be used. Snippet directives are disabled by the Ingress administrator"
            )
            problems.append(AnnotationProblem(full_name, message))
            continue
        word = next((word for word in blocked_words if word in text), "")
        if word:
            problems.append(AnnotationProblem(full_name, f"{full_name} annotation contains invalid word {word}"))
            continue
        if name not in table:
            continue
        field_name, check, risk = table[name]
        if risk > most_risk:
            problems.append(
                AnnotationProblem(full_name, f"annotation {full_name} is too risky for environment")
            )  # fmt: skip
            continue
        try:
            found[field_name] = check(values.refuse_control(str(text)).strip())
        except BadValue as error:
            shown = text if len(text) <= 200 else f"{text[:200]}..."
            message = f"annotation {full_name} contains invalid value {shown!r}: {error}"
            problems.append(AnnotationProblem(full_name, message))
    return Annotations(**found), tuple(problems)
