"""Our own programs by name: what a forked container runs in the place of an exec.

The echo server is imported here, so that whoever forks a thousand of them holds its code once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from testbed.errors import InputError
from testbed.programs import client, echo


def run_builtin(name: str, args: Mapping[str, Any]) -> int:
    """Run a program of `catalogue` in this process, and return its exit status."""
    if name in ("echo", "pause", "client"):
        # They never wait for children, and as the first of their PID namespace they inherit those of ``exec``.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    match name:
        case "echo":
            ports = [(str(protocol), int(port)) for protocol, port in args["ports"]]
            return echo.serve(ports, args["identity"], text=str(args.get("text", "")))
        case "pause" | "client":
            return client.wait_for_end()
        case "kube-proxy":
            return _run_kube_proxy(args["argv"])
        case "kube-webhook-certgen":
            from testbed.programs import webhook_certgen

            return webhook_certgen.main(args["argv"][1:])
        case "coredns":
            from testbed.programs import dns

            return dns.main(args["argv"], str(args["address"]))
        case "nginx-ingress-controller":
            from testbed.programs.ingress import main as ingress

            return ingress.main(args["argv"], os.environ)
        case "openelb-controller":
            from testbed.programs.openelb import controller

            return controller.main(args["argv"], os.environ)
        case "openelb-speaker":
            from testbed.programs.openelb import speaker_main

            return speaker_main.main(args["argv"], os.environ)
    raise AssertionError(f"there is no program {name!r}")


def _run_kube_proxy(argv: Sequence[str]) -> int:
    """Run kube-proxy as its command line and environment say; what is wrong with them is one line."""
    from testbed.programs import kube_proxy

    try:
        args = kube_proxy.parse_command(argv, os.environ, _read_proxy_config, os.uname().nodename)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return kube_proxy.main(args)


def _read_proxy_config(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"kube-proxy cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"kube-proxy cannot read --config {path}: {reason}") from error
    if document is not None and not isinstance(document, dict):
        raise InputError(f"kube-proxy cannot read --config {path}: it holds no mapping, but {type(document).__name__}")
    return document or {}
