"""What nginx is given out of Secrets: certificates, authorities and password files, each checked before it is used.

A file's name is a digest of what is in it: no part of a path comes from a user (CVE-2025-24513), and a new certificate is a
new file, so that the old workers keep the old one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from testbed.dataplane.ingress.values import BadValue
from testbed.dataplane.ingress.world import secret_data
from testbed.model.objects import Object

FOLDER: Final = "/etc/nginx/ingress"
FAKE_NAME: Final = "Kubernetes Ingress Controller Fake Certificate"
_HTPASSWD_LINE = re.compile(
    rb"[^\s:#\x00-\x1f\x7f][^:\x00-\x1f\x7f]{0,127}:[A-Za-z0-9$./+={}!_-]{1,256}(:[^\x00-\x1f\x7f]*)?"
)
_USER = re.compile(r"[A-Za-z0-9._@+-]{1,128}", re.ASCII)
_HASH = re.compile(rb"[A-Za-z0-9$./+={}!_-]{1,256}")
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate chain with its key, as one PEM text; ``names`` are the hosts it is for, in lower case."""

    pem: bytes
    names: tuple[str, ...]
    expires_s: float  # seconds since 1970

    def covers(self, host: str) -> bool:
        """Say whether the certificate is for a host; ``*.foo.com`` covers one label (RFC 6125)."""
        _, _, rest = host.partition(".")
        return host in self.names or (bool(rest) and f"*.{rest}" in self.names)


def file_name(content: bytes, suffix: str) -> str:
    """Return the path of a file with this content."""
    return f"{FOLDER}/{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"


def key_pair(secret: Object | None) -> KeyPair | None:
    """Return the certificate and key of a TLS Secret, or None when they are missing, broken, or not each other's."""
    certificate, key = secret_data(secret, "tls.crt"), secret_data(secret, "tls.key")
    if not certificate or not key or len(certificate) + len(key) > _MAX_BYTES:
        return None
    return _key_pair(certificate, key)


@lru_cache(maxsize=2048)
def _key_pair(certificate: bytes, key: bytes) -> KeyPair | None:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    try:
        chain = x509.load_pem_x509_certificates(certificate)
        private = serialization.load_pem_private_key(key, None)
        shape = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if chain[0].public_key().public_bytes(*shape) != private.public_key().public_bytes(*shape):
            return None
        # Written anew, so that nothing but certificates and a key reaches the file.
        pem = b"".join(one.public_bytes(Encoding.PEM) for one in chain)
        pem += private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        expires_s = chain[0].not_valid_after_utc.timestamp()
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm):
        return None
    return KeyPair(pem, _names_of(chain[0]), expires_s)


def _names_of(certificate: object) -> tuple[str, ...]:
    from cryptography import x509

    assert isinstance(certificate, x509.Certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        found = []
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return tuple(dict.fromkeys(name.lower() for name in (*found, *(str(one.value) for one in common))))


def authority(secret: Object | None) -> bytes | None:
    """Return the authorities' certificates (``ca.crt``) of a Secret as PEM, or None."""
    text = secret_data(secret, "ca.crt")
    if not text or len(text) > _MAX_BYTES:
        return None
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        return b"".join(one.public_bytes(Encoding.PEM) for one in x509.load_pem_x509_certificates(text))
    except ValueError:
        return None


def password_file(secret: Object | None, kind: str) -> bytes:
    """Return a password file of a Secret's key ``auth`` (auth-file), or of its users and hashes (auth-map).

    Raises:
        BadValue: there is none, or it holds something else.
    """
    if secret is None:
        raise BadValue("there is no such Secret")
    if kind == "auth-map":
        return _password_map(secret)
    text = secret_data(secret, "auth")
    if text is None:
        raise BadValue("the Secret has no key 'auth'")
    lines = [line.rstrip(b"\r") for line in text.split(b"\n")]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    if not lines or not all(_HTPASSWD_LINE.fullmatch(line) for line in lines):
        raise BadValue("key 'auth' is no password file of lines USER:HASH")
    return b"\n".join(lines) + b"\n"


def _password_map(secret: Object) -> bytes:
    lines = []
    data: Mapping[str, str] = secret.get("data") or {}
    for user in sorted(data):
        value = secret_data(secret, user)
        if not _USER.fullmatch(user) or value is None or not _HASH.fullmatch(value.strip()):
            raise BadValue("the Secret is no map of users to password hashes")
        lines.append(user.encode() + b":" + value.strip())
    if not lines:
        raise BadValue("the Secret is empty")
    return b"\n".join(lines) + b"\n"
