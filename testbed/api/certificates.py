"""Certificates of one lab: an authority of its own, the API server's certificate and the administrator's.

Elliptic curve keys, because an RSA key would take a large part of the second in which a lab starts. Nothing here is
stored; whoever holds the private keys holds the lab.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from typing import Any

_VALID_DAYS = 3650  # a lab lives for hours; a clock that is set must not end it
_BACKDATED = timedelta(hours=1)

ADMIN_NAME = "kubernetes-admin"
ADMIN_GROUP = "system:masters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Certificates and keys of one lab, as PEM text."""

    authority: str
    server: str
    server_key: str
    admin: str
    admin_key: str


def make_credentials(lab: str, *, names: Sequence[str], addresses: Sequence[IPv4Address]) -> Credentials:
    """Return new credentials; the server's certificate is good for all of ``names`` and ``addresses``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.now(UTC)

    def subject(common_name: str, organization: str = "") -> x509.Name:
        parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
        return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])

    def builder(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + timedelta(days=_VALID_DAYS))
        )

    def usage(*, signs_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip

    def pem(key: ec.EllipticCurvePrivateKey) -> str:
        encoding, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return key.private_bytes(encoding, kind, serialization.NoEncryption()).decode()

    def signed(built: x509.CertificateBuilder) -> str:
        return built.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    authority_name = subject("kubernetes", f"testbed lab {lab}")
    authority_key, server_key, admin_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    own_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    # Python 3.13 and newer refuse certificates without these extensions (VERIFY_X509_STRICT).
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id)
    authority = (
        builder(authority_name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .add_extension(own_id, critical=False)
    )
    alternatives = [*(x509.DNSName(name) for name in names), *(x509.IPAddress(address) for address in addresses)]
    server = (
        builder(subject("kube-apiserver"), server_key)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    admin = builder(subject(ADMIN_NAME, ADMIN_GROUP), admin_key).add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    leaves = [
        signed(
            built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(signs_certificates=False), critical=True)
            .add_extension(issuer_id, critical=False)
        )
        for built in (server, admin)
    ]
    return Credentials(
        authority=signed(authority), server=leaves[0], server_key=pem(server_key), admin=leaves[1],
        admin_key=pem(admin_key),
    )  # fmt: skip


def kubeconfig(lab: str, server: str, credentials: Credentials, token: str) -> str:
    """Return a kubeconfig for the administrator of a lab. JSON, which is YAML, too.

    The certificate comes first in kubectl's eyes; the token is there for clients that take nothing else.
    """

    def encoded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    context = f"{ADMIN_NAME}@{lab}"
    user = {
        "client-certificate-data": encoded(credentials.admin),
        "client-key-data": encoded(credentials.admin_key),
        "token": token,
    }
    cluster = {"certificate-authority-data": encoded(credentials.authority), "server": server}
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": lab, "cluster": cluster}],
        "contexts": [{"name": context, "context": {"cluster": lab, "user": f"{lab}-admin"}}],
        "current-context": context,
        "preferences": {},
        "users": [{"name": f"{lab}-admin", "user": user}],
    }
    return json.dumps(document, indent=2) + "\n"
