"""Names, labels and their kin: what is allowed, in the words of Kubernetes.

Each function returns what is wrong with a value, as upstream's ``IsDNS1123Label`` and so on do; empty means fine.
The patterns are matched on the whole string, so no newline slips in behind a ``$``.

Source: kubernetes apimachinery/pkg/util/validation/validation.go, api/validation/path/name.go (v1.30).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

#: The characters of generated names (rand.SafeEncodeString): no vowels, so no words; no 0, 1, 3.
NAME_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"

_DNS1123_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS1123_SUBDOMAIN = rf"{_DNS1123_LABEL}(\.{_DNS1123_LABEL})*"
_DNS1035_LABEL = "[a-z]([-a-z0-9]*[a-z0-9])?"
_QUALIFIED = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_LABEL_VALUE = "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_CONFIG_KEY = "[-._a-zA-Z0-9]+"
_ENV_NAME = "[-._a-zA-Z][-._a-zA-Z0-9]*"
_C_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"


def _regex_text(message: str, pattern: str, *examples: str) -> str:
    """Return upstream's RegexError: the double space before "or" is theirs."""
    shown = " or ".join(f"'{example}', " for example in examples)
    return f"{message} (e.g. {shown}regex used for validation is '{pattern}')"


def _too_long(limit: int) -> str:
    return f"must be no more than {limit} characters"


def _checker(pattern: str, message: str, examples: tuple[str, ...], limit: int) -> Callable[[str], list[str]]:
    matches = re.compile(pattern).fullmatch
    complaint = _regex_text(message, pattern, *examples)

    def problems(value: str) -> list[str]:
        found = [_too_long(limit)] if len(value) > limit else []
        if not matches(value):
            found.append(complaint)
        return found

    return problems


dns1123_label_problems = _checker(
    _DNS1123_LABEL,
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character",
    ("my-name", "123-abc"),
    63,
)
dns1123_subdomain_problems = _checker(
    _DNS1123_SUBDOMAIN,
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end "
    "with an alphanumeric character",
    ("example.com",),
    253,
)
dns1035_label_problems = _checker(
    _DNS1035_LABEL,
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end "
    "with an alphanumeric character",
    ("my-name", "abc-123"),
    63,
)
label_value_problems = _checker(
    _LABEL_VALUE,
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with "
    "an alphanumeric character",
    ("MyValue", "my_value", "12345"),
    63,
)
_name_part_problems = _checker(
    _QUALIFIED,
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
    ("MyName", "my.name", "123-abc"),
    63,
)
env_name_problems = _checker(
    _ENV_NAME,
    "a valid environment variable name must consist of alphabetic characters, digits, '_', '-', or '.', and must not start with "
    "a digit",
    ("my.env-name", "MY_ENV.NAME", "MyEnvName1"),
    1 << 20,
)
_config_key_pattern_problems = _checker(
    _CONFIG_KEY,
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
    ("key.name", "KEY_NAME", "key-name"),
    253,
)


def qualified_name_problems(value: str) -> list[str]:
    """Check a label or annotation key: an optional DNS prefix, a slash, a name of at most 63 characters."""
    prefix, slash, name = value.rpartition("/")
    found: list[str] = []
    if "/" in prefix:
        name_pattern = _regex_text(
            "a qualified name must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
            "alphanumeric character",
            _QUALIFIED,
            "MyName",
            "my.name",
            "123-abc",
        )
        return [f"{name_pattern} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"]
    if slash and not prefix:
        found.append("prefix part must be non-empty")
    elif slash:
        found += [f"prefix part {problem}" for problem in dns1123_subdomain_problems(prefix)]
    if not name:
        found.append("name part must be non-empty")
    return found + [
        problem if problem.startswith("name part ") else f"name part {problem}" for problem in _name_part_problems(name)
    ]


def path_segment_problems(name: str) -> list[str]:
    """Check that a name can be one segment of a URL path, and of a file's: no slash, no percent sign, not ``..``."""
    if name in (".", ".."):
        return [f"may not be '{name}'"]
    return [f"may not contain '{bad}'" for bad in ("/", "%") if bad in name]


def config_key_problems(value: str) -> list[str]:
    """Check a key of a ConfigMap or Secret; it becomes a file name, so it must not leave its directory."""
    found = _config_key_pattern_problems(value)
    if value == ".":
        found.append("must not be '.'")
    elif value == "..":
        found.append("must not be '..'")
    elif value.startswith(".."):
        found.append("must not start with '..'")
    return found


def port_name_problems(value: str) -> list[str]:
    """Check an IANA service name: what a container port can be called and a targetPort can refer to."""
    found = []
    if len(value) > 15:
        found.append(_too_long(15))
    if not re.fullmatch("[-a-z0-9]+", value):
        found.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not re.search("[a-z]", value):
        found.append("must contain at least one letter (a-z)")
    if "--" in value:
        found.append("must not contain consecutive hyphens")
    if value.startswith("-") or value.endswith("-"):
        found.append("must not begin or end with a hyphen")
    return found


def port_number_problems(value: int) -> list[str]:
    """Check a port number."""
    return [] if 1 <= value <= 65535 else ["must be between 1 and 65535, inclusive"]


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address, or None for text that is none."""
    try:
        if "%" in text:  # a zone is no part of an address that others use
            return None
        return IPv6Address(text) if ":" in text else IPv4Address(text)
    except AddressValueError:
        return None


def parse_network(text: str) -> IPv4Network | IPv6Network | None:
    """Return the network of a CIDR, host bits allowed, or None for text that is none."""
    if "/" not in text or not text.rpartition("/")[2].isdecimal():
        return None
    try:
        return IPv6Network(text, strict=False) if ":" in text else IPv4Network(text, strict=False)
    except ValueError:
        return None


def address_problems(text: str) -> list[str]:
    """Check an IP address of either family."""
    return [] if parse_address(text) is not None else ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"]
