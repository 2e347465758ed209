"""kube-proxy's command line: upstream's flags, as far as they mean something here.

Source: kubernetes cmd/kube-proxy/app/options.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from testbed.errors import InputError

#: Flag -> where its value goes in a KubeProxyConfiguration, and how it is read.
_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "bind-address": ("bindAddress", "text"),
    "cluster-cidr": ("clusterCIDR", "text"),
    "config-sync-period": ("configSyncPeriod", "text"),
    "conntrack-max-per-core": ("conntrack.maxPerCore", "number"),
    "conntrack-min": ("conntrack.min", "number"),
    "conntrack-tcp-be-liberal": ("conntrack.tcpBeLiberal", "flag"),
    "conntrack-tcp-timeout-close-wait": ("conntrack.tcpCloseWaitTimeout", "text"),
    "conntrack-tcp-timeout-established": ("conntrack.tcpEstablishedTimeout", "text"),
    "conntrack-udp-timeout": ("conntrack.udpTimeout", "text"),
    "conntrack-udp-timeout-stream": ("conntrack.udpStreamTimeout", "text"),
    "detect-local-mode": ("detectLocalMode", "text"),
    "feature-gates": ("featureGates", "gates"),
    "healthz-bind-address": ("healthzBindAddress", "text"),
    "iptables-localhost-nodeports": ("iptables.localhostNodePorts", "flag"),
    "iptables-masquerade-bit": ("iptables.masqueradeBit", "number"),
    "iptables-min-sync-period": ("iptables.minSyncPeriod", "text"),
    "iptables-sync-period": ("iptables.syncPeriod", "text"),
    "ipvs-exclude-cidrs": ("ipvs.excludeCIDRs", "list"),
    "ipvs-min-sync-period": ("ipvs.minSyncPeriod", "text"),
    "ipvs-scheduler": ("ipvs.scheduler", "text"),
    "ipvs-strict-arp": ("ipvs.strictARP", "flag"),
    "ipvs-sync-period": ("ipvs.syncPeriod", "text"),
    "ipvs-tcp-timeout": ("ipvs.tcpTimeout", "text"),
    "ipvs-tcpfin-timeout": ("ipvs.tcpFinTimeout", "text"),
    "ipvs-udp-timeout": ("ipvs.udpTimeout", "text"),
    "masquerade-all": ("iptables.masqueradeAll", "flag"),
    "metrics-bind-address": ("metricsBindAddress", "text"),
    "nodeport-addresses": ("nodePortAddresses", "list"),
    "pod-bridge-interface": ("detectLocal.bridgeInterface", "text"),
    "pod-interface-name-prefix": ("detectLocal.interfaceNamePrefix", "text"),
    "proxy-mode": ("mode", "text"),
    "proxy-port-range": ("portRange", "text"),
    "udp-timeout": ("udpIdleTimeout", "text"),
}
#: Known, and of no effect here: how to reach the API, logging, the process itself. True: it is a boolean flag.
_IGNORED: Final[Mapping[str, bool]] = {
    "bind-address-hard-fail": True, "kube-api-burst": False, "kube-api-content-type": False, "kube-api-qps": False,
    "kubeconfig": False, "log-flush-frequency": False, "logging-format": False, "logtostderr": True, "master": False,
    "oom-score-adj": False, "profiling": True, "show-hidden-metrics-for-version": False, "v": False, "vmodule": False,
}  # fmt: skip
_TRUE, _FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")


def parse_command(
    argv: Sequence[str], env: Mapping[str, str], read_config: Callable[[str], Mapping[str, Any]], hostname: str = ""
) -> dict[str, Any]:
    """Return the arguments of `kube_proxy.main` for a container's command line and environment.

    As upstream's, flags that stand for a field of the configuration are ignored when there is a ``--config``, except
    ``--hostname-override``.

    Args:
        argv: The command with its arguments; ``--flag=value`` or, but for booleans, two words.
        env: NODE_NAME, TESTBED_API_SOCKET, XTABLES_LOCKFILE, TESTBED_IPTABLES_BACKEND, TESTBED_READY_FILE.
        read_config: Returns the decoded KubeProxyConfiguration of a file.
        hostname: Names the node when nothing else does.

    Raises:
        InputError: a flag is unknown or has a bad value; no node name or API socket is given.
    """
    flags = _read_flags(argv[1:])
    if "config" in flags:
        config = dict(read_config(flags["config"]))
    else:
        config = {}
        for flag, value in flags.items():
            if flag in _FIELDS:
                path, kind = _FIELDS[flag]
                _put(config, path, _read_value(flag, kind, value))
    cleanup, init_only = (_read_value(name, "flag", flags.get(name, "false")) for name in ("cleanup", "init-only"))
    node = flags.get("hostname-override") or config.get("hostnameOverride") or env.get("NODE_NAME") or hostname
    if not cleanup and not node:
        raise InputError("kube-proxy does not know its node: set --hostname-override or NODE_NAME")
    if not cleanup and not init_only and not env.get("TESTBED_API_SOCKET"):
        raise InputError("kube-proxy does not know where the API is: set TESTBED_API_SOCKET to its socket")
    return {
        "node_name": str(node or "").strip().lower(),
        "api_socket": env.get("TESTBED_API_SOCKET"),
        "config": config,
        "lock_file": env.get("XTABLES_LOCKFILE"),
        "iptables_backend": env.get("TESTBED_IPTABLES_BACKEND"),
        "ready_file": env.get("TESTBED_READY_FILE"),
        "cleanup": cleanup,
        "init_only": init_only,
    }


def _read_flags(words: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            raise InputError(f"kube-proxy takes no argument {word!r}, only flags")
        is_flag = (
            name in ("cleanup", "init-only") or _IGNORED.get(name, False) or _FIELDS.get(name, ("", ""))[1] == "flag"
        )
        if name not in (*_FIELDS, *_IGNORED, "config", "hostname-override", "cleanup", "init-only"):
            raise InputError(f"kube-proxy: unknown flag: --{name}")
        if not equals:
            if not is_flag and not left:
                raise InputError(f"kube-proxy: flag needs an argument: --{name}")
            value = "true" if is_flag else left.pop(0)
        flags[name] = value
    return flags


def _read_value(flag: str, kind: str, value: str) -> Any:
    if kind == "flag" and value in (*_TRUE, *_FALSE):
        return value in _TRUE
    if kind == "number" and value.removeprefix("-").isdigit():
        return int(value)
    if kind == "list":
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind == "gates":
        gates = dict(part.partition("=")[::2] for part in value.split(",") if part)
        return {name.strip(): _read_value(flag, "flag", gate.strip()) for name, gate in gates.items()}
    if kind != "text":
        wanted = {"flag": "true or false", "number": "a whole number"}[kind]
        raise InputError(f"kube-proxy: invalid argument {value!r} for --{flag}: must be {wanted}")
    return value


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value
