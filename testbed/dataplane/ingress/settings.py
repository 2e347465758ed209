"""The controller's ConfigMap and command line as values.

Source: kubernetes/ingress-nginx internal/ingress/controller/config/config.go, pkg/flags/flags.go (v1.10).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from testbed.dataplane.ingress import values
from testbed.dataplane.ingress.annotations import Risk
from testbed.dataplane.ingress.values import BadValue, Check
from testbed.errors import InputError

UPSTREAM_LOG_FORMAT: Final = (
    '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent" '
    "$request_length $request_time [$proxy_upstream_name] [$proxy_alternative_upstream_name] $upstream_addr "
    "$upstream_response_length $upstream_response_time $upstream_status $req_id"
)
# Mozilla's intermediate list, as upstream's default; TLS 1.3 has its own.
_CIPHERS: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:"
    "DHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384"
)


def _setting(check: Check, default: Any) -> Any:
    return field(default=default, metadata={"check": check})


_TIMEOUT = values.integer(0, 2_147_483)
_CIDRS = values.several(values.cidr, "addresses and CIDRs")
_DURATION = values.matching(re.compile(r"[0-9]{1,6}(ms|s|m|h)?", re.ASCII), "a time such as 240s")
_WORDS = values.several(lambda text: text, "words")


def _log_format(text: str) -> str:
    rest = values.refuse_unknown_variables(text)
    if not re.fullmatch(r"[A-Za-z0-9 _.,:;/\\\[\](){}<>|=+*'\"@!?&-]*", rest, re.ASCII):
        raise BadValue("must be variables and plain characters")
    return text


def _log_path(text: str) -> str:
    if not re.fullmatch(r"/(dev/std(out|err)|tmp/[A-Za-z0-9._/-]+|var/log/[A-Za-z0-9._/-]+)", text) or ".." in text:
        raise BadValue("must be /dev/stdout, /dev/stderr, or a file in /tmp or /var/log")
    return text


def _buffers(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,4} [0-9]{1,6}[kmKM]?", text):
        raise BadValue("must be a number and a size, as 4 8k")
    return text


def _protocols(text: str) -> str:
    known = {"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"}
    if not text.split() or not set(text.split()) <= known:
        raise BadValue(f"must be words of {', '.join(sorted(known))}")
    return " ".join(text.split())


def _risk(text: str) -> Risk:
    try:
        return Risk[text.upper()]
    except KeyError:
        raise BadValue("must be Low, Medium, High or Critical") from None


def _processes(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"[1-9][0-9]{0,2}", text):
        raise BadValue("must be auto or a number")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the ConfigMap says; a field is its key with ``_`` for ``-``."""

    allow_snippet_annotations: bool = _setting(values.boolean, False)
    allow_cross_namespace_resources: bool = _setting(values.boolean, False)
    annotation_value_word_blocklist: tuple[str, ...] = _setting(_WORDS, ())
    annotations_risk_level: Risk = _setting(_risk, Risk.HIGH)  # noqa: RUF009
    strict_validate_path_type: bool = _setting(values.boolean, True)
    global_allowed_response_headers: tuple[str, ...] = _setting(values.several(values.header_name, "header names"), ())
    proxy_body_size: str = _setting(values.body_size, "1m")
    client_body_buffer_size: str = _setting(values.buffer_size, "8k")
    proxy_connect_timeout: int = _setting(_TIMEOUT, 5)
    proxy_read_timeout: int = _setting(_TIMEOUT, 60)
    proxy_send_timeout: int = _setting(_TIMEOUT, 60)
    proxy_buffering: str = _setting(values.one_of("on", "off"), "off")
    proxy_request_buffering: str = _setting(values.one_of("on", "off"), "on")
    proxy_buffer_size: str = _setting(values.buffer_size, "4k")
    proxy_buffers_number: int = _setting(values.integer(2, 1024), 4)
    proxy_max_temp_file_size: str = _setting(values.body_size, "1024m")
    proxy_next_upstream: str = _setting(values.retry_conditions, "error timeout")
    proxy_next_upstream_timeout: int = _setting(_TIMEOUT, 0)
    proxy_next_upstream_tries: int = _setting(values.integer(0, 1000), 3)
    retry_non_idempotent: bool = _setting(values.boolean, False)
    use_forwarded_headers: bool = _setting(values.boolean, False)
    compute_full_forwarded_for: bool = _setting(values.boolean, False)
    use_proxy_protocol: bool = _setting(values.boolean, False)
    enable_real_ip: bool = _setting(values.boolean, False)
    proxy_real_ip_cidr: tuple[str, ...] = _setting(_CIDRS, ("0.0.0.0/0",))
    forwarded_for_header: str = _setting(values.header_name, "X-Forwarded-For")
    generate_request_id: bool = _setting(values.boolean, True)
    ssl_redirect: bool = _setting(values.boolean, True)
    force_ssl_redirect: bool = _setting(values.boolean, False)
    preserve_trailing_slash: bool = _setting(values.boolean, False)
    http_redirect_code: int = _setting(values.integer(300, 308), 308)
    hsts: bool = _setting(values.boolean, True)
    hsts_max_age: int = _setting(values.integer(0), 31_536_000)
    hsts_include_subdomains: bool = _setting(values.boolean, True)
    hsts_preload: bool = _setting(values.boolean, False)
    ssl_protocols: str = _setting(_protocols, "TLSv1.2 TLSv1.3")
    ssl_ciphers: str = _setting(
        values.matching(re.compile(r"[A-Za-z0-9!:+@=_-]{1,1024}", re.ASCII), "a list of OpenSSL ciphers"), _CIPHERS
    )
    ssl_reject_handshake: bool = _setting(values.boolean, False)
    use_http2: bool = _setting(values.boolean, True)
    server_tokens: bool = _setting(values.boolean, False)
    keep_alive: int = _setting(_TIMEOUT, 75)
    keep_alive_requests: int = _setting(values.integer(1), 1000)
    upstream_keepalive_connections: int = _setting(values.integer(0, 100_000), 320)
    upstream_keepalive_timeout: int = _setting(_TIMEOUT, 60)
    upstream_keepalive_requests: int = _setting(values.integer(1), 10_000)
    worker_processes: str = _setting(_processes, "auto")
    max_worker_connections: int = _setting(values.integer(0, 1_000_000), 16_384)
    worker_shutdown_timeout: str = _setting(_DURATION, "240s")
    client_header_timeout: int = _setting(_TIMEOUT, 60)
    client_body_timeout: int = _setting(_TIMEOUT, 60)
    large_client_header_buffers: str = _setting(_buffers, "4 8k")
    load_balance: str = _setting(values.one_of("round_robin", "ewma"), "round_robin")
    limit_req_status_code: int = _setting(values.integer(400, 599), 503)
    limit_conn_status_code: int = _setting(values.integer(400, 599), 503)
    whitelist_source_range: tuple[str, ...] = _setting(_CIDRS, ())
    denylist_source_range: tuple[str, ...] = _setting(_CIDRS, ())
    block_cidrs: tuple[str, ...] = _setting(_CIDRS, ())
    block_user_agents: tuple[str, ...] = _setting(values.several(values.regex, "expressions"), ())
    block_referers: tuple[str, ...] = _setting(values.several(values.regex, "expressions"), ())
    custom_http_errors: tuple[int, ...] = _setting(values.several(values.status_code, "status codes"), ())
    log_format_upstream: str = _setting(_log_format, UPSTREAM_LOG_FORMAT)
    access_log_path: str = _setting(_log_path, "/dev/stdout")
    disable_access_log: bool = _setting(values.boolean, False)
    skip_access_log_urls: tuple[str, ...] = _setting(values.several(values.regex, "expressions"), ())
    error_log_level: str = _setting(values.one_of("debug", "info", "notice", "warn", "error", "crit"), "notice")
    use_gzip: bool = _setting(values.boolean, False)
    gzip_level: int = _setting(values.integer(1, 9), 1)
    enable_brotli: bool = _setting(values.boolean, False)


ALIASES: Final = {"allowlist-source-range": "whitelist-source-range"}


def parse_settings(data: Mapping[str, str]) -> tuple[Settings, tuple[str, ...]]:
    """Return what a ConfigMap says, and a line for each key that is not used."""
    table = {one.name.replace("_", "-"): one for one in fields(Settings)}
    found: dict[str, Any] = {}
    notes = []
    for key in sorted(data):
        known = table.get(ALIASES.get(key, key))
        if known is None:
            notes.append(f"ConfigMap key {key!r} is not known and is ignored")
            continue
        try:
            found[known.name] = known.metadata["check"](values.refuse_control(str(data[key])).strip())
        except BadValue as error:
            notes.append(f"ConfigMap key {key!r}: {data[key][:200]!r} {error}; the default is used")
    if found.get("allow_snippet_annotations"):
        notes.append(
            "allow-snippet-annotations is not honoured: this controller writes no text of others into nginx.conf"
        )
    if found.get("enable_brotli"):
        notes.append("enable-brotli has no effect: stock nginx has no brotli module")
    return Settings(**found), tuple(notes)


# --- the command line ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The flags that mean something here."""

    ingress_class: str = "nginx"
    controller_class: str = "k8s.io/ingress-nginx"
    watch_ingress_without_class: bool = False
    ingress_class_by_name: bool = False
    watch_namespace: str = ""
    configmap: str = ""  # NAMESPACE/NAME
    default_backend_service: str = ""
    default_ssl_certificate: str = ""
    disable_catch_all: bool = False
    disable_svc_external_name: bool = False
    publish_service: str = ""
    publish_status_address: str = ""
    report_node_internal_ip_address: bool = False
    update_status: bool = True
    update_status_on_shutdown: bool = True
    election_id: str = "ingress-nginx-leader"
    enable_metrics: bool = True
    validating_webhook: str = ""
    http_port: int = 80
    https_port: int = 443
    healthz_port: int = 10254
    status_port: int = 10246
    default_server_port: int = 8181
    health_check_path: str = "/healthz"
    shutdown_grace_period: int = 0
    post_shutdown_grace_period: int = 10


#: Flags of upstream's controller that are accepted, and change nothing here; True: takes a value.
_WITHOUT_EFFECT: Final = {
    "validating-webhook-certificate": True, "validating-webhook-key": True, "annotations-prefix": True, "v": True,
    "logtostderr": False, "stderrthreshold": True, "sync-rate-limit": True, "sync-period": True, "profiling": False,
    "enable-ssl-chain-completion": False, "metrics-per-host": False, "monitor-max-batch-size": True,
    "tcp-services-configmap": True, "udp-services-configmap": True, "maxmind-license-key": True, "kubeconfig": True,
    "apiserver-host": True, "election-ttl": True, "status-update-interval": True, "dynamic-configuration-retries": True,
    "enable-annotation-validation": False, "disable-full-test": False, "ssl-passthrough-proxy-port": True,
    "enable-topology-aware-routing": False, "disable-leader-election": False, "deep-inspect": False,
    "health-check-timeout": True, "stream-port": True, "profiler-port": True, "internal-logger-address": True,
    "watch-namespace-selector": True, "skip_headers": False, "alsologtostderr": False, "time-buckets": True,
    "length-buckets": True, "size-buckets": True, "exclude-socket-metrics": True, "disable-sync-events": False,
    "report-status-classes": False, "metrics-per-undefined-host": False, "bucket-factor": True,
}  # fmt: skip
_REFERENCE_FLAGS: Final = ("configmap", "default_backend_service", "default_ssl_certificate", "publish_service")


def parse_options(argv: Sequence[str]) -> Options:
    """Return what the words after the program's name say.

    Raises:
        InputError: an unknown flag, a missing or impossible value.
    """
    known = {one.name.replace("_", "-"): one for one in fields(Options)}
    found: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            raise InputError(f"nginx-ingress-controller: unexpected argument {word!r}")
        if name in _WITHOUT_EFFECT:
            if _WITHOUT_EFFECT[name] and not equals and words:
                words.pop(0)
            continue
        option = known.get(name)
        if option is None:
            raise InputError(f"nginx-ingress-controller: unknown flag: --{name}")
        if not equals and option.type != "bool":
            if not words:
                raise InputError(f"nginx-ingress-controller: flag needs an argument: --{name}")
            text = words.pop(0)
        found[option.name] = _option_value(name, str(option.type), text if equals or option.type != "bool" else "true")
    for field_name in _REFERENCE_FLAGS:
        value = found.get(field_name, "")
        if value and value.count("/") != 1:
            raise InputError(
                f"nginx-ingress-controller: --{field_name.replace('_', '-')}={value}: must be NAMESPACE/NAME"
            )
    return Options(**found)


def _option_value(name: str, kind: str, text: str) -> Any:
    try:
        values.refuse_control(text)
        if kind == "bool":
            return values.boolean(text)
        return values.integer(0, 65535)(text) if kind == "int" else text
    except BadValue as error:
        raise InputError(f"nginx-ingress-controller: --{name}={text!r}: {error}") from None
