"""What a user may write into an annotation or a ConfigMap key: checks that return the value, or say what is wrong.

A value ends up in nginx.conf, read by a process that holds every certificate of the cluster. So each kind of value has an
allow-list; what is not on it is refused, and nothing is repaired. Control characters, which slipped past checks
upstream (CVE-2024-7646), are refused everywhere before anything else is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import ip_network
from typing import Any, Final
from urllib.parse import urlsplit

#: Names that are variables of stock nginx 1.22, and may stand in values where variables make sense.
VARIABLES: Final = frozenset({
    "args", "binary_remote_addr", "body_bytes_sent", "bytes_sent", "connection", "connection_requests",
    "content_length", "content_type", "document_uri", "host", "hostname", "http2", "https", "is_args", "msec",
    "nginx_version", "proxy_host", "proxy_port", "query_string", "remote_addr", "remote_port", "remote_user",
    "request", "request_body", "request_completion", "request_filename", "request_id", "request_length",
    "request_method", "request_time", "request_uri", "scheme", "server_addr", "server_name", "server_port",
    "server_protocol", "status", "ssl_cipher", "ssl_client_fingerprint", "ssl_client_i_dn", "ssl_client_s_dn",
    "ssl_client_serial", "ssl_client_verify", "ssl_protocol", "ssl_server_name", "ssl_session_id", "time_iso8601",
    "time_local", "uri", "best_http_host", "escaped_request_uri", "req_id", "pass_access_scheme",
    "proxy_upstream_name", "proxy_alternative_upstream_name", "namespace", "ingress_name", "service_name",
    "service_port", "subdomain", "upstream_addr", "upstream_status", "upstream_response_time",
    "upstream_response_length", "upstream_connect_time", "upstream_header_time", "http_referer", "http_user_agent",
    "realip_remote_addr", "the_real_ip",
})  # fmt: skip
_VARIABLE_PREFIXES: Final = ("arg_", "cookie_", "http_", "sent_http_", "upstream_http_", "upstream_cookie_", "jwt_")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))", re.ASCII)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")
_SIZE = re.compile(r"[0-9]{1,9}[bkmgBKMG]?", re.ASCII)
_HEADER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.ASCII)
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~/@%+=,:!&?*-]*", re.ASCII)
_REWRITE = re.compile(r"[A-Za-z0-9._~/@%+=,:!&?*()\[\]|^\\-]*", re.ASCII)  # after captures are taken out
_CAPTURE = re.compile(r"\$[0-9]|\$\{[0-9]\}", re.ASCII)
_URL_TAIL = re.compile(r"[A-Za-z0-9._~/@%+=,:!&?*()'\[\]-]*", re.ASCII)  # after variables are taken out
_HEADER_VALUE = re.compile(r"[A-Za-z0-9 ._~/@%+=,:!&?*()'<>|\[\]\^-]*", re.ASCII)
_ORIGIN = re.compile(r"(https?://)?(\*\.)?[A-Za-z0-9._-]+(:[0-9]{1,5})?", re.ASCII)
_REALM = re.compile(r"[A-Za-z0-9 .,_@:'()/!?&+=-]{0,256}", re.ASCII)
_REGEX = re.compile(r"[^\"';#\s]*", re.ASCII)
_CN_PATTERN = re.compile(r"CN=[A-Za-z0-9 ._*+?()\[\]|^\\-]{1,256}", re.ASCII)
_MAX_VALUE = 8192

Check = Callable[[str], Any]
"""Returns the value that a text stands for, or raises BadValue."""


class BadValue(ValueError):
    """A text that is not allowed where it stands; the message says what would be."""


def refuse_control(text: str) -> str:
    """Return the text, unless it holds a control character or is longer than any value needs to be."""
    found = _CONTROL.search(text)
    if found:
        raise BadValue(f"must not contain control characters, found {found[0]!r}")
    if len(text) > _MAX_VALUE:
        raise BadValue(f"must be at most {_MAX_VALUE} characters, is {len(text)}")
    return text


def matching(pattern: re.Pattern[str], wanted: str) -> Check:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise BadValue(f"must be {wanted}")
        return text

    return check


def boolean(text: str) -> bool:
    """Source: Go's strconv.ParseBool."""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise BadValue('must be "true" or "false"')


def integer(least: int = 0, most: int = 2**31 - 1) -> Check:
    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not least <= int(text) <= most:
            raise BadValue(f"must be a whole number from {least} to {most}")
        return int(text)

    return check


def one_of(*values: str, upper: bool = False) -> Check:
    def check(text: str) -> str:
        chosen = text.upper() if upper else text
        if chosen not in values:
            raise BadValue(f"must be one of {', '.join(values)}")
        return chosen

    return check


def several(check_one: Check, wanted: str, separator: str = ",") -> Check:
    """Return a check of a list: every part passes ``check_one``, and there is one at least."""

    def check(text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(separator)]
        parts = [part for part in parts if part]
        if not parts:
            raise BadValue(f"must be a list of {wanted}")
        return tuple(dict.fromkeys(check_one(part) for part in parts))

    return check


def cidr(text: str) -> str:
    """Return an address or network in canonical form."""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise BadValue(f"must be an address or a CIDR, found {text!r}") from None
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def variable_names(text: str) -> list[str]:
    return [braced or bare for braced, bare in _VARIABLE.findall(text)]


def refuse_unknown_variables(text: str, known: Iterable[str] = VARIABLES) -> str:
    """Return the text without its variables; BadValue for one that nginx would not know, or a lone ``$``."""
    for name in variable_names(text):
        if name not in known and not name.startswith(_VARIABLE_PREFIXES):
            raise BadValue(f"variable ${name} is not known")
    rest = _VARIABLE.sub("", text)
    if "$" in rest:
        raise BadValue("must not contain '$' except in variables")
    return rest


def hash_key(text: str) -> str:
    rest = refuse_unknown_variables(text)
    if not text or not re.fullmatch(r"[A-Za-z0-9_:/.-]*", rest, re.ASCII):
        raise BadValue("must be made of variables, letters, digits and _:/.-")
    return text


def rewrite_target(text: str) -> str:
    rest = _CAPTURE.sub("", text)
    if not text or not _REWRITE.fullmatch(rest):
        raise BadValue("must be a path, in which $1 to $9 stand for groups of the rule's path")
    return text


def url(*, variables: bool = False) -> Check:
    """Return a check of an http or https URL; it may hold variables after the host where ``variables``."""

    def check(text: str) -> str:
        rest = refuse_unknown_variables(text) if variables else text
        if re.match(r"https?://\$", text):
            raise BadValue("must name its host, not hold it in a variable")
        try:
            parts = urlsplit(rest)
            port = parts.port
        except ValueError as error:
            raise BadValue(f"must be an http or https URL: {error}") from None
        tail = rest[len(f"{parts.scheme}://{parts.netloc}") :]
        if parts.scheme not in ("http", "https") or not parts.hostname or not _HOST.fullmatch(parts.hostname):
            raise BadValue("must be an http or https URL")
        if parts.netloc != parts.hostname and parts.netloc.lower() != f"{parts.hostname}:{port}":
            raise BadValue("must be a URL without user or password")
        if not _URL_TAIL.fullmatch(tail):
            raise BadValue("must be a URL of letters, digits and ._~/@%+=,:!&?*()'[]-")
        return text

    return check


def redirect_target(text: str) -> str:
    """An absolute URL, or a path; variables may follow."""
    if text.startswith("/"):
        rest = refuse_unknown_variables(text)
        if not _URL_TAIL.fullmatch(rest):
            raise BadValue("must be a path of letters, digits and ._~/@%+=,:!&?*()'[]-")
        return text
    if re.match(r"(https?|\$scheme)://\$(host|http_host|best_http_host)([/:?]|$)", text):
        rest = refuse_unknown_variables(text)
        if not _URL_TAIL.fullmatch(rest):
            raise BadValue("must be a URL of letters, digits and ._~/@%+=,:!&?*()'[]-")
        return text
    return str(url(variables=True)(text))


def regex(text: str) -> str:
    """A regular expression that Python's compiler, whose language is nearly PCRE's, accepts."""
    if not _REGEX.fullmatch(text):
        raise BadValue("must be a regular expression without quotes, blanks, ';' and '#'")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadValue(f"must be a regular expression: {error}") from None
    return text


def pair(first: Check, second: Check, separator: str, wanted: str) -> Check:
    def check(text: str) -> tuple[Any, Any]:
        left, found, right = text.partition(separator)
        if not found:
            raise BadValue(f"must be {wanted}")
        return first(left.strip()), second(right.strip())

    return check


def reference(text: str) -> tuple[str, str]:
    """Return namespace ('' when none is named) and name of NAME or NAMESPACE/NAME."""
    namespace, slash, name = text.partition("/")
    if not slash:
        namespace, name = "", text
    if (slash and not _OBJECT_NAME.fullmatch(namespace)) or not _OBJECT_NAME.fullmatch(name):
        raise BadValue("must be NAME or NAMESPACE/NAME")
    return namespace, name


def retry_conditions(text: str) -> str:
    allowed = {
        "error", "timeout", "invalid_header", "http_500", "http_502", "http_503", "http_504", "http_403", "http_404",
        "http_429", "non_idempotent", "off",
    }  # fmt: skip
    words = text.split()
    if not words or not set(words) <= allowed:
        raise BadValue(f"must be words of: {', '.join(sorted(allowed))}")
    return " ".join(words)


def size(least: int = 0, most: int = 1 << 40) -> Check:
    """Return a check of a size in bytes; it comes back as nginx writes sizes: a number, or one with ``k`` or ``m``."""

    def check(text: str) -> str:
        if not _SIZE.fullmatch(text):
            raise BadValue("must be a number of bytes, with b, k, m or g")
        number, unit = int(text.rstrip("bkmgBKMG")), text[-1].lower()
        written = {"g": f"{number * 1024}m", "b": str(number)}.get(unit, str(number) + (unit if unit in "km" else ""))
        if not least <= bytes_of(written) <= most:
            raise BadValue(f"must be between {least} and {most} bytes")
        return written

    return check


def bytes_of(text: str) -> int:
    """Return the bytes of a size that passed its check."""
    factor = {"k": 1 << 10, "m": 1 << 20}.get(text[-1], 1)
    return int(text.rstrip("km")) * factor


body_size = size()
buffer_size = size(1024, 1 << 24)
header_name = matching(_HEADER_NAME, "the name of a header")
token = matching(_TOKEN, "letters, digits, - and _")
host = matching(_HOST, "a host name")
host_and_port = matching(
    re.compile(rf"{_HOST.pattern}(:[0-9]{{1,5}})?", re.ASCII), "a host name, with a port if need be"
)
plain_path = matching(_PLAIN_PATH, "a path")
header_value = matching(_HEADER_VALUE, "the text of a header, without quotes, ; { } # $ and \\")
realm = matching(_REALM, "a text without quotes, ; { } # $ and \\")
object_name = matching(_OBJECT_NAME, "the name of an object")
cn_pattern = matching(_CN_PATTERN, "CN= and a regular expression")
method = one_of("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE")
status_code = integer(300, 599)


def origin(text: str) -> str:
    if text == "*" or text == "null" or _ORIGIN.fullmatch(text):
        return text
    raise BadValue(f"must be *, null, or an origin such as https://*.example.com:8443, found {text!r}")
