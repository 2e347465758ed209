"""Our own programs by name: what a forked container runs in the place of an exec.

The echo server is imported here, so that whoever forks a thousand of them holds its code once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from testbed.programs import client, echo

API_SOCKET_VARIABLE = "TESTBED_API_SOCKET"
#: Command-line flags of kube-proxy that stand for a field of its configuration.
_PROXY_FLAGS = {"--proxy-mode": "mode", "--cluster-cidr": "clusterCIDR"}


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
        case "coredns":
            from testbed.programs import dns

            return dns.main(args["argv"], str(args["address"]))
    raise AssertionError(f"there is no program {name!r}")


def _run_kube_proxy(argv: Sequence[str]) -> int:
    """Turn kube-proxy's command line and environment into what our kube-proxy takes."""
    import yaml

    from testbed.programs import kube_proxy

    config: dict[str, Any] = {}
    given: dict[str, Any] = {}
    node = os.uname().nodename
    words = iter(argv[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--v" or flag == "-v":
            continue
        if not equals:
            value = next(words, "")
        if flag == "--config":
            try:
                with open(value, encoding="utf-8") as file:
                    config = yaml.safe_load(file) or {}
            except (OSError, yaml.YAMLError) as error:
                sys.stderr.write(f"kube-proxy: cannot read {value}: {error}\n")
                return 1
        elif flag == "--hostname-override":
            node = value
        elif flag in _PROXY_FLAGS:
            given[_PROXY_FLAGS[flag]] = value
        else:
            sys.stderr.write(f"kube-proxy: unknown flag: {flag}\n")
            return 1
    return kube_proxy.main(
        {
            "node_name": node,
            "api_socket": os.environ.get(API_SOCKET_VARIABLE, ""),
            "config": {**config, **given},
            "lock_file": os.environ.get("XTABLES_LOCKFILE", ""),
        }
    )
