"""The iptables applier, on both families of real tools and on the stand-in that unit tests use: one class for all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from proxy_support import (
    FakeIptables,
    endpoint,
    endpoint_slice,
    real_iptables,
    service,
    settings_of,
    state_of,
    without_counters,
)

from testbed.dataplane.iptables import JUMPS, parse_installed, render_full
from testbed.dataplane.trace import Node, Packet, parse_rules, to_endpoints, trace
from testbed.errors import CommandError, MissingFeature, RulesRejected
from testbed.kernel.iptables import Backend, Iptables, detect_backend, refused_lines
from testbed.kernel.runner import Runner, SubprocessRunner
from testbed.model.service import ServicePortName
from testbed.programs.proxy_iptables import IptablesProxier

WEB, DB = service("web", "172.30.0.41", node_port=30080), service("db", "172.30.0.42")
SLICES = [
    endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")),
    endpoint_slice("db", endpoint("10.180.0.2")),
]
WEB_PORT = ServicePortName("ns", "web", "p80", "TCP")
NOTHING: frozenset[ServicePortName] = frozenset()


@pytest.fixture(
    params=[
        pytest.param("fake", id="stand-in"),
        pytest.param("legacy", marks=pytest.mark.root),
        pytest.param("nft", marks=pytest.mark.root),
    ]
)
def tools(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Runner, Backend]]:
    """iptables in a namespace of its own, or the stand-in."""
    if request.param == "fake":
        yield FakeIptables(), Backend.LEGACY
        return
    backend = Backend(request.param)
    with real_iptables(backend, tmp_path) as runner:
        yield runner, backend


class TestApplier:
    """What holds for the real tools and for the stand-in."""

    def test_second_sync_changes_nothing(self, tools: tuple[Runner, Backend]) -> None:
        """The same state twice, partial and full, leaves the same rules; nothing is added again."""
        iptables = Iptables(*tools)
        proxier, state, settings = IptablesProxier(iptables), state_of([WEB, DB], SLICES), settings_of()
        assert proxier.sync(state, NOTHING, settings).full
        first = without_counters(iptables.save())
        assert not proxier.sync(state, NOTHING, settings).full
        assert without_counters(iptables.save()) == first
        IptablesProxier(iptables).sync(state, NOTHING, settings)
        assert without_counters(iptables.save()) == first
        assert proxier.find_damage() == ""

    def test_service_that_went_leaves_nothing(self, tools: tuple[Runner, Backend]) -> None:
        """A partial sync after a removal ends in the rules that a node which never had the Service has."""
        runner, backend = tools
        iptables, settings = Iptables(runner, backend), settings_of()
        proxier = IptablesProxier(iptables)
        proxier.sync(state_of([WEB, DB], SLICES), NOTHING, settings)
        assert "ns/web" in iptables.save()
        proxier.sync(state_of([DB], SLICES[1:]), frozenset({WEB_PORT}), settings)
        saved = iptables.save()
        assert "ns/web" not in saved
        assert render_full(state_of([DB], SLICES[1:]), settings, parse_installed(saved)).text == ""

    def test_flush_is_found_and_repaired(self, tools: tuple[Runner, Backend]) -> None:
        """After somebody emptied our nat chains and jumps, a full sync brings back the same dump."""
        iptables = Iptables(*tools)
        proxier, state, settings = IptablesProxier(iptables), state_of([WEB, DB], SLICES), settings_of()
        proxier.sync(state, NOTHING, settings)
        before = without_counters(iptables.save())
        iptables.apply("*nat\n-F OUTPUT\n-F PREROUTING\n-F KUBE-SERVICES\nCOMMIT\n")
        assert "a jump is gone from nat" in proxier.find_damage()
        proxier.require_full()
        assert proxier.sync(state, NOTHING, settings).full
        assert without_counters(iptables.save()) == before

    def test_lost_canary_is_found(self, tools: tuple[Runner, Backend]) -> None:
        """The canary of mangle is missed."""
        iptables = Iptables(*tools)
        proxier = IptablesProxier(iptables)
        proxier.sync(state_of([WEB], SLICES), NOTHING, settings_of())
        iptables.apply("*mangle\n-X KUBE-PROXY-CANARY\nCOMMIT\n")
        assert proxier.find_damage() == "the canary chain is gone from mangle"

    def test_others_rules_stay(self, tools: tuple[Runner, Backend]) -> None:
        """Rules and chains of others survive syncs, below our jumps."""
        iptables = Iptables(*tools)
        iptables.apply("*filter\n:MINE - [0:0]\n-A MINE -j ACCEPT\n-A INPUT -j MINE\nCOMMIT\n")
        proxier = IptablesProxier(iptables)
        proxier.sync(state_of([WEB], SLICES), NOTHING, settings_of())
        proxier.sync(state_of([], []), frozenset({WEB_PORT}), settings_of())
        saved = iptables.save().splitlines()
        inputs = [line for line in saved if line.startswith("-A INPUT")]
        assert inputs[-1] == "-A INPUT -j MINE" and len(inputs) == 5
        assert "-A MINE -j ACCEPT" in saved

    def test_refused_line_is_named(self, tools: tuple[Runner, Backend]) -> None:
        """A jump to a chain that does not exist is refused, and nothing of that table changes."""
        iptables = Iptables(*tools)
        with pytest.raises((RulesRejected, CommandError), match="line|KUBE-NOWHERE"):
            iptables.apply("*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j KUBE-NOWHERE\nCOMMIT\n")
        assert "KUBE-A" not in iptables.save()

    def test_saved_rules_trace_as_the_rendered_ones(self, tools: tuple[Runner, Backend]) -> None:
        """A packet's fate is the same by what we write and by what the kernel prints."""
        iptables, node = Iptables(*tools), Node.of("192.168.0.2")
        payload = render_full(state_of([WEB, DB], SLICES), settings_of())
        iptables.apply(payload.text)
        packet, fate = (
            Packet("203.0.113.2", "192.168.0.2", 30080),
            to_endpoints("10.180.0.1:80", "10.180.1.1:80", masquerade=True),
        )
        assert trace(parse_rules(payload.text), packet, node) == fate
        assert trace(parse_rules(iptables.save()), packet, node) == fate


@pytest.mark.root
@pytest.mark.parametrize("backend", list(Backend), ids=lambda backend: backend.value)
def test_bad_option_is_refused_with_its_neighbours(backend: Backend, tmp_path: Path) -> None:
    """The error shows the line, its number and the lines around it."""
    with real_iptables(backend, tmp_path) as runner:
        text = "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -p tcp --dprt 80 -j ACCEPT\nCOMMIT\n"
        with pytest.raises(RulesRejected) as refusal:
            Iptables(runner, backend).apply(text)
    assert refusal.value.line_number == 3
    assert "> 3: -A KUBE-A -p tcp --dprt 80 -j ACCEPT" in refusal.value.context
    assert "dprt" in refusal.value.reason


@pytest.mark.root
@pytest.mark.parametrize("backend", list(Backend), ids=lambda backend: backend.value)
def test_jumps_are_saved_as_we_compare_them(backend: Backend, tmp_path: Path) -> None:
    """iptables-save prints every jump exactly as `Jump.saved`, or each full sync would add it again."""
    with real_iptables(backend, tmp_path) as runner:
        iptables = Iptables(runner, backend)
        iptables.apply(render_full(state_of([], []), settings_of()).text)
        assert parse_installed(iptables.save()).jumps == {(jump.table, jump.saved) for jump in JUMPS}


def test_missing_tool_is_named() -> None:
    """The error says which package has it."""
    with pytest.raises(MissingFeature, match=r"nft is not installed \(apt-get install nftables\)"):
        SubprocessRunner({"PATH": "/nonexistent"}).run(["nft", "list", "tables"])


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("iptables v1.8.9 (nf_tables)\n", Backend.NFT), ("iptables v1.8.9 (legacy)\n", Backend.LEGACY),
     ("iptables v1.6.1\n", Backend.LEGACY)],
)  # fmt: skip
def test_backend_is_the_machines_unless_chosen(version: str, wanted: Backend) -> None:
    """``iptables --version`` decides; old releases have one backend and do not name it."""

    class Versions:
        run: Callable[..., str] = staticmethod(lambda argv, **_: version if argv[0] == "iptables" else "")

    assert detect_backend(Versions()) is wanted
    assert detect_backend(Versions(), "nft") is Backend.NFT


def test_backend_of_a_kernel_without_nat_in_nf_tables() -> None:
    """Where iptables is iptables-nft and the kernel refuses its nat table, the legacy one is used (User-Mode Linux)."""

    class WithoutNat:
        def run(self, argv: Sequence[str], **_: object) -> str:
            if "iptables-nft" in argv:
                raise CommandError(
                    argv, 4, "iptables v1.8.9 (nf_tables):  TABLE_ADD failed (Operation not supported): table nat"
                )
            return "iptables v1.8.9 (nf_tables)\n" if argv[0] == "iptables" else ""

    assert detect_backend(WithoutNat()) is Backend.LEGACY


@pytest.mark.parametrize(
    ("stderr", "lines"),
    [
        ("iptables-restore: line 3 failed: No chain/target/match by that name.\n", (3,)),
        ('iptables-restore v1.8.9 (legacy): unknown option "--dprt"\nError occurred at line: 12\nTry `…\n', (12,)),
        (
            "iptables-nft-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (No such file or directory): rule in "
            "chain X\nline 9: RULE_APPEND failed (No such file or directory): rule in chain Y\n",
            (3, 9),
        ),
        ("Another app is currently holding the xtables lock.\n", ()),
    ],
)
def test_refused_lines(stderr: str, lines: tuple[int, ...]) -> None:
    """All forms of refusal name their lines; other failures have none."""
    assert refused_lines(stderr) == lines


@pytest.mark.root
@pytest.mark.parametrize("backend", list(Backend), ids=lambda backend: backend.value)
@pytest.mark.parametrize("chain", ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"])
def test_backend_is_where_a_kubelet_left_its_chains(backend: Backend, chain: str, tmp_path: Path) -> None:
    """On a node of a real cluster the kubelet's choice counts, whatever ``iptables`` is there."""
    with real_iptables(backend, tmp_path) as runner:
        Iptables(runner, backend).apply(f"*mangle\n:{chain} - [0:0]\nCOMMIT\n")
        assert detect_backend(runner) is backend
