"""`testbed proxy` as a user types it: render and explain, without root, on the golden cases and on files with mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed.cli.main import cli
from testbed.errors import InputError, ManifestError

CASES = Path(__file__).parents[1] / "golden" / "kube-proxy"
_HIDDEN = "source  hidden (kube-proxy connects on its own): the endpoint sees an address of the node"
LOCAL = str(CASES / "loadbalancer-local.yaml")


def proxy(*words: str) -> tuple[str, str]:
    """Run ``testbed proxy`` and return what it printed: output, and warnings; errors are raised."""
    result = CliRunner().invoke(cli, ["proxy", *words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


def test_render_iptables() -> None:
    """The payload for iptables-restore, chains by upstream's names."""
    text, warnings = proxy("render", "--mode", "iptables", "--node", "node1", str(CASES / "nodeport.yaml"))
    assert text.startswith("*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n*filter\n") and text.endswith("COMMIT\n")
    assert "-A KUBE-NODEPORTS -m comment --comment dev/web:http -m tcp -p tcp --dport 30888 -j KUBE-EXT-" in text
    assert warnings == ""


def test_render_nftables() -> None:
    """The commands for nft; the Node object says where NodePorts answer."""
    text, _ = proxy("render", "--mode", "nftables", "--node", "node1", str(CASES / "nodeport.yaml"))
    assert text.startswith('add table ip kube-proxy { comment "rules for kube-proxy" ; }\n')
    assert "add element ip kube-proxy nodeport-ips { 192.168.93.11 }\n" in text
    assert (
        "add element ip kube-proxy service-nodeports { tcp . 30888 : goto external-XTADIQOT-dev/web/tcp/http }\n"
        in text
    )


def test_mode_is_the_configurations(tmp_path: Path) -> None:
    """Without --mode the KubeProxyConfiguration decides, from --config or among the files; --mode goes before it."""
    config = tmp_path / "config.yaml"
    config.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
                      "nftables: {masqueradeAll: true}\n")  # fmt: skip
    case = str(CASES / "nodeport.yaml")
    text, _ = proxy("render", "--node", "node1", "--config", str(config), case)
    assert "masquerade all clusterIP traffic" in text
    assert proxy("render", "--node", "node1", case)[0].startswith("*mangle")
    assert proxy("render", "--node", "node1", "--mode", "iptables", "--config", str(config), case)[0].startswith(
        "*mangle"
    )


def test_endpoints_stand_for_slices(tmp_path: Path) -> None:
    """Endpoints count where a Service has no slice, as the mirroring controller would have it."""
    file = tmp_path / "db.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {clusterIP: 10.96.0.20, ports: [{port: 5432}]}\n---\n"
        "apiVersion: v1\nkind: Endpoints\nmetadata: {name: db}\nsubsets:\n- addresses: [{ip: 192.0.2.7}]\n"
        "  notReadyAddresses: [{ip: 192.0.2.8}]\n  ports: [{port: 5433}]\n---\n"
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/22]}\n"
    )
    text, warnings = proxy("render", "--node", "n", "--mode", "nftables", str(file))
    assert "meta l4proto tcp dnat ip addr . port to numgen random mod 1 map { 0 : 192.0.2.7 . 5433 }\n" in text
    assert 'ip daddr { 10.96.0.0/22 } drop comment "Drop traffic to unallocated ClusterIPs"\n' in text
    assert warnings == (
        f"{file}: warning: no Node object 'n' in these files: its address and labels are unknown, NodePorts may have none\n"
    )


def test_workloads_are_of_no_use(tmp_path: Path) -> None:
    """A Deployment makes no endpoints here, and a Service without a clusterIP is ignored: both are said, with the line."""
    file = tmp_path / "web.yaml"
    file.write_text(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  selector: {matchLabels: {app: web}}\n"
        "  template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: nginx}]}}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: node1}\n"
    )
    _, warnings = proxy("render", "--node", "node1", str(file))
    assert warnings.splitlines() == [
        f"{file}:1: warning: Deployment default/web counts for nothing here: kube-proxy reads Services and EndpointSlices, "
        "and nothing makes slices of pods without a cluster (`testbed up -f FILE` does)",
        f"{file}:11: warning: Service default/web has no IPv4 clusterIP: kube-proxy ignores it until the API has allocated one",
    ]


def test_every_mistake_is_named(tmp_path: Path) -> None:
    """Mistakes of all files come at once, each with file and line; exit status 2."""
    config, manifest = tmp_path / "c.yaml", tmp_path / "s.yaml"
    config.write_text("kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nmoode: x\n")
    manifest.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: X}\nspec: {ports: [{port: 80}]}\n---\nfoo: 1\n"
    )
    with pytest.raises(ManifestError) as error:
        proxy("render", "--node", "n", "--config", str(config), str(manifest), str(tmp_path / "absent"))
    text = str(error.value)
    assert f'{config}:3: unknown field "moode" (did you mean "mode"?)' in text
    assert f"{manifest}:3: metadata.name: Invalid value" in text
    assert f'{manifest}:6: required field "kind" is missing' in text
    assert f"{tmp_path / 'absent'}: no such file" in text
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "clusterCIDR: 10.0.0.0/8\nnodePortAddresses:\n- 10.0.0.0/8\n- 1.2.3",
            r"c.yaml:6: nodePortAddresses.*must be a valid CIDR",
        ),
        ("mode: bogus", r"c.yaml:3: mode: 'bogus' is not one of"),
    ],
)
def test_configuration_is_checked(tmp_path: Path, config: str, message: str) -> None:
    """Wrong values have the line of the field."""
    file = tmp_path / "c.yaml"
    file.write_text(f"kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n{config}\n")
    with pytest.raises(ManifestError, match=message):
        proxy("render", "--node", "node1", "--config", str(file), LOCAL)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        pytest.param(["--node", "node9"], InputError, "no Node 'node9' in these files; their Nodes are node1", id="node"),
        pytest.param([], InputError, "which node", id="no node"),
        pytest.param(["--node", "node1", "--mode", "ipfs"], InputError, "'ipfs'; the modes are userspace", id="mode"),
    ],
)  # fmt: skip
def test_wrong_options(words: list[str], kind: type[Exception], message: str) -> None:
    """The message says what would do."""
    with pytest.raises(kind, match=message):
        proxy("render", *words, LOCAL)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_explain_for_people(mode: str) -> None:
    """Rules under their chains, then where the packet ends and what the endpoint sees."""
    text, _ = proxy("explain", "--mode", mode, "--node", "node1", "--from", "203.0.113.2", "--to", "192.168.93.11:30888",
                    str(CASES / "nodeport.yaml"))  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == f"203.0.113.2 → 192.168.93.11:30888/tcp at node1, {mode} mode"
    assert lines[-2] == "fate    10.244.1.10:80 or 10.244.2.9:80 or 10.244.3.100:80, one of 3 by chance"
    assert lines[-1] == "source  hidden (masqueraded): the endpoint sees an address of the node"
    rule = "-j KUBE-EXT-" if mode == "iptables" else "tcp . 30888 : goto external-XTADIQOT-dev/web/tcp/http"
    assert any(rule in line for line in lines)


def test_explain_json() -> None:
    """The same for programs."""
    text, _ = proxy("explain", "--mode", "nftables", "--node", "node1", "--from", "203.0.113.2", "--to", "10.96.3.99:53/udp",
                    "-o", "json", str(CASES / "nodeport.yaml"))  # fmt: skip
    found = json.loads(text)
    rules = found.pop("rules")
    assert found == {
        "mode": "nftables", "node": "node1", "from": "203.0.113.2", "to": "10.96.3.99:53", "protocol": "udp",
        "fate": "none", "endpoints": [], "masquerade": False,
    }  # fmt: skip
    assert rules[0] == "filter-prerouting-pre-dnat: ct state new jump firewall-check"


@pytest.mark.parametrize(
    ("case", "target", "end"),
    [
        ("nodeport-no-endpoints.yaml", "192.168.93.11:30888", "fate    refused: the client is told at once"),
        ("nodeport-local-none-here.yaml", "192.168.93.11:30888", "fate    dropped: the client waits"),
        ("nodeport.yaml", "198.51.100.1:80", "fate    not kube-proxy's: no rule is about it"),
    ],
)
def test_other_ends(case: str, target: str, end: str) -> None:
    """Refused, dropped and not concerned, in both modes."""
    for mode in ("iptables", "nftables"):
        text, _ = proxy(
            "explain", "--mode", mode, "--node", "node1", "--from", "203.0.113.2", "--to", target, str(CASES / case)
        )
        assert text.splitlines()[-1].startswith(end)


def test_userspace_mode(tmp_path: Path) -> None:
    """Words stand for ports that the kernel chooses, the range's first ones for those that are drawn; sync cannot be."""
    options = ("--mode", "userspace", "--node", "node1")
    case = str(CASES / "nodeport.yaml")
    text, _ = proxy("render", *options, case)
    assert text.startswith("# proxy ports are chosen by the kernel")
    assert "--dport 30888 -j REDIRECT --to-ports <proxy port of dev/web:http>\n" in text
    config = tmp_path / "c.yaml"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nportRange: 40000-40009\n"
    )
    text, _ = proxy("render", *options, "--config", str(config), case)
    assert "--dport 30888 -j DNAT --to-destination 192.168.93.11:40000\n" in text
    config.write_text(config.read_text().replace("40000-40009", "nine"))
    with pytest.raises(ManifestError, match=r"c.yaml:3: portRange.*must be a valid port range"):
        proxy("render", *options, "--config", str(config), case)
    with pytest.raises(
        InputError, match="cannot be written once: its rules lead to ports that only a running kube-proxy"
    ):
        proxy("sync", *options, case)


@pytest.mark.parametrize(
    ("case", "ends"),
    [
        pytest.param("nodeport.yaml", ["fate    10.244.1.10:80 or 10.244.2.9:80 or 10.244.3.100:80, one of 3 in turn",
                                       _HIDDEN],
                     id="endpoints"),
        pytest.param("nodeport-no-endpoints.yaml", ["fate    accepted by kube-proxy, and closed at once: there is no endpoint"],
                     id="none"),
    ],
)  # fmt: skip
def test_explain_userspace_mode(case: str, ends: list[str]) -> None:
    """A walk ends at the endpoints that take turns, or at kube-proxy itself."""
    text, _ = proxy("explain", "--mode", "userspace", "--node", "node1", "--from", "203.0.113.2", "--to",
                    "192.168.93.11:30888", str(CASES / case))  # fmt: skip
    assert "-j REDIRECT --to-ports 40001" in text
    assert text.splitlines()[-len(ends) :] == ends


@pytest.mark.parametrize("target", ["10.96.0.1", "10.96.0.1:99999", "10.96.0.1:80/icmp", "web:80", "10.96.0.300:80"])
def test_wrong_target(target: str) -> None:
    """The form is told, with an example."""
    with pytest.raises(InputError, match=r"--to .*wants IP:PORT.*10.96.0.10:53/udp"):
        proxy("explain", "--node", "node1", "--from", "203.0.113.2", "--to", target, LOCAL)


def test_wrong_source() -> None:
    """So is that of the source."""
    with pytest.raises(InputError, match="--from 'pod1': wants an IPv4 address"):
        proxy("explain", "--node", "node1", "--from", "pod1", "--to", "10.96.0.1:80", LOCAL)
