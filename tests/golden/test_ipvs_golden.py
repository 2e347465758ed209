"""Every golden case in ipvs mode: what we render, and what the kernel holds after a sync, is what a real kube-proxy wrote."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from compare import differences, parse
from ipvs_support import dump, real_node
from test_iptables_golden import CASES, read_case

from testbed.dataplane.ipvs import IpvsRenderer, make_ipvs_settings, render_document
from testbed.dataplane.ipvs_rules import JUMPS, saved_rule


def saved_document(document: str) -> str:
    """Return a rendered document as the tools print it once it is in the kernel: rules in saved form, jumps in place."""
    lines: list[str] = []
    table = ""
    for line in document.splitlines():
        if line.startswith("*"):
            table = line[1:]
            lines.append(line)
            built_in = {
                "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
                "filter": ("INPUT", "FORWARD", "OUTPUT"),
            }
            lines += [f":{chain} ACCEPT" for chain in built_in[table]]
            lines += [jump.saved for jump in reversed(JUMPS) if jump.table == table]
        elif line.startswith("-I"):
            continue
        elif line.startswith("-A KUBE-"):
            lines.append(saved_rule(line))
        else:
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_document_says_what_kube_proxy_wrote(path: Path) -> None:
    """Virtual servers, sets, addresses and rules as rendered are those of upstream's kube-proxy v1.30."""
    config, node, state = read_case(path)
    assert node.internal_ip is not None
    settings = make_ipvs_settings(config, node, [IPv4Address("127.0.0.1"), node.internal_ip])
    ours = parse(saved_document(render_document(state, settings)))
    theirs = parse(path.with_suffix(".ipvs").read_text())
    # Settings that strictARP alone touches are printed with the kernel's default where it is off.
    rendered, measured = ours.pop(("sysctl", "")), theirs.pop(("sysctl", ""))
    assert [line for line in measured if line not in rendered] == (
        [] if config.ipvs.strict_arp else ["conf/all/arp_ignore = 0", "conf/all/arp_announce = 0"]
    )
    assert list(differences(ours, theirs)) == []


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_removal_undoes_everything(path: Path) -> None:
    """What a case adds is what its deletion takes away, in one change each."""
    config, node, state = read_case(path)
    assert node.internal_ip is not None
    renderer = IpvsRenderer(make_ipvs_settings(config, node, [node.internal_ip]))
    added = renderer.update(state)
    removed = renderer.update(type(state)(services={}, endpoints={}))
    assert sorted(added.bind) == sorted(removed.unbind)
    assert {key for key, _ in added.add_servers} == set(removed.delete_servers)
    assert added.add_members == removed.delete_members
    assert len(renderer.update(state)) == len(added)


@pytest.mark.root
@pytest.mark.ipvs
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernel_holds_what_kube_proxy_wrote(path: Path, tmp_path: Path) -> None:
    """After a sync ipvsadm, ipset, ip, sysctl and iptables-save say what they said after one of kube-proxy v1.30."""
    config, node, state = read_case(path)
    assert node.internal_ip is not None
    with real_node(tmp_path, str(node.internal_ip)) as here:
        settings = here.proxier.make_settings(config, node)
        report = here.proxier.sync(state, frozenset(), settings)
        assert report.full and not report.refused
        assert list(differences(parse(dump(here.runner)), parse(path.with_suffix(".ipvs").read_text()))) == []
        assert here.proxier.find_damage() == ""
        here.proxier.require_full()
        again = here.proxier.sync(state, frozenset(), settings)
        assert (again.payload.changes, again.payload.text) == (0, "")
