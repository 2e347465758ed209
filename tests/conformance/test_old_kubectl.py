"""A smoke test with Debian 12's kubectl 1.20: objects work; exec does not, and says so."""

from __future__ import annotations

import pytest
from support import OLD, Server

pytestmark = pytest.mark.skipif(
    not OLD.exists(), reason="no kubectl 1.20: ./dev test takes it from Debian's kubernetes-client where there is one"
)


def test_objects_with_kubectl_1_20(server: Server) -> None:
    """create, apply (created, unchanged, configured), get, describe, expose, scale, rollout, edit, delete."""
    for command, expected in (
        ("create ns dev", "namespace/dev created"),
        ("apply -f web.yaml", "deployment.apps/web created\nservice/web created"),
        ("apply -f web.yaml", "deployment.apps/web unchanged\nservice/web unchanged"),
        ("rollout status deploy/web -n dev --timeout=20s", 'deployment "web" successfully rolled out'),
        ("apply -f web-2.yaml", "deployment.apps/web configured\nservice/web unchanged"),
        ("get svc web -n dev -o jsonpath={.spec.ports[0].targetPort}", "http"),
        ("get deploy -n dev", "NAME   READY   UP-TO-DATE   AVAILABLE   AGE\nweb    2/2     2            2           98s"),
        ("scale deploy web -n dev --replicas=1", "deployment.apps/web scaled"),
        ("expose deploy web -n dev --port=80 --name=more", "service/more exposed"),
        ("label svc more -n dev a=b", "service/more labeled"),
        ("patch svc more -n dev -p {\"spec\":{\"ports\":[{\"port\":80,\"name\":\"x\"}]}}", "service/more patched"),
        ("edit svc more -n dev", "service/more edited"),
        ("delete -f web.yaml", 'deployment.apps "web" deleted\nservice "web" deleted'),
        ("get deploy -n dev", ""),
    ):  # fmt: skip
        done = server.kubectl(*command.split(" "), program=OLD)
        assert (done.stdout.strip(), done.returncode) == (expected, 0), (command, done.stdout, done.stderr)
    described = server.kubectl("describe", "svc", "more", "-n", "dev", program=OLD)
    assert "Type:              ClusterIP" in described.stdout, described
    refused = server.kubectl("create", "-f", "nodeport-80.yaml", program=OLD)
    assert "provided port is not in the valid range" in refused.stderr and refused.returncode == 1
