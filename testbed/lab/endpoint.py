"""The API over TLS: for the host on 127.0.0.1, and inside the lab behind the Service ``kubernetes``.

::

    host   kubectl ──▶ 127.0.0.1:PORT (socket made before the lab was entered)  ─┐
    pod    curl ──▶ 10.96.0.1:443 ──kube-proxy──▶ gateway of the nodes' LAN:6443 ┴─▶ control process
"""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from aiohttp import web

from testbed.api.certificates import Credentials, kubeconfig, make_credentials
from testbed.lab.request import LabRequest
from testbed.model.topology import Topology

API_PORT = 6443  # kubeadm's; what the Service's targetPort says
_IP_FREEBIND = 15  # linux/in.h; Python 3.11 has no name for it


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a lab's API needs to be reached and to know who asks."""

    credentials: Credentials
    admin_token: str
    signing_key: bytes
    inside: IPv4Address  # where the API listens inside the lab


def make_endpoint(name: str, topology: Topology) -> Endpoint:
    """Return new credentials for a lab."""
    inside = api_address(topology)
    service = topology.cluster.service_cidr.network_address + 1
    domain = topology.cluster.domain
    names = (
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        f"kubernetes.default.svc.{domain}",
    )
    addresses = (IPv4Address("127.0.0.1"), service, inside)
    return Endpoint(
        credentials=make_credentials(name, names=names, addresses=addresses),
        admin_token=secrets.token_urlsafe(32),
        signing_key=secrets.token_bytes(32),
        inside=inside,
    )


def api_address(topology: Topology) -> IPv4Address:
    """Return the address of the API inside a lab: the gateway of the first node's LAN, which is the lab itself."""
    return topology.network(topology.nodes[0].network).gateway


async def listen(endpoint: Endpoint, runner: web.AppRunner, request: LabRequest) -> None:
    """Serve TLS on the host's loopback and inside the lab, and write the kubeconfig."""
    context = _server_context(endpoint.credentials)
    outside = socket.socket(fileno=request.api_fd)
    await web.SockSite(runner, outside, ssl_context=context).start()
    inside = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    inside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # The spawner may still be making the bridge that has this address.
    inside.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
    inside.bind((str(endpoint.inside), API_PORT))
    await web.SockSite(runner, inside, ssl_context=context).start()
    server = f"https://127.0.0.1:{outside.getsockname()[1]}"
    text = kubeconfig(request.name, server, endpoint.credentials, endpoint.admin_token)
    write_private(Path(request.folder, "kubeconfig"), text)


def _server_context(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL  # a token will do; a certificate of somebody else will not
    context.load_verify_locations(cadata=credentials.authority)
    context.set_alpn_protocols(["http/1.1"])
    # OpenSSL reads certificates and keys from files only; this one is in no folder and takes no room on a disk.
    with open(os.memfd_create("server.pem"), "w") as file:
        file.write(credentials.server + credentials.server_key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step."""
    new = path.with_suffix(".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.replace(path)
