"""kube-proxy as a process in a namespace, against the real API server: starts, follows changes, answers, ends, recovers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeNamespace
from proxy_support import endpoint, endpoint_slice, real_iptables, service, settings_of, state_of, without_counters

from testbed.api.client import ApiClient
from testbed.dataplane.iptables import parse_installed, render_full
from testbed.kernel.iptables import Backend, Iptables
from testbed.kernel.modules import why_no_ipvs

pytestmark = pytest.mark.root

Eventually = Callable[..., Any]
BOTH = pytest.mark.parametrize("backend", list(Backend), ids=lambda backend: backend.value)
_START_S = 30.0
_RECOVERY_S = 30.0  # syncPeriod is 1 s; a busy machine


def save(node: NodeNamespace, backend: Backend) -> str:
    return without_counters(node.run(f"iptables-{backend}-save"))


def events(api: ApiClient, reason: str) -> list[tuple[str, str, str]]:
    """Return kind and name of what an event with this reason is about, and its message."""
    found = api.list("events")[0]
    return [
        (e["involvedObject"]["kind"], e["involvedObject"]["name"], e["message"]) for e in found if e["reason"] == reason
    ]


def start(node: NodeNamespace, backend: Backend, eventually: Eventually, **options: Any) -> Any:
    proxy = node.start_proxy(backend, **options)
    eventually(lambda: node.ready_file.exists() or proxy.poll() is not None, within_s=_START_S)
    assert proxy.poll() is None, node.log
    return proxy


def test_process_follows_the_api(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """Rules appear, change and go with the API's objects; health and mode are answered; SIGTERM leaves the rules."""
    proxy = start(node, Backend.LEGACY, eventually)

    def nat() -> str:
        return node.run("iptables-legacy-save", "-t", "nat")

    assert "KUBE-POSTROUTING" in nat()
    api.create(service("web", "172.30.0.41"))
    api.create(endpoint_slice("web", endpoint("10.180.0.1")))
    eventually(lambda: "--to-destination 10.180.0.1:80" in nat())
    stored = api.get("endpointslices.discovery.k8s.io", "ns", "web-x")
    api.update({**stored, "endpoints": [endpoint("10.180.0.2")]})
    eventually(lambda: "--to-destination 10.180.0.2:80" in nat() and "10.180.0.1:80" not in nat())
    assert '"nodeEligible": true' in node.run("curl", "-sS", "http://127.0.0.1:10256/healthz")
    assert node.run("curl", "-sS", "http://127.0.0.1:10249/proxyMode") == "iptables"
    assert json.loads(node.run("curl", "-sS", "http://127.0.0.1:10249/configz"))["kubeproxy.config.k8s.io"]
    assert "kubeproxy_sync_proxy_rules_duration_seconds_count" in node.run(
        "curl", "-sS", "http://127.0.0.1:10249/metrics"
    )
    api.delete("services", "ns", "web")
    eventually(lambda: "KUBE-SVC-" not in nat() and "KUBE-SEP-" not in nat())
    assert eventually(lambda: events(api, "Starting")) == [("Node", "node1", "")]
    proxy.terminate()
    assert proxy.wait(10) == 0
    assert "KUBE-POSTROUTING" in nat()


def test_health_check_node_port_is_served(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """The port answers with the count of ready local endpoints, as upstream's does, and goes with its Service."""
    start(node, Backend.LEGACY, eventually)
    fields = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}
    api.create(service("web", "172.30.0.41", node_port=30080, ingress=["1.2.3.4"], **fields))
    api.create(endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")))

    def answer() -> str:
        return node.run("sh", "-c", "curl -sSi http://127.0.0.1:31000/x 2>&1 || true")

    eventually(lambda: '"localEndpoints": 1' in answer())
    seen = answer()
    head, _, body = seen.replace("\r", "").partition("\n\n")
    assert head.startswith("HTTP/1.1 200 OK")
    for header in (
        "Content-Type: application/json",
        "X-Content-Type-Options: nosniff",
        "X-Load-Balancing-Endpoint-Weight: 1",
    ):
        assert header in head
    assert body == (
        '{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n'
        '\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
    )
    stored = api.get("endpointslices.discovery.k8s.io", "ns", "web-x")
    api.update({**stored, "endpoints": [endpoint("10.180.1.1", "node2")]})
    eventually(lambda: answer().startswith("HTTP/1.1 503"))
    api.delete("services", "ns", "web")
    eventually(lambda: ":31000" not in node.run("ss", "-Hltn"))


@BOTH
def test_a_missing_match_takes_out_its_service_only(
    api: ApiClient, node: NodeNamespace, eventually: Eventually, backend: Backend, tmp_path: Path
) -> None:
    """Without the sctp match an SCTP Service is named in an event and in /healthz, others work; with it, so does that one."""
    extensions = Path("/usr/lib/x86_64-linux-gnu/xtables")
    if not (extensions / "libxt_sctp.so").exists():
        pytest.skip(f"iptables has no extensions in {extensions}")
    own = tmp_path / "xtables"
    own.mkdir()
    for library in extensions.iterdir():
        if library.name != "libxt_sctp.so":
            (own / library.name).symlink_to(library)
    api.create(service("phone", "172.30.0.42", protocol="SCTP"))
    api.create(endpoint_slice("phone", endpoint("10.180.0.2"), protocol="SCTP"))
    api.create(service("web", "172.30.0.41"))
    api.create(endpoint_slice("web", endpoint("10.180.0.1")))
    start(node, backend, eventually, env={"XTABLES_LIBDIR": str(own)})
    assert "--to-destination 10.180.0.1:80" in save(node, backend)
    assert "10.180.0.2" not in save(node, backend)
    [(kind, name, message)] = eventually(lambda: events(api, "ProxyRulesRefused"))
    assert (kind, name) == ("Service", "phone")
    assert "sctp" in message and "ns/phone:p80" in message
    assert '"refused": ["ns/phone:p80"]' in eventually(
        lambda: node.run("curl", "-sS", "http://127.0.0.1:10256/healthz")
    )
    (own / "libxt_sctp.so").symlink_to(extensions / "libxt_sctp.so")
    eventually(lambda: "--to-destination 10.180.0.2:80" in save(node, backend), within_s=_RECOVERY_S)
    eventually(lambda: "refused" not in node.run("curl", "-sS", "http://127.0.0.1:10256/healthz"))


def test_lock_held_by_another_process(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """kube-proxy says who holds the lock, and writes its rules once it is free."""
    start(node, Backend.LEGACY, eventually)
    with open(node.lock_file, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        api.create(service("web", "172.30.0.41"))
        [(kind, name, message)] = eventually(lambda: events(api, "ProxySyncFailed"), within_s=_RECOVERY_S)
        assert (kind, name) == ("Node", "node1")
        assert "waited 5 s for the xtables lock" in message and "which process" in message
    eventually(lambda: "ns/web:p80 has no endpoints" in save(node, Backend.LEGACY), within_s=_RECOVERY_S)


@BOTH
def test_killed_in_the_middle_of_a_sync(
    api: ApiClient, node: NodeNamespace, eventually: Eventually, backend: Backend, tmp_path: Path
) -> None:
    """A kube-proxy that died between two transactions leaves what the next one completes, to the rules of a fresh node."""
    names = [f"s{number}" for number in range(150)]
    services = [service(name, f"172.30.1.{number + 1}") for number, name in enumerate(names)]
    slices = [endpoint_slice(name, endpoint(f"10.180.1.{number + 1}")) for number, name in enumerate(names)]
    for obj in (*services, *slices):
        api.create(obj)
    tool, folder = shutil.which(f"iptables-{backend}-restore"), tmp_path / "bin"
    assert tool
    folder.mkdir()
    broken = folder / f"iptables-{backend}-restore"
    # the first transaction reaches the kernel, then kube-proxy is gone
    broken.write_text(f'#!/bin/sh\nsed "/^COMMIT/q" | {tool} --noflush\nkill -9 $PPID\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    proxy = node.start_proxy(backend, env={"PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"})
    assert proxy.wait(_START_S) == -signal.SIGKILL
    start(node, backend, eventually)
    with real_iptables(backend, tmp_path) as fresh:
        wanted = Iptables(fresh, backend)
        wanted.apply(render_full(state_of(services, slices), settings_of()).text)
        assert sorted(save(node, backend).splitlines()) == sorted(without_counters(wanted.save()).splitlines())


@BOTH
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("*nat\n-F\nCOMMIT\n", id="nat flushed"),
        pytest.param("*nat\n-F\n-X\nCOMMIT\n", id="nat flushed and its chains deleted"),
        pytest.param("*filter\n-F KUBE-FORWARD\n-D FORWARD 2\nCOMMIT\n", id="a chain and a jump of filter"),
        pytest.param("*mangle\n-X KUBE-PROXY-CANARY\nCOMMIT\n", id="canary deleted"),
        pytest.param("*nat\n-F SEP\n-F SVC\n-X SEP\nCOMMIT\n", id="an endpoint's chain deleted"),
        pytest.param("*nat\n-R SVC 1 -j RETURN\nCOMMIT\n", id="a rule replaced"),
    ],
)
def test_damage_is_repaired(
    api: ApiClient, node: NodeNamespace, eventually: Eventually, backend: Backend, damage: str
) -> None:
    """What somebody takes away is back within syncPeriod, exactly, and the node has an event that says so."""
    api.create(service("web", "172.30.0.41", node_port=30080))
    api.create(endpoint_slice("web", endpoint("10.180.0.1")))
    start(node, backend, eventually)
    before = save(node, backend)
    chains = [chain for _, chain in parse_installed(before).chains]
    for short in ("SEP", "SVC"):
        damage = damage.replace(
            f" {short}", " " + next(chain for chain in chains if chain.startswith(f"KUBE-{short}-"))
        )
    (node.folder / "damage").write_text(damage)
    node.run(f"iptables-{backend}-restore", "--noflush", str(node.folder / "damage"))
    assert save(node, backend) != before or events(api, "ProxyRulesChanged")
    eventually(lambda: sorted(save(node, backend).splitlines()) == sorted(before.splitlines()), within_s=_RECOVERY_S)
    assert eventually(lambda: events(api, "ProxyRulesChanged"))[0][:2] == ("Node", "node1")


def test_a_renamed_bridge_is_followed(api: ApiClient, node: NodeNamespace, eventually: Eventually) -> None:
    """Rules that tell pods by their bridge take its new name within syncPeriod, and the node has an event."""
    node.run("ip", "link", "add", "cni0", "type", "bridge")
    api.create(service("web", "172.30.0.41"))
    api.create(endpoint_slice("web", endpoint("10.180.0.1")))
    start(
        node, Backend.NFT, eventually,
        config={"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
    )  # fmt: skip
    assert "! -i cni0" in save(node, Backend.NFT)
    node.run("ip", "link", "set", "cni0", "name", "br9")
    eventually(lambda: "! -i br9" in save(node, Backend.NFT), within_s=_RECOVERY_S)
    assert "cni0" not in save(node, Backend.NFT)
    [(kind, name, message)] = eventually(lambda: events(api, "BridgeRenamed"))
    assert (kind, name) == ("Node", "node1") and "cni0 is called br9 now" in message


@BOTH
def test_other_modes_tables_go_and_cleanup_leaves_what_upstreams_leaves(
    api: ApiClient, node: NodeNamespace, eventually: Eventually, backend: Backend
) -> None:
    """Starting removes the tables of nftables mode; --cleanup removes our rules but for the chains that are shared."""
    node.run("nft", "add table ip kube-proxy; add table ip6 kube-proxy; add table ip mine")
    api.create(service("web", "172.30.0.41", node_port=30080))
    api.create(endpoint_slice("web", endpoint("10.180.0.1")))
    proxy = start(node, backend, eventually)
    assert "kube-proxy" not in node.run("nft", "list", "tables") and "mine" in node.run("nft", "list", "tables")
    proxy.terminate()
    assert proxy.wait(10) == 0
    program = (
        "import sys; from testbed.programs.builtins import run_builtin; "
        "sys.exit(run_builtin('kube-proxy', {'argv': sys.argv[1:]}))"
    )
    env = ["env", f"TESTBED_IPTABLES_BACKEND={backend}", f"PYTHONPATH={os.pathsep.join(sys.path)}"]
    node.run(*env, sys.executable, "-c", program, "kube-proxy", "--cleanup")
    kept = [line for line in save(node, backend).splitlines() if "KUBE-" in line]
    assert sorted({line.split()[0].lstrip(":") for line in kept if line.startswith(":")}) == [
        "KUBE-FIREWALL", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY", "KUBE-PROXY-FIREWALL",
    ]  # fmt: skip
    assert [line for line in kept if line.startswith(("-A INPUT", "-A OUTPUT", "-A FORWARD"))] == [
        "-A INPUT -j KUBE-FIREWALL", "-A OUTPUT -j KUBE-FIREWALL",
    ]  # fmt: skip


def test_udp_flows_are_listed_and_deleted(node: NodeNamespace) -> None:
    """What conntrack(8) shows is what we list; of two flows exactly the one that is named goes."""
    (node.folder / "rules").write_text(render_full(state_of([], []), settings_of()).text)
    node.run("iptables-legacy-restore", "--noflush", str(node.folder / "rules"))
    program = (
        "import socket\n"
        "from testbed.kernel.conntrack import *\n"
        "server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); server.bind(('127.0.0.1', 5353))\n"
        "for port in (4001, 4002):\n"
        "    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); client.bind(('127.0.0.1', port))\n"
        "    client.sendto(b'x', ('127.0.0.1', 5353))\n"
        "flows = sorted(list_udp_flows())\n"
        "for f in flows:\n"
        "    print(f.source, f.source_port, f.destination, f.port, f.answered_by, f.answered_from)\n"
        "print(delete_udp_flows(flows[:1]), delete_udp_flows(flows[:1]), [f.source_port for f in list_udp_flows()])\n"
    )
    out = node.run("env", f"PYTHONPATH={os.pathsep.join(sys.path)}", sys.executable, "-c", program)
    there = "127.0.0.1 5353 127.0.0.1 5353"
    assert out.splitlines() == [f"127.0.0.1 4001 {there}", f"127.0.0.1 4002 {there}", "1 0 [4002]"]


def test_without_ip_vs_one_node_says_so_and_others_go_on(
    api: ApiClient, tmp_path: Path, eventually: Eventually
) -> None:
    """On a kernel without ip_vs: status 3, a log line, an event about the Node; another node in iptables mode goes on."""
    if not why_no_ipvs():
        pytest.skip("this kernel has ip_vs")
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(contextlib.closing(NodeNamespace(tmp_path))) for _ in range(2))
        start(other, Backend.LEGACY, eventually)
        proxy = one.start_proxy(Backend.LEGACY, config={"mode": "ipvs"})
        assert proxy.wait(_START_S) == 3
        assert "can't use the IPVS proxier: the kernel has no IPVS (module ip_vs): `modprobe ip_vs` as root" in one.log
        told = events(api, "FailedToStartProxy")
        assert [(kind, name) for kind, name, _ in told] == [("Node", "node1")] and "modprobe ip_vs" in told[0][2]
        api.create(service("web", "172.30.0.41"))
        api.create(endpoint_slice("web", endpoint("10.180.0.1")))
        eventually(lambda: "172.30.0.41/32" in save(other, Backend.LEGACY), within_s=_RECOVERY_S)
