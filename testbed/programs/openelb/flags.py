"""Command lines of the two programs, and the switches that a ConfigMap sets while the speakers run.

ConfigMap ``openelb-testbed`` in OpenELB's namespace has, all optional: ``strictUpstream`` and ``upstreamTimings`` (true,
false), ``heartbeatInterval`` and ``deadAfter`` (durations: 400ms, 2s). What it leaves out is as the flags say. It is there
so that the stock manifest need not be edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from testbed.dataplane.membership import Timings
from testbed.errors import InputError
from testbed.manifests.scalars import parse_duration

SETTINGS_CONFIGMAP: Final = "openelb-testbed"
SETTINGS: Final = ("strictUpstream", "upstreamTimings", "heartbeatInterval", "deadAfter")

_LEAST_HEARTBEAT_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerFlags:
    """What the controller is told. ``metrics_port``: 0 for none."""

    metrics_port: int = 50052
    elects_leader: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the speaker behaves.

    ``is_strict``: as upstream 0.6 does, where a user would call that a fault. ``timings`` is None for upstream's, which
    depend on the number of members.
    """

    is_strict: bool = False
    timings: Timings | None = field(default_factory=Timings)

    def timings_for(self, members: int) -> Timings:
        return self.timings or Timings.upstream(members)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerFlags:
    """What the speaker is told."""

    layer2_enabled: bool = False  # upstream's default
    keepalived_vip_enabled: bool = False
    bind_address: str = "0.0.0.0"
    bind_port: int = 7946
    metrics_port: int = 50053
    secret: str = ""
    node: str = ""
    settings: Settings = field(default_factory=Settings)


_CONTROLLER_TEXTS = ("metrics-addr", "webhook-port", "readiness-addr", "health-probe-bind-address", "leader-election-id",
    "keepalived-image", "log-level", "v", "zap-log-level", "zap-encoder", "zap-stacktrace-level", "kubeconfig")  # fmt: skip
_CONTROLLER_SWITCHES = ("leader-elect", "enable-leader-election", "zap-devel", "logtostderr")
_SPEAKER_TEXTS = (
    "api-hosts", "metrics-addr", "bind-addr", "bind-port", "secret", "node-name", "log-path", "log-level",
    "keepalived-args", "v", "zap-log-level", "zap-encoder", "zap-stacktrace-level", "kubeconfig", "heartbeat-interval",
    "dead-after",
)  # fmt: skip
_SPEAKER_SWITCHES = (
    "enable-layer2", "enable-keepalived-vip", "zap-devel", "logtostderr", "strict-upstream", "upstream-timings",
)  # fmt: skip


def parse_controller_flags(argv: Sequence[str]) -> ControllerFlags:
    """Return what a command line asks for.

    Raises:
        InputError: in cobra's words.
    """
    given = _parse(argv, _CONTROLLER_TEXTS, _CONTROLLER_SWITCHES)
    elects = "true" in (given.get("leader-elect"), given.get("enable-leader-election"))
    return ControllerFlags(metrics_port=_port(given, "metrics-addr", 50052), elects_leader=elects)


def parse_speaker_flags(argv: Sequence[str], env: Mapping[str, str]) -> SpeakerFlags:
    """Return what a command line and an environment ask for.

    Raises:
        InputError: in cobra's words, or what is missing.
    """
    given = _parse(argv, _SPEAKER_TEXTS, _SPEAKER_SWITCHES)
    node = given.get("node-name") or env.get("NODE_NAME", "")
    if not node:
        raise InputError("openelb-speaker: neither --node-name nor NODE_NAME is set: a speaker announces for a node")
    settings = read_settings(
        {
            "strictUpstream": given.get("strict-upstream", "false"),
            "upstreamTimings": given.get("upstream-timings", "false"),
            **{
                name: given[flag]
                for name, flag in (("heartbeatInterval", "heartbeat-interval"), ("deadAfter", "dead-after"))
                if flag in given
            },
        },
        Settings(),
    )
    return SpeakerFlags(
        layer2_enabled=given.get("enable-layer2") == "true",
        keepalived_vip_enabled=given.get("enable-keepalived-vip") == "true",
        bind_address=given.get("bind-addr", "0.0.0.0"),
        bind_port=_port(given, "bind-port", 7946),
        metrics_port=_port(given, "metrics-addr", 50053),
        secret=env.get("MEMBER_LIST_SECRET") or given.get("secret", ""),
        node=node,
        settings=settings,
    )


def read_settings(values: Mapping[str, str], base: Settings) -> Settings:
    """Return the settings that a ConfigMap's values say, where they are silent those of ``base``.

    Raises:
        InputError: a value cannot be read, or there is no such setting.
    """
    unknown = sorted(set(values) - set(SETTINGS))
    if unknown:
        raise InputError(f"no setting is called {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    settings = base
    if "strictUpstream" in values:
        settings = replace(settings, is_strict=_truth("strictUpstream", values["strictUpstream"]))
    if "upstreamTimings" in values:
        is_upstream = _truth("upstreamTimings", values["upstreamTimings"])
        settings = replace(settings, timings=None if is_upstream else base.timings or Timings())
    if "heartbeatInterval" not in values and "deadAfter" not in values:
        return settings
    if settings.timings is None:
        raise InputError("heartbeatInterval and deadAfter do not go with upstreamTimings")
    heartbeat_s = _seconds("heartbeatInterval", values, settings.timings.heartbeat_s)
    dead_after_s = _seconds("deadAfter", values, 4 * heartbeat_s)
    if heartbeat_s < _LEAST_HEARTBEAT_S or dead_after_s < 2 * heartbeat_s:
        raise InputError(
            f"heartbeatInterval {heartbeat_s:g}s and deadAfter {dead_after_s:g}s: at least {_LEAST_HEARTBEAT_S:g}s, and two "
            "heartbeats, or everybody is dead now and then"
        )
    return replace(settings, timings=Timings(heartbeat_s, dead_after_s))


def _seconds(name: str, values: Mapping[str, str], default: float) -> float:
    if name not in values:
        return default
    try:
        return float(parse_duration(values[name].strip()))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _truth(name: str, text: str) -> bool:
    if text.strip().lower() not in ("true", "false"):
        raise InputError(f"{name}: {text!r} is neither true nor false")
    return text.strip().lower() == "true"


def _parse(argv: Sequence[str], texts: Sequence[str], switches: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    words = list(argv[1:])
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            raise InputError(f'unknown command "{word}" for "{argv[0].rpartition("/")[2]}"')
        if name in switches:
            value = value if equals else "true"
            if value not in ("true", "false"):
                raise InputError(
                    f'invalid argument "{value}" for "--{name}" flag: strconv.ParseBool: parsing "{value}": invalid syntax'
                )
        elif name not in texts:
            raise InputError(f"unknown flag: --{name}")
        elif not equals:
            if not words:
                raise InputError(f"flag needs an argument: --{name}")
            value = words.pop(0)
        given[name] = value
    return given


def _port(given: Mapping[str, str], name: str, default: int) -> int:
    """Return the port of ``:PORT``, ``HOST:PORT`` or ``PORT``; 0 switches off."""
    text = given.get(name, str(default)).rpartition(":")[2]
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise InputError(f'invalid argument "{given[name]}" for "--{name}" flag: it ends with no port')
    return int(text)
