"""Doing probes and hooks: HTTP, TCP and exec, as the kubelet on a node would."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

from testbed.errors import KernelError
from testbed.kubelet.probes import http_verdict
from testbed.kubelet.runtime import Runtime

_MAX_ANSWER = 10 * 1024
Verdict = tuple[bool, str]
"""Whether it is healthy, and the kubelet's words when it is not."""


async def probe(
    runtime: Runtime, definition: Mapping[str, Any], container: Mapping[str, Any], container_id: str, *,
    node: str, address: IPv4Address, timeout_s: float,
) -> Verdict:  # fmt: skip
    """Run one probe or hook handler; never raises for what the program did."""
    try:
        if "exec" in definition:
            return await _exec(runtime, definition["exec"], container_id, timeout_s)
        if "httpGet" in definition:
            return await _http(runtime, definition["httpGet"], container, node, address, timeout_s)
        if "tcpSocket" in definition:
            return await _tcp(runtime, definition["tcpSocket"], container, node, address, timeout_s)
        if "sleep" in definition:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(float(definition["sleep"].get("seconds") or 0))
            return True, ""
    except TimeoutError:
        return False, f"command timed out after {timeout_s:g}s"
    # KernelError: the runtime does not exec in a container that has ended a moment ago.
    except (OSError, ValueError, KernelError, asyncio.IncompleteReadError) as error:
        return False, str(error) or type(error).__name__
    return True, ""  # a kind that is not supported says so in an event once, and holds nothing back


def port_number(port: int | str, container: Mapping[str, Any]) -> int:
    """Return a port given by number or by the name of one of the container's ports; ValueError when there is none."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for known in container.get("ports") or ():
        if known.get("name") == port:
            return int(known["containerPort"])
    raise ValueError(f'couldn\'t find port: "{port}"')


async def _tcp(
    runtime: Runtime, action: Mapping[str, Any], container: Mapping[str, Any], node: str, address: IPv4Address,
    timeout_s: float,
) -> Verdict:  # fmt: skip
    port = port_number(action["port"], container)
    host = IPv4Address(action["host"]) if action.get("host") else address
    try:
        (await runtime.connect(node, host, port, timeout_s=timeout_s)).close()
    except TimeoutError:
        return False, f"dial tcp {host}:{port}: i/o timeout"
    except ConnectionRefusedError:
        return False, f"dial tcp {host}:{port}: connect: connection refused"
    return True, ""


async def _exec(runtime: Runtime, action: Mapping[str, Any], container_id: str, timeout_s: float) -> Verdict:
    result = await runtime.exec(container_id, action.get("command") or [], timeout_s=timeout_s)
    if result.status == 124:
        return False, f"command timed out after {timeout_s:g}s"
    return result.status == 0, result.output


async def _http(
    runtime: Runtime, action: Mapping[str, Any], container: Mapping[str, Any], node: str, address: IPv4Address,
    timeout_s: float,
) -> Verdict:  # fmt: skip
    port = port_number(action["port"], container)
    host = IPv4Address(action["host"]) if action.get("host") else address
    path = action.get("path") or "/"
    headers = {"Host": f"{host}:{port}", "User-Agent": "kube-probe/1.30", "Accept": "*/*", "Connection": "close"}
    headers.update({header["name"]: header["value"] for header in action.get("httpHeaders") or ()})
    url = f"{action.get('scheme', 'HTTP').lower()}://{host}:{port}{path}"
    try:
        async with asyncio.timeout(timeout_s):
            connection = await runtime.connect(node, host, port, timeout_s=timeout_s)
            status = await _get(connection, path, headers, secure=action.get("scheme") == "HTTPS")
    except TimeoutError:
        return False, f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
    except ConnectionRefusedError:
        return False, f'Get "{url}": dial tcp {host}:{port}: connect: connection refused'
    return http_verdict(status)


async def _get(connection: Any, path: str, headers: Mapping[str, str], *, secure: bool) -> int:
    context = None
    if secure:  # the kubelet does not verify a probe's certificate either
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    options: dict[str, Any] = {"ssl": context, "server_hostname": ""} if context else {}
    reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_ANSWER, **options)
    try:
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await writer.drain()
        words = (await reader.readline()).split()
        if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
            raise ValueError(f"malformed HTTP response {b' '.join(words)[:80]!r}")
        return int(words[1])
    finally:
        writer.close()
