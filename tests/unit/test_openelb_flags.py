"""Command lines of OpenELB's programs, and the settings of ConfigMap openelb-testbed."""

from __future__ import annotations

import pytest
from openelb_support import manifest_objects

from testbed.dataplane.membership import Timings
from testbed.errors import InputError
from testbed.programs.catalogue import Catalogue, PodInfo
from testbed.programs.openelb.flags import (
    Settings,
    parse_controller_flags,
    parse_speaker_flags,
    read_settings,
)

NODE = {"NODE_NAME": "node1", "MEMBER_LIST_SECRET": "openelb-speakers"}


def args(kind: str) -> list[str]:
    """Return the command line of a workload of the manifest."""
    (workload,) = manifest_objects(kind)
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def test_the_manifests_command_lines() -> None:
    """As the stock manifest has them: layer2 is off."""
    assert parse_controller_flags(args("Deployment")).elects_leader
    assert parse_controller_flags(args("Deployment")).metrics_port == 50052
    flags = parse_speaker_flags(args("DaemonSet"), NODE)
    assert (flags.layer2_enabled, flags.node, flags.secret, flags.bind_port, flags.metrics_port) == (
        False,
        "node1",
        "openelb-speakers",
        7946,
        50053,
    )
    assert flags.settings == Settings() and not flags.settings.is_strict


@pytest.mark.parametrize(
    "image", ["kubesphere/openelb-controller:v0.6.0", "docker.io/kubesphere/openelb-speaker:v0.6.0@sha256:" + "0" * 64]
)
def test_the_images_run_our_programs(image: str) -> None:
    """Whatever their prefix, tag and digest; the speaker's image has a gobgp for the stock readiness probe."""
    catalogue = Catalogue()
    name = image.split("/")[-1].split(":")[0]
    pod = PodInfo(namespace="openelb-system", pod="p", node="node1", address="10.0.0.1")
    program = catalogue.program(catalogue.lookup(image), image, [name], ["--leader-elect"], pod)
    assert program.builtin == name and program.builtin_args == {"argv": [name, "--leader-elect"]}
    assert ("/usr/local/bin/gobgp" in catalogue.lookup(image).files(pod)) == (name == "openelb-speaker")


def test_our_flags() -> None:
    """Strictness and timings."""
    flags = parse_speaker_flags(
        ["openelb-speaker", "--enable-layer2", "--strict-upstream", "--heartbeat-interval=100ms", "--dead-after", "1s"],
        NODE,
    )
    assert flags.layer2_enabled and flags.settings == Settings(is_strict=True, timings=Timings(0.1, 1.0))
    assert parse_speaker_flags(["openelb-speaker", "--upstream-timings"], NODE).settings.timings is None


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["openelb-speaker", "--nonsense"], "unknown flag: --nonsense"),
        (
            ["openelb-speaker", "--enable-layer2=maybe"],
            'invalid argument "maybe" for "--enable-layer2" flag: strconv.ParseBool: parsing "maybe": invalid syntax',
        ),
        (["openelb-speaker", "--bind-port"], "flag needs an argument: --bind-port"),
        (["openelb-speaker", "--bind-port=x"], 'invalid argument "x" for "--bind-port" flag: it ends with no port'),
        (["openelb-speaker", "serve"], 'unknown command "serve" for "openelb-speaker"'),
        (
            ["openelb-speaker", "--dead-after=0s"],
            "heartbeatInterval 0.4s and deadAfter 0s: at least 0.05s, and two heartbeats, or everybody is dead now and then",
        ),
        (
            ["openelb-speaker", "--upstream-timings", "--dead-after=9s"],
            "heartbeatInterval and deadAfter do not go with upstreamTimings",
        ),
    ],
)
def test_what_is_refused(argv: list[str], text: str) -> None:
    """In one line that names the flag."""
    with pytest.raises(InputError) as caught:
        parse_speaker_flags(argv, NODE)
    assert str(caught.value) == text


def test_a_speaker_needs_a_node() -> None:
    """By flag or environment."""
    with pytest.raises(InputError, match="neither --node-name nor NODE_NAME is set"):
        parse_speaker_flags(["openelb-speaker"], {})
    assert parse_speaker_flags(["openelb-speaker", "--node-name=n"], {}).node == "n"


def test_settings_of_the_configmap() -> None:
    """They are laid over those of the flags."""
    assert read_settings({}, Settings(is_strict=True)) == Settings(is_strict=True)
    assert read_settings({"strictUpstream": "false"}, Settings(is_strict=True)) == Settings()
    assert read_settings({"heartbeatInterval": "1s"}, Settings()).timings == Timings(1.0, 4.0)
    with pytest.raises(InputError, match="no setting is called 'strict'; there are strictUpstream, upstreamTimings"):
        read_settings({"strict": "true"}, Settings())
    with pytest.raises(InputError, match="strictUpstream: 'yes' is neither true nor false"):
        read_settings({"strictUpstream": "yes"}, Settings())
