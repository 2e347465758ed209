"""nftables mode applied: what holds for the real nft, and for the stand-in that other tests use."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nft_support import FakeNft, kube_proxy_table, real_nft
from proxy_support import (
    NODE,
    NODE_IP,
    SECOND_IP,
    endpoint,
    endpoint_slice,
    nftables_settings,
    service,
    state_of,
)
from random_cluster import random_objects

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.nft_table import NftTable, differences, parse_listing
from testbed.dataplane.nftables import NftablesRenderer, render_table
from testbed.dataplane.trace import Node, Packet, to_endpoints
from testbed.dataplane.trace_nftables import trace_nftables
from testbed.errors import CommandError, KernelError, MissingFeature, RulesRejected
from testbed.kernel.nftables import Nftables, check_kernel, read_generation
from testbed.kernel.runner import Runner, SubprocessRunner
from testbed.model.service import ServicePortName
from testbed.programs.proxy_nftables import MOST_REPAIRS, NftablesProxier, deletes_at_once, remove_tables

WEB = service("web", "172.30.0.41", node_port=30080, ingress=["1.2.3.4"], sessionAffinity="ClientIP")
DB = service("db", "172.30.0.42", ingress=["1.2.3.5"], loadBalancerSourceRanges=["203.0.113.0/25", "203.0.113.128/25"])
IDLE = service("idle", "172.30.0.43", externalTrafficPolicy="Local", ingress=["1.2.3.6"])
SERVICES = [WEB, DB, IDLE]
SLICES = [
    endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")),
    endpoint_slice("db", endpoint("10.180.0.2")),
]
WEB_PORT, DB_PORT = ServicePortName("ns", "web", "p80", "TCP"), ServicePortName("ns", "db", "p80", "TCP")
NOTHING: frozenset[ServicePortName] = frozenset()
CONFIGS = {
    "CIDR": {},
    "all": {"nftables": {"masqueradeAll": True, "masqueradeBit": 5}},
    "no detector": {"clusterCIDR": ""},
    "bridge": {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
    "prefix": {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "veth"}},
    "every address": {"nodePortAddresses": ["0.0.0.0/0"]},
}


@pytest.fixture(params=[pytest.param("fake", id="stand-in"), pytest.param("nft", marks=pytest.mark.root)])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """nft in a namespace of its own, or the stand-in."""
    if request.param == "fake":
        yield FakeNft()
        return
    with real_nft() as runner:
        yield runner


def listed(table: Nftables) -> NftTable:
    text = table.list()
    assert text is not None
    return parse_listing(text)


def wanted(services: list[dict[str, object]], slices: list[dict[str, object]], **config: object) -> NftTable:
    renderer = NftablesRenderer(nftables_settings(config))
    renderer.full(state_of(services, slices), None)
    return renderer.wanted()


class TestApplier:
    """What holds for the real tool and for the stand-in."""

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_table_is_as_wanted(self, runner: Runner, config: dict[str, object]) -> None:
        """What nft lists after a sync is what was rendered, in nft's words: nothing is refused, nothing comes out otherwise."""
        table, settings = kube_proxy_table(runner), nftables_settings(config)
        report = NftablesProxier(table).sync(state_of(SERVICES, SLICES), NOTHING, settings)
        assert report.full and report.refused == {}
        assert differences(wanted(SERVICES, SLICES, **config), listed(table)) == []

    def test_second_sync_writes_nothing(self, runner: Runner) -> None:
        """Neither a partial sync without changes nor a full one, by another process, sends a command."""
        table, state, settings = kube_proxy_table(runner), state_of(SERVICES, SLICES), nftables_settings()
        proxier = NftablesProxier(table)
        proxier.sync(state, NOTHING, settings)
        first = table.list()
        report = proxier.sync(state, NOTHING, settings)
        assert not report.full and report.payload.text == ""
        report = NftablesProxier(table).sync(state, NOTHING, settings)
        assert report.full and report.payload.text == ""
        assert table.list() == first
        assert proxier.find_damage() == ""

    def test_any_order_ends_in_the_same_table(self, runner: Runner) -> None:
        """Objects that come and go by chance, synced each time, leave what a node has that knew no others."""
        for seed in range(3):
            services, slices = random_objects(seed)
            table, tracker, chance = kube_proxy_table(runner), ChangeTracker(NODE), random.Random(seed)
            proxier, settings = NftablesProxier(table), nftables_settings()
            steps = [(tracker.set_service, s) for s in services] + [(tracker.set_slice, s) for s in slices]
            chance.shuffle(steps)
            for number, (step, obj) in enumerate(steps):
                step(obj)
                gone = steps[chance.randrange(number + 1)][1]["metadata"]
                chance.choice([tracker.delete_service, tracker.delete_slice])(gone["namespace"], gone["name"])
                proxier.sync(*tracker.take(), settings)
            for step, obj in steps:
                step(obj)
            proxier.sync(*tracker.take(), settings)
            assert differences(wanted(services, slices), listed(table)) == [], seed
            for _, obj in steps:
                tracker.delete_service(obj["metadata"]["namespace"], obj["metadata"]["name"])
                tracker.delete_slice(obj["metadata"]["namespace"], obj["metadata"]["name"])
                proxier.sync(*tracker.take(), settings)
            assert differences(wanted([], []), listed(table)) == [], seed

    def test_damage_is_found_and_repaired(self, runner: Runner) -> None:
        """What somebody else deleted, changed or added is named, and put right by a full sync, which writes that only."""
        table, state, settings = kube_proxy_table(runner), state_of(SERVICES, SLICES), nftables_settings()
        proxier = NftablesProxier(table)
        proxier.sync(state, NOTHING, settings)
        before = listed(table)
        for command, damage in (
            ("flush chain ip kube-proxy services", "chain services is changed"),
            ("delete element ip kube-proxy service-ips { 172.30.0.41 . tcp . 80 }",
             "element 172.30.0.41 . tcp . 80 of service-ips is gone"),
            ("add element ip kube-proxy cluster-ips { 172.30.0.99 }", "element 172.30.0.99 of cluster-ips is not ours"),
            ("add chain ip kube-proxy mine", "chain mine is not ours"),
            ("delete table ip kube-proxy", "the table ip kube-proxy is gone"),
        ):  # fmt: skip
            table.apply(command + "\n")
            assert proxier.find_damage() == damage
            proxier.require_full()
            report = proxier.sync(state, NOTHING, settings)
            assert report.full and 0 < report.payload.commands < (5 if "table" not in command else 1000)
            assert listed(table) == before
            assert proxier.find_damage() == ""

    def test_the_same_damage_again(self, runner: Runner) -> None:
        """Damage that is done a second time is found a second time, looked at in between or not."""
        table, state, settings = kube_proxy_table(runner), state_of(SERVICES, SLICES), nftables_settings()
        proxier = NftablesProxier(table)
        proxier.sync(state, NOTHING, settings)
        for looks_between in (False, True, False):
            table.apply("flush chain ip kube-proxy services\n")
            assert proxier.find_damage() == "chain services is changed"
            proxier.require_full()
            proxier.sync(state, NOTHING, settings)
            if looks_between:
                assert proxier.find_damage() == ""

    def test_partial_sync_after_somebody_elses_change(self, runner: Runner) -> None:
        """A change that the kernel refuses, because the table is no longer ours, becomes a full sync at once."""
        table, tracker, settings = kube_proxy_table(runner), ChangeTracker(NODE), nftables_settings()
        tracker.replace_services(SERVICES)
        tracker.replace_slices(SLICES)
        proxier = NftablesProxier(table)
        proxier.sync(*tracker.take(), settings)
        table.apply("delete table ip kube-proxy\n")
        tracker.set_slice(endpoint_slice("db", endpoint("10.180.0.3")))
        state, changed = tracker.take()
        assert proxier.sync(state, changed, settings).full
        assert (
            differences(wanted(SERVICES, [SLICES[0], endpoint_slice("db", endpoint("10.180.0.3"))]), listed(table))
            == []
        )

    def test_table_of_another_release(self, runner: Runner) -> None:
        """A table of an older shape becomes ours in one transaction (TestSyncProxyRulesStartup)."""
        table = kube_proxy_table(runner)
        table.apply(
            'add table ip kube-proxy { comment "rules for kube-proxy" ; }\n'
            "add chain ip kube-proxy filter-input { type filter hook input priority -110 ; }\n"
            "add chain ip kube-proxy mark-for-masquerade\n"
            "add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000\n"
        )
        report = NftablesProxier(table).sync(state_of(SERVICES, SLICES), NOTHING, nftables_settings())
        assert report.payload.text.startswith("add table ip kube-proxy\ndelete table ip kube-proxy\n")
        assert differences(wanted(SERVICES, SLICES), listed(table)) == []

    def test_new_settings(self, runner: Runner) -> None:
        """Another configuration changes what it concerns and nothing else."""
        table, state = kube_proxy_table(runner), state_of(SERVICES, SLICES)
        proxier = NftablesProxier(table)
        proxier.sync(state, NOTHING, nftables_settings())
        report = proxier.sync(state, NOTHING, nftables_settings({"nodePortAddresses": ["192.168.1.0/24"]}))
        assert report.payload.text.splitlines() == [
            f"delete element ip kube-proxy nodeport-ips {{ {NODE_IP} }}",
            f"add element ip kube-proxy nodeport-ips {{ {SECOND_IP} }}",
        ]
        proxier.sync(state, NOTHING, nftables_settings({"nodePortAddresses": ["0.0.0.0/0"]}))
        assert differences(wanted(SERVICES, SLICES, nodePortAddresses=["0.0.0.0/0"]), listed(table)) == []

    def test_old_kernel(self, runner: Runner) -> None:
        """Before Linux 6.2 a chain is emptied now and deleted by a sync a second later."""
        now = [100.0]
        table, settings, tracker = kube_proxy_table(runner), nftables_settings(), ChangeTracker(NODE)
        tracker.replace_services(SERVICES)
        tracker.replace_slices(SLICES)
        proxier = NftablesProxier(table, deletes_at_once=False, clock=lambda: now[0])
        proxier.sync(*tracker.take(), settings)
        tracker.delete_service("ns", "web")
        proxier.sync(*tracker.take(), settings)
        stale = [name for name, chain in listed(table).chains.items() if "web" in name and not chain.rules]
        assert len(stale) == 4  # service, external, two endpoints
        assert proxier.find_damage() == ""
        now[0] += 0.5
        assert proxier.sync(*tracker.take(), settings).payload.text == ""
        now[0] += 0.6
        proxier.sync(*tracker.take(), settings)
        assert differences(wanted([DB, IDLE], SLICES), listed(table)) == []
        tracker.set_service(WEB)
        proxier.sync(*tracker.take(), settings)
        tracker.delete_service("ns", "web")
        proxier.sync(*tracker.take(), settings)
        tracker.set_service(WEB)  # back before its chains were deleted
        proxier.sync(*tracker.take(), settings)
        now[0] += 10
        proxier.sync(*tracker.take(), settings)
        assert differences(wanted(SERVICES, SLICES), listed(table)) == []

    def test_long_names(self, runner: Runner) -> None:
        """Names as long as Kubernetes allows are programmed: comments and chain names are cut."""
        name, namespace = "s" * 63, "n" * 63
        svc = service(name, "172.30.0.41", namespace=namespace, sessionAffinity="ClientIP", externalIPs=["192.168.99.9"],
                      externalTrafficPolicy="Local", port_name="p" * 15)  # fmt: skip
        slice_ = endpoint_slice(name, endpoint("10.180.1.1", "node2"), namespace=namespace, port_name="p" * 15)
        table = kube_proxy_table(runner)
        NftablesProxier(table).sync(state_of([svc], [slice_]), NOTHING, nftables_settings())
        assert differences(wanted([svc], [slice_]), listed(table)) == []

    def test_refused_line_is_named(self, runner: Runner) -> None:
        """The error has the line with its neighbours, and nothing is changed."""
        table = kube_proxy_table(runner)
        table.apply("add table ip kube-proxy\n")
        with pytest.raises(RulesRejected) as refusal:
            table.apply("add chain ip kube-proxy a\nadd rule ip kube-proxy a goto nowhere\nadd chain ip kube-proxy b\n")
        assert refusal.value.line_number == 2
        assert "> 2: add rule ip kube-proxy a goto nowhere" in refusal.value.context
        assert "No such file or directory" in refusal.value.reason
        assert listed(table).chains == {}

    def test_listing_traces_as_the_rendered_table(self, runner: Runner) -> None:
        """A packet's fate is the same by what we write and by what nft prints."""
        table = kube_proxy_table(runner)
        NftablesProxier(table).sync(state_of(SERVICES, SLICES), NOTHING, nftables_settings())
        fate = to_endpoints("10.180.0.1:80", "10.180.1.1:80", masquerade=True)
        for rules in (wanted(SERVICES, SLICES), listed(table)):
            assert trace_nftables(rules, Packet("203.0.113.2", NODE_IP, 30080), Node.of(NODE_IP)) == fate


@pytest.mark.root
def test_others_tables_stay(nft: Runner) -> None:
    """Only our own table is deleted, and deleting it twice is no error."""
    nft.run(["nft", "add", "table", "ip", "mine"])
    table = kube_proxy_table(nft)
    NftablesProxier(table).sync(state_of(SERVICES, SLICES), NOTHING, nftables_settings())
    remove_tables(nft)
    remove_tables(nft)
    assert nft.run(["nft", "list", "tables"]) == "table ip mine\n"


@pytest.mark.root
def test_clients_stay_known(nft: Runner) -> None:
    """Who was recorded by session affinity outlives changes of other Services, of its own, and full syncs."""
    table, tracker, settings = kube_proxy_table(nft), ChangeTracker(NODE), nftables_settings()
    tracker.replace_services(SERVICES)
    tracker.replace_slices(SLICES)
    proxier = NftablesProxier(table)
    proxier.sync(*tracker.take(), settings)
    affinity_set = next(name for name in listed(table).sets if name.startswith("affinity-") and "10.180.0.1" in name)
    table.apply(f"add element ip kube-proxy {affinity_set} {{ 203.0.113.9 }}\n")  # as a packet would
    tracker.set_slice(endpoint_slice("db", endpoint("10.180.0.3")))
    proxier.sync(*tracker.take(), settings)
    tracker.set_slice(endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.1.9", "node2")))
    proxier.sync(*tracker.take(), settings)
    assert NftablesProxier(table).sync(tracker.take()[0], NOTHING, settings).payload.text == ""
    assert "203.0.113.9 expires" in nft.run(["nft", "list", "set", "ip", "kube-proxy", affinity_set])
    remove_tables(nft)


class TestRefusal:
    """A command that the kernel refuses concerns the Service it is for."""

    def test_service_is_left_out_and_named(self) -> None:
        """The others are programmed; the one is tried again with each sync, and in the end programmed."""
        nft = FakeNft()
        table, state, settings = kube_proxy_table(nft), state_of(SERVICES, SLICES), nftables_settings()
        nft.refuses = "10.180.0.2"
        proxier = NftablesProxier(table)
        report = proxier.sync(state, NOTHING, settings)
        assert report.refused == {DB_PORT: "Could not process rule: Operation not supported"}
        assert differences(wanted([WEB, IDLE], SLICES), listed(table)) == []
        nft.refuses = ""
        report = proxier.sync(state, NOTHING, settings)
        assert report.full and report.refused == {}
        assert differences(wanted(SERVICES, SLICES), listed(table)) == []

    def test_change_that_is_refused(self) -> None:
        """A Service that was programmed and now is refused is taken out; what it had would be wrong."""
        nft, tracker, settings = FakeNft(), ChangeTracker(NODE), nftables_settings()
        tracker.replace_services(SERVICES)
        tracker.replace_slices(SLICES)
        table = kube_proxy_table(nft)
        proxier = NftablesProxier(table)
        proxier.sync(*tracker.take(), settings)
        nft.refuses = "10.180.0.77"
        tracker.set_slice(endpoint_slice("web", endpoint("10.180.0.77")))
        report = proxier.sync(*tracker.take(), settings)
        assert list(report.refused) == [WEB_PORT]
        assert differences(wanted([DB, IDLE], SLICES), listed(table)) == []

    def test_what_is_nobodys_fault(self) -> None:
        """A refusal of what every node needs is an error, and the next sync begins anew."""
        nft, state, settings = FakeNft(), state_of(SERVICES, SLICES), nftables_settings()
        nft.refuses = "masquerade fully-random"
        proxier = NftablesProxier(kube_proxy_table(nft))
        with pytest.raises(RulesRejected, match="Operation not supported"):
            proxier.sync(state, NOTHING, settings)
        assert nft.table is None and proxier.is_full_due
        nft.refuses = ""
        assert proxier.sync(state, NOTHING, settings).full


class TestGeneration:
    """The kernel counts transactions; the table is only read when one was not ours."""

    def test_nothing_is_listed_while_nobody_else_writes(self) -> None:
        """Checks between our own syncs cost one netlink message."""
        nft, tracker, settings = FakeNft(), ChangeTracker(NODE), nftables_settings()
        proxier = NftablesProxier(kube_proxy_table(nft))
        tracker.replace_services(SERVICES)
        proxier.sync(*tracker.take(), settings)
        nft.calls.clear()
        assert proxier.find_damage() == ""
        tracker.replace_slices(SLICES)
        proxier.sync(*tracker.take(), settings)
        assert proxier.find_damage() == ""
        assert nft.calls == [["nft", "-f", "-"]]

    def test_another_tables_change_is_looked_at_once(self) -> None:
        """A transaction of somebody else is followed by one listing, and then all is quiet again."""
        nft = FakeNft()
        proxier = NftablesProxier(kube_proxy_table(nft))
        proxier.sync(state_of(SERVICES, SLICES), NOTHING, nftables_settings())
        nft.generation += 1
        nft.calls.clear()
        assert proxier.find_damage() == proxier.find_damage() == ""
        assert [call[1] for call in nft.calls] == ["list"]

    def test_a_release_that_prints_otherwise(self) -> None:
        """What still reads wrong after it was written anew is not written for ever."""

        class NewerNft(FakeNft):
            def run(self, argv: list[str], *, stdin: str = "", timeout_s: float = 60) -> str:  # type: ignore[override]
                return (
                    super()
                    .run(argv, stdin=stdin, timeout_s=timeout_s)
                    .replace("masquerade fully-random", "masquerade random")
                )

        nft, state, settings = NewerNft(), state_of(SERVICES, SLICES), nftables_settings()
        table = Nftables(nft, "ip", "kube-proxy")
        proxier = NftablesProxier(table)
        proxier.sync(state, NOTHING, settings)
        for _ in range(MOST_REPAIRS):
            assert proxier.find_damage() == "chain masquerading is changed"
            proxier.require_full()
            proxier.sync(state, NOTHING, settings)
        assert proxier.find_damage() == proxier.find_damage() == ""

    @pytest.mark.root
    def test_kernel_counts(self) -> None:
        """Each transaction counts one, whoever sends it."""
        program = (
            "import subprocess; from testbed.kernel.nftables import read_generation as g; a = g();"
            "subprocess.run(['nft', 'add', 'table', 'ip', 'x'], check=True); b = g();"
            "subprocess.run(['nft', 'list', 'tables'], check=True, stdout=subprocess.DEVNULL); print(b - a, g() - b)"
        )
        with real_nft():
            pass  # or skip
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout == "1 0\n"
        assert isinstance(read_generation(), int)


@pytest.mark.root
@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "golden" / "kube-proxy").glob("*.yaml")), ids=lambda p: p.stem
)
def test_golden_case_is_accepted(path: Path, nft: Runner) -> None:
    """The kernel takes the table of each golden case, and holds what was rendered; our own sync adds nothing to it."""
    sys.path.insert(0, str(path.parents[1]))
    from test_iptables_golden import read_case

    from testbed.dataplane.nftables import make_nftables_settings

    config, node, state = read_case(path)
    settings = make_nftables_settings(config, node, [], nftables_settings().service_cidrs)
    table = kube_proxy_table(nft)
    table.apply(render_table(state, settings))
    renderer = NftablesRenderer(settings)
    renderer.full(state, None)
    assert differences(renderer.wanted(), listed(table)) == []
    assert NftablesProxier(table).sync(state, NOTHING, settings).payload.text == ""
    remove_tables(nft)


@pytest.fixture(scope="module")
def nft() -> Iterator[Runner]:
    """The real nft in a namespace of its own."""
    with real_nft() as runner:
        yield runner


def test_missing_tool_is_named() -> None:
    """The error says which package has it; a kernel without nf_tables is told apart."""
    with pytest.raises(MissingFeature, match=r"nft is not installed \(apt-get install nftables\)"):
        check_kernel(SubprocessRunner({"PATH": "/nonexistent"}), "6.1.0")

    class NoKernel:
        def run(self, argv: list[str], *, stdin: str = "", timeout_s: float = 60) -> str:
            raise CommandError(argv, 1, "cache initialization failed: Protocol not supported")

    with pytest.raises(KernelError, match="nftables does not work here.*Protocol not supported"):
        check_kernel(NoKernel(), "6.1.0")


def test_old_kernels_are_refused() -> None:
    """As upstream: 5.13 at least, unless the version is not to be looked at."""
    with pytest.raises(
        MissingFeature, match=r"wants Linux 5.13 or newer, this is 5.10.0-28-amd64 \(set KUBE_PROXY_NFTABLES_SKIP"
    ):
        check_kernel(SubprocessRunner({"PATH": "/nonexistent"}), "5.10.0-28-amd64")
    with pytest.raises(MissingFeature, match="nft is not installed"):
        check_kernel(SubprocessRunner({"PATH": "/nonexistent"}), "5.10.0-28-amd64", skip_version=True)


@pytest.mark.parametrize(
    ("release", "at_once"),
    [
        ("6.18.44-fc", True),
        ("6.2.0", True),
        ("6.1.0-18-amd64", False),
        ("5.15.0", False),
        ("10.0", True),
        ("odd", False),
    ],
)
def test_kernel_releases(release: str, at_once: bool) -> None:
    """Linux 6.2 and later delete chains at once."""
    assert deletes_at_once(release) is at_once
