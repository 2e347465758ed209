"""What ``kube-webhook-certgen`` does: makes a webhook's certificate, and tells the API server whom to trust.

::

    create  ──▶ Secret NAMESPACE/SECRET-NAME with ca, cert, key      (nothing to do when it is there)
    patch   ──▶ its ca becomes caBundle of every webhook in the configurations named WEBHOOK-NAME

It talks to the API as every program in a pod does: Service ``kubernetes`` by environment, token and authority by the
files of the service account. Source: kubernetes/ingress-nginx images/kube-webhook-certgen (v1.4).
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 30.0
_VALID_DAYS = 36500
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"

_TEXT_FLAGS = {
    "create": ("host", "secret-name", "namespace", "cert-name", "key-name"),
    "patch": ("secret-name", "namespace", "webhook-name", "patch-failure-policy"),
}
_BOOL_FLAGS = {"create": (), "patch": ("patch-validating", "patch-mutating")}
_REQUIRED = {
    "create": ("host", "secret-name", "namespace"),
    "patch": ("secret-name", "namespace", "webhook-name"),
}
_COMMON_FLAGS = ("kubeconfig", "log-level", "log-format")
_DEFAULTS = {"cert-name": "cert", "key-name": "key", "patch-failure-policy": ""}


class UsageError(ValueError):
    """A command line that makes no sense; the message is upstream's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A command and its flags."""

    command: str
    texts: Mapping[str, str]
    switches: Mapping[str, bool]


def parse_options(argv: Sequence[str]) -> Options:
    """Return what the words after the program's name ask for; UsageError in cobra's words."""
    words = list(argv)
    commands = [word for word in words if not word.startswith("-")][:1]
    if not commands or commands[0] not in _TEXT_FLAGS:
        raise UsageError(f'unknown command "{commands[0]}" for "kube-webhook-certgen"' if commands else "no command")
    command = commands[0]
    words.remove(command)
    texts, switches = dict(_DEFAULTS), dict.fromkeys(_BOOL_FLAGS[command], True)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UsageError(f'unknown command "{word}" for "kube-webhook-certgen {command}"')
        if name in switches:
            if equals and value not in ("true", "false"):
                raise UsageError(
                    f'invalid argument "{value}" for "--{name}" flag: strconv.ParseBool: parsing "{value}"'
                )
            switches[name] = value != "false"
        elif name in _TEXT_FLAGS[command] or name in _COMMON_FLAGS:
            if not equals and not words:
                raise UsageError(f"flag needs an argument: --{name}")
            texts[name] = value if equals else words.pop(0)
        else:
            raise UsageError(f"unknown flag: --{name}")
    missing = [f'"{name}"' for name in _REQUIRED[command] if not texts.get(name)]
    if missing:
        raise UsageError(f"required flag(s) {', '.join(missing)} not set")
    return Options(command=command, texts=texts, switches=switches)


class _Refused(Exception):
    """The API said no; ``code`` is 0 when it could not be reached."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class _Api:
    """The cluster's API, with the identity of the pod's service account."""

    def __init__(self, folder: Path = ACCOUNT_FOLDER) -> None:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise _Refused(
                0,
                "unable to load in-cluster configuration, KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT must be defined",
            )
        self._server = f"https://{host}:{port}"
        try:
            self._token = (folder / "token").read_text()
            self._context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        except OSError as error:
            raise _Refused(0, f"open {error.filename}: {str(error.strerror).lower()}") from error

    def call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._server + path, data, headers, method=method)  # noqa: S310  # https above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            try:
                message = str(json.load(error)["message"])
            except (ValueError, KeyError, TypeError):
                message = error.reason
            raise _Refused(error.code, message) from None
        except OSError as error:
            raise _Refused(0, f'{method.capitalize()} "{self._server}{path}": {error}') from error


def main(argv: Sequence[str]) -> int:
    """Run one command, and return the exit status: 0, or 1 with the reason in the log."""
    try:
        options = parse_options(argv)
    except UsageError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    try:
        api = _Api()
        _create(api, options) if options.command == "create" else _patch(api, options)
    except _Fatal:
        return 1
    except _Refused as error:
        _log("fatal", "error building kubernetes config", err=str(error))
        return 1
    return 0


class _Fatal(Exception):
    """Logged already."""


def _log(level: str, message: str, **fields: str) -> None:
    """Write a line as logrus does in JSON: keys sorted."""
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    line = {**fields, "level": level, "msg": message, "time": time}
    sys.stderr.write(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n")


def _fail(message: str, error: Exception | None = None) -> NoReturn:
    _log("fatal", message, **({"err": str(error)} if error else {}))
    raise _Fatal


def _authority_in(api: _Api, options: Options) -> str | None:
    """Return the Secret's ca, base64, or None without a Secret."""
    path = f"/api/v1/namespaces/{options.texts['namespace']}/secrets/{options.texts['secret-name']}"
    try:
        secret = api.call("GET", path)
    except _Refused as error:
        if error.code == 404:
            _log("info", "no secret found", err=str(error))
            return None
        _fail("error getting secret", error)
    authority: str | None = (secret.get("data") or {}).get("ca")
    if authority is None:
        _fail("got secret, but it did not contain a 'ca' key")
    return authority


def _create(api: _Api, options: Options) -> None:
    if _authority_in(api, options) is not None:
        _log("info", "secret already exists")
        return
    _log("info", "creating new secret")
    authority, certificate, key = make_certificates(options.texts["host"].split(","))
    data = {"ca": authority, options.texts["cert-name"]: certificate, options.texts["key-name"]: key}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": options.texts["secret-name"]},
        "data": {name: base64.b64encode(text).decode() for name, text in data.items()},
    }
    try:
        api.call("POST", f"/api/v1/namespaces/{options.texts['namespace']}/secrets", secret)
    except _Refused as error:
        _fail("failed creating secret", error)


def _patch(api: _Api, options: Options) -> None:
    policy = options.texts["patch-failure-policy"]
    if policy not in ("", "Ignore", "Fail"):
        _fail(f"patch-failure-policy {policy} is not valid")
    validating, mutating = options.switches["patch-validating"], options.switches["patch-mutating"]
    if not validating and not mutating:
        _fail(
            "patch-validating=false, patch-mutating=false. You must patch at least one kind of webhook, otherwise this "
            "command is a no-op"
        )
    name = options.texts["secret-name"]
    authority = _authority_in(api, options)
    if authority is None:
        _fail(f"no secret with '{name}' in '{options.texts['namespace']}'")
    webhook = options.texts["webhook-name"]
    shown = f"mutating={str(mutating).lower()}, validating={str(validating).lower()}, failurePolicy={policy}"
    _log("info", f"patching webhook configurations '{webhook}' {shown}")
    kinds = [*(["validating"] if validating else []), *(["mutating"] if mutating else [])]
    for kind in kinds:
        path = f"{_ADMISSION}/{kind}webhookconfigurations/{webhook}"
        try:
            configuration = api.call("GET", path)
        except _Refused as error:
            _fail(f"failed getting {kind} webhook", error)
        for one in configuration.get("webhooks") or ():
            one.setdefault("clientConfig", {})["caBundle"] = authority
            if policy:
                one["failurePolicy"] = policy
        try:
            api.call("PUT", path, configuration)
        except _Refused as error:
            _fail(f"failed patching {kind} webhook", error)
    _log("info", "Patched hook(s)")


def make_certificates(hosts: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """Return a new authority's certificate, one that it signed for these names and addresses, and its key; PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)]) for name in ("nil1", "nil2")]
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    own_id = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())

    def builder(number: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=_VALID_DAYS))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, key_encipherment=number == 1, key_cert_sign=number == 0, crl_sign=False,
                    content_commitment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(usages, critical=False)
        )  # fmt: skip

    alternatives = [_alternative(host.strip()) for host in hosts if host.strip()]
    leaf = builder(1).add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    leaf = leaf.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id), critical=False)
    built = (builder(0).add_extension(own_id, critical=False), leaf)
    pem = serialization.Encoding.PEM
    certificates = [one.sign(keys[0], hashes.SHA256()).public_bytes(pem) for one in built]
    private = keys[1].private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    return certificates[0], certificates[1], private


def _alternative(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
