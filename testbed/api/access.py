"""Who asks: client certificates, the administrator's token, and service accounts' tokens.

::

    unix socket                                   the administrator: the socket's folder is 0700
    TLS + client certificate of the lab's CA      CN and O are user and groups
    TLS + Authorization: Bearer TOKEN             the administrator's, or a service account's JSON Web Token (HS256)
    TLS alone                                     system:anonymous, who may only ask for health and version

Whoever is somebody may do everything: a lab has no RBAC. Tokens are signed with a key that is made with the lab, so they
can be checked without being kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from testbed.api.certificates import ADMIN_GROUP, ADMIN_NAME
from testbed.errors import ApiError
from testbed.model.objects import Object

ISSUER = "https://kubernetes.default.svc.cluster.local"
#: What a real kubelet asks for when the pod names no time: an hour, extended to a year for older clients.
TOKEN_SECONDS = 365 * 24 * 3600
#: What ClusterRole system:public-info-viewer allows to everybody.
PUBLIC_PATHS = frozenset({"/healthz", "/livez", "/readyz", "/version", "/version/"})

#: namespace, name -> the ServiceAccount, or None
FindAccount = Callable[[str, str], Object | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who asks."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""


ADMIN = User(name=ADMIN_NAME, groups=(ADMIN_GROUP, "system:authenticated"))
ANONYMOUS = User(name="system:anonymous", groups=("system:unauthenticated",))


class Tokens:
    """Makes and checks bearer tokens.

    Args:
        key: signs service accounts' tokens.
        admin: the administrator's token.
        now_s: seconds since 1970.
    """

    def __init__(self, key: bytes, admin: str, *, now_s: Callable[[], float]) -> None:
        self._key = key
        self._admin = admin
        self._now_s = now_s

    def issue(self, account: Object, *, pod: Object | None = None, seconds: int = TOKEN_SECONDS) -> str:
        """Return a token that says ``system:serviceaccount:NAMESPACE:NAME``, with the claims of a real one."""
        metadata = account["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        now = int(self._now_s())
        bound: Object = {"namespace": namespace, "serviceaccount": {"name": name, "uid": metadata["uid"]}}
        if pod is not None:
            bound["pod"] = {"name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        claims = {
            "aud": [ISSUER],
            "exp": now + seconds,
            "iat": now,
            "iss": ISSUER,
            "kubernetes.io": bound,
            "nbf": now,
            "sub": f"system:serviceaccount:{namespace}:{name}",
        }
        signed = ".".join(_encoded(_compact(part)) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return f"{signed}.{_encoded(self._signature(signed))}"

    def user_of(self, token: str, find_account: FindAccount) -> User | None:
        """Return whose token it is, or None for one that is wrong, too old, or of an account that is gone."""
        if not token.isascii():  # compare_digest takes no other text, and no token of ours is other text
            return None
        if hmac.compare_digest(token.encode(), self._admin.encode()):
            return ADMIN
        signed, _, signature = token.rpartition(".")
        try:
            if not hmac.compare_digest(_decoded(signature), self._signature(signed)):
                return None
        except (binascii.Error, ValueError):
            return None
        claims: Mapping[str, Any] = json.loads(_decoded(signed.partition(".")[2]))  # we have signed it: it is ours
        if not claims["nbf"] - 60 <= self._now_s() < claims["exp"]:
            return None
        bound = claims["kubernetes.io"]
        account = find_account(bound["namespace"], bound["serviceaccount"]["name"])
        if account is None or account["metadata"]["uid"] != bound["serviceaccount"]["uid"]:
            return None
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{bound['namespace']}", "system:authenticated")
        return User(name=claims["sub"], groups=groups, uid=account["metadata"]["uid"])

    def _signature(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(), hashlib.sha256)


def _compact(value: Object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def authenticate(request: web.Request, tokens: Tokens | None, find_account: FindAccount) -> User:
    """Return who sends a request.

    Raises:
        ApiError: 401 for credentials that are wrong.
    """
    transport = request.transport
    if tokens is None or transport is None or transport.get_extra_info("sslcontext") is None:
        return ADMIN
    header = request.headers.get("Authorization", "")
    certificate = transport.get_extra_info("peercert")
    if certificate:  # the TLS layer has checked that it is from this lab's authority
        return _user_of_certificate(certificate)
    if not header:
        return ANONYMOUS
    kind, _, token = header.partition(" ")
    user = tokens.user_of(token.strip(), find_account) if kind.lower() == "bearer" else None
    if user is None:
        raise ApiError(401, "Unauthorized", "Unauthorized")
    return user


def _user_of_certificate(certificate: Mapping[str, Any]) -> User:
    fields = [pair for part in certificate["subject"] for pair in part]
    name = next((value for field, value in fields if field == "commonName"), "")
    groups = tuple(value for field, value in fields if field == "organizationName")
    return User(name=name, groups=(*groups, "system:authenticated"))


def refuse_anonymous(user: User, verb: str, what: Object | None, path: str) -> None:
    """Refuse what somebody without credentials may not do, in the words of the RBAC authorizer.

    Args:
        what: ``resource``, ``group``, ``namespace`` (None: the whole cluster), ``name`` of a resource's request, or None.

    Raises:
        ApiError: 403.
    """
    if user is not ANONYMOUS or path in PUBLIC_PATHS:
        return
    if what is None:
        text = f'forbidden: User "{user.name}" cannot {verb} path "{path}"'
        raise ApiError(403, "Forbidden", text)
    named = f'{what["key"]} "{what["name"]}"' if what["name"] else what["key"]
    scope = f'in the namespace "{what["namespace"]}"' if what["namespace"] else "at the cluster scope"
    thing = f'resource "{what["resource"]}" in API group "{what["group"]}"'
    text = f'{named} is forbidden: User "{user.name}" cannot {verb} {thing} {scope}'
    details = {"kind": what["resource"], **({"name": what["name"]} if what["name"] else {})}
    raise ApiError(403, "Forbidden", text, details=details)
