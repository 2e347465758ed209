"""docs/packet-paths.md: its drawings are the walks that packets take through the rules that we write."""

from __future__ import annotations

import re
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.cli.proxy import find_fate, parse_packet, read_input, render
from testbed.dataplane.trace import Fate, Verdict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "packet-paths.md").read_text()
STATE = ROOT / "tests" / "unit" / "files" / "packet-paths-state.yaml"
WALKS = re.findall(r"<!-- walk: (\w+) (\w+) ([\d.]+) ([\d.:]+) -->\n```\n(.*?)\n```", PAGE, re.DOTALL)
MODES = ("iptables", "nftables", "ipvs", "userspace")
#: Names of chains, sets and maps, as they stand in rules and in drawings. A name that ends in … stands for many.
NAME = re.compile(r"KUBE-[A-Z0-9-]*[A-Z0-9](?![A-Z0-9-]*…)|@[a-z-]+|(?:service|external|local|endpoint)-[A-Z0-9]{8}-[\w/-]+|"
                  r"(?<![\w-])(?:services|masquerading|(?:nat|filter)-[a-z-]+|[a-z]+(?:-[a-z]+)*-check)(?![\w-])")  # fmt: skip


@cache
def written(mode: str, node: str = "node1") -> str:
    return render(read_input([STATE], node, mode, None))


@cache
def walk(mode: str, node: str, source: str, target: str) -> Fate:
    return find_fate(read_input([STATE], node, mode, None), parse_packet(source, target, ""))


def is_in_order(names: list[str], rules: str) -> str:
    """Return the first of these names that does not come behind the others in the rules, or ''."""
    place = 0
    for name in names:
        found = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])").search(rules, place)
        if found is None:
            return name
        place = found.end()
    return ""


def test_every_mode_is_drawn() -> None:
    """NodePort, ClusterIP, both policies of a load balancer, and a node that asks, in each mode but where they are the same."""
    drawn = {(mode, target) for mode, _, _, target, _ in WALKS}
    for mode in MODES:
        for target in ("192.168.93.11:30888", "10.96.1.10:80", "192.168.93.201:80"):
            assert (mode, target) in drawn
    assert len(WALKS) >= 22


@pytest.mark.parametrize(("mode", "node", "source", "target", "drawing"), WALKS, ids=lambda text: text[:22].strip())
def test_a_drawing_is_a_walk(mode: str, node: str, source: str, target: str, drawing: str) -> None:
    """Its chains and sets are met in this order, its pods are reached, and the source is hidden when it says so."""
    fate = walk(mode, node, source, target)
    names = NAME.findall(drawing)
    assert names
    assert not is_in_order(names, "\n".join(fate.rules)), fate.rules
    assert set(re.findall(r"10\.244\.[12]\.3:8080", drawing)) <= set(fate.endpoints)
    if "no mark" in drawing or "without a mark" in drawing:
        assert not fate.masquerade or "source becomes" in drawing or "MASQUERADE" in drawing
    elif "source becomes" in drawing or "MASQUERADE" in drawing:
        assert fate.masquerade
    assert (fate.verdict is Verdict.DROP) == ("drop" in drawing.lower())


@pytest.mark.parametrize("mode", MODES)
def test_names_are_those_that_we_write(mode: str) -> None:
    """Every chain and set that the mode's section names is in what kube-proxy writes for the lab of the page."""
    section = PAGE.partition(f"## {mode} mode\n")[2].partition("\n## ")[0]
    names = {name.removeprefix("@") for name in NAME.findall(section)}
    text = "\n".join(written(mode, node) for node in ("node1", "node3"))
    assert len(names) >= 4
    assert {name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)} == set()


def documents(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (doc["kind"], doc["metadata"]["name"]): doc for doc in yaml.safe_load_all(path.read_text()) if "metadata" in doc
    }


def test_the_state_is_that_of_the_manifest() -> None:
    """The Services that the walks go through are those of docs/packet-paths.yaml, which readers apply."""
    given, state = documents(ROOT / "docs" / "packet-paths.yaml"), documents(STATE)
    services = [key for key in given if key[0] == "Service"]
    assert len(services) == 3
    for key in services:
        assert given[key]["spec"] == state[key]["spec"]
    for (kind, name), pod in given.items():
        if kind == "Pod" and name != "asker":
            node = pod["spec"]["nodeName"]
            (endpoint,) = [e for e in state["EndpointSlice", "web-1"]["endpoints"] if e["nodeName"] == node]
            assert IPv4Address(endpoint["addresses"][0]).packed[2] == int(node[-1])
            assert f"{name} {endpoint['addresses'][0]}" in PAGE
