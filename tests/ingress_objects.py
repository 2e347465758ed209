"""Objects for the tests of ingress, as short calls; and what the generator makes of them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from testbed.dataplane.ingress.annotations import PREFIX
from testbed.dataplane.ingress.model import Document
from testbed.dataplane.ingress.render import render
from testbed.dataplane.ingress.settings import Options
from testbed.dataplane.ingress.translate import translate
from testbed.dataplane.ingress.world import World

Object = dict[str, Any]
Path = tuple[str, str, str]
"""Path, pathType, and backend ``NAME`` or ``NAME:PORT``."""

CLASS: Object = {
    "apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": {"name": "nginx"},
    "spec": {"controller": "k8s.io/ingress-nginx"},
}  # fmt: skip
OPTIONS = Options(configmap="ingress-nginx/ingress-nginx-controller", enable_metrics=False)


def meta(name: str, namespace: str = "dev", **fields: Any) -> Object:
    return {"name": name, "namespace": namespace, **fields}


def backend(text: str) -> Object:
    name, _, port = text.partition(":")
    number = {"number": int(port or 80)} if (port or "80").isdigit() else {"name": port}
    return {"service": {"name": name, "port": number}}


def ingress(
    name: str, rules: Mapping[str, Iterable[Path]] | None = None, annotations: Mapping[str, str] | None = None,
    *, namespace: str = "dev", created: int = 0, ingress_class: str | None = "nginx", **spec: Any,
) -> Object:  # fmt: skip
    """Return an Ingress; annotations without their prefix; ``created``: seconds after the first."""
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=created)
    shown = {key if "/" in key else PREFIX + key: value for key, value in (annotations or {}).items()}
    fields: Object = {"rules": [_rule(host, paths) for host, paths in (rules or {}).items()]} if rules else {}
    if ingress_class is not None:
        fields["ingressClassName"] = ingress_class
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": meta(name, namespace, creationTimestamp=moment.strftime("%Y-%m-%dT%H:%M:%SZ"), annotations=shown),
        "spec": {**fields, **spec},
    }


def _rule(host: str, paths: Iterable[Path]) -> Object:
    shown = [{"path": path, "pathType": kind, "backend": backend(to)} for path, kind, to in paths]
    return {**({"host": host} if host else {}), "http": {"paths": shown}}


def service(name: str, *, namespace: str = "dev", port: int = 80, target: int | str = 8080, **spec: Any) -> Object:
    ports = spec.pop("ports", [{"name": "http", "port": port, "targetPort": target, "protocol": "TCP"}])
    fields = {"type": "ClusterIP", "clusterIP": "10.96.0.9", "selector": {"app": name}, "ports": ports, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta(name, namespace), "spec": fields}


def slices(name: str, *addresses: str, namespace: str = "dev", port: int = 8080, not_ready: str = "") -> Object:
    endpoints = [{"addresses": [address], "conditions": {"ready": address != not_ready}} for address in addresses]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta(f"{name}-1", namespace, labels={"kubernetes.io/service-name": name}),
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": endpoints,
    }


def secret(name: str, data: Mapping[str, bytes], *, namespace: str = "dev", kind: str = "Opaque") -> Object:
    shown = {key: base64.b64encode(value).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta(name, namespace), "type": kind, "data": shown}


@cache
def key_pair(*names: str) -> tuple[bytes, bytes, bytes]:
    """Return an authority, a certificate it signed for these names, and the key, as PEM."""
    from testbed.programs.webhook_certgen import make_certificates

    return make_certificates(names)


def tls_secret(name: str, *names: str, namespace: str = "dev") -> Object:
    _, certificate, key = key_pair(*names)
    return secret(name, {"tls.crt": certificate, "tls.key": key}, namespace=namespace, kind="kubernetes.io/tls")


@cache
def client_pair(common_name: str, authority: str = "clients") -> tuple[bytes, bytes, bytes]:
    """Return an authority for clients, a certificate it signed for a client of this name, and that one's key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def signed(name: str, signer: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey) -> bytes:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        now = datetime.now(UTC)
        made = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(authority))
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=name == authority, path_length=None), critical=True)
        return made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    top = _authority_key(authority)
    own = ec.generate_private_key(ec.SECP256R1())
    shape = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = own.private_bytes(serialization.Encoding.PEM, *shape)
    return signed(authority, top, top), signed(common_name, top, own), key


@cache
def _authority_key(_name: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def config_map(name: str, data: Mapping[str, str], *, namespace: str = "dev") -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta(name, namespace), "data": dict(data)}


def settings(**keys: str) -> Object:
    """Return the controller's ConfigMap; ``_`` stands for ``-``."""
    data = {key.replace("_", "-"): value for key, value in keys.items()}
    return config_map("ingress-nginx-controller", data, namespace="ingress-nginx")


def document(*objects: Object, options: Options = OPTIONS) -> Document:
    return translate(World.of([CLASS, *objects]), options, resolvers=("10.96.0.10",))


def conf(*objects: Object, options: Options = OPTIONS) -> str:
    return render(document(*objects, options=options))
