"""The ConfigMap kube-proxy is where kube-proxy's mode and options come from, edited as on a cluster that kubeadm made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_lab_api import command, kubectl

pytestmark = [pytest.mark.root, pytest.mark.timeout(240), pytest.mark.usefixtures("kubectl")]

__all__ = ["kubectl"]


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """A lab whose kube-proxy the tests of this file reconfigure, one after the other."""
    name = f"configmap-{os.getpid()}"
    command("up", name)
    yield name
    command("down", name)


def kube(lab: str, *words: str) -> str:
    return command("kubectl", "-l", lab, "-n", "kube-system", *words)


def edit(lab: str, old: str, new: str) -> None:
    """Replace a text in config.conf."""
    import json

    found = json.loads(kube(lab, "get", "configmap", "kube-proxy", "-o", "json"))["data"]["config.conf"]
    assert old in found
    patch = {"data": {"config.conf": found.replace(old, new)}}
    kube(lab, "patch", "configmap", "kube-proxy", "--type", "merge", "-p", json.dumps(patch))


def test_mode_changes_with_a_rollout(lab: str) -> None:
    """The text is kubeadm's, so that recipes fit; after a restart of the DaemonSet there are the new mode's rules alone."""
    config = kube(lab, "get", "configmap", "kube-proxy", "-o", "jsonpath={.data.config\\.conf}")
    assert 'mode: ""\n' in config and "strictARP: false\n" in config and 'scheduler: ""\n' in config
    assert "tokenFile:" in kube(lab, "get", "configmap", "kube-proxy", "-o", "jsonpath={.data.kubeconfig\\.conf}")
    edit(lab, 'mode: ""', 'mode: "nftables"')
    kube(lab, "rollout", "restart", "daemonset", "kube-proxy")
    kube(lab, "rollout", "status", "daemonset", "kube-proxy", "--timeout", "60s")
    for node in ("node1", "node2", "node3"):
        assert "chain services" in command("exec", "-l", lab, node, "--", "nft", "list", "table", "ip", "kube-proxy")
        assert "KUBE-SVC-" not in command("exec", "-l", lab, node, "--", "iptables-save")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param("mode:", "mode: ipfs #", "mode: Invalid value: 'ipfs': must be one of iptables, ipvs", id="mode"),
        pytest.param(
            "mode:", "mode: [", "cannot read --config /var/lib/kube-proxy/config.conf: while parsing", id="YAML"
        ),
        pytest.param(
            'scheduler: ""',
            'scheduler: "r r"',
            "ipvs.scheduler: Invalid value: 'r r'",
            id="scheduler",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_configuration(lab: str, old: str, new: str, said: str, eventually: Callable[..., Any]) -> None:
    """The pods crash-loop and say why; what the last kube-proxy wrote stays; put right, the next ones start."""
    edit(lab, old, new)
    kube(lab, "delete", "pods", "-l", "k8s-app=kube-proxy")

    def says_why() -> bool:
        with contextlib.suppress(AssertionError):  # a pod that is being replaced has no log
            listed = kube(lab, "get", "pods", "-l", "k8s-app=kube-proxy")
            return "CrashLoopBackOff" in listed and said in kube(lab, "logs", "daemonset/kube-proxy")
        return False

    eventually(says_why, within_s=60)
    assert "chain services" in command("exec", "-l", lab, "node1", "--", "nft", "list", "table", "ip", "kube-proxy")
    edit(lab, new, old)
    kube(lab, "delete", "pods", "-l", "k8s-app=kube-proxy")
    kube(lab, "rollout", "status", "daemonset", "kube-proxy", "--timeout", "60s")
