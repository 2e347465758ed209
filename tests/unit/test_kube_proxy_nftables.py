"""kube-proxy's main loop in nftables mode, over a stand-in for nft, in a time of its own."""

from __future__ import annotations

from typing import Any

from nft_support import FakeNft, kube_proxy_table
from proxy_support import NODE, endpoint, endpoint_slice, node_object, service
from test_kube_proxy import FakeFlows, FakeLinks

from testbed.errors import CommandError
from testbed.model.proxyconfig import parse_proxy_config
from testbed.programs.kube_proxy import NODES, SERVICE_CIDRS, SERVICES, SLICES, Changed, Listed, ProxyLoop
from testbed.programs.proxy_nftables import NftablesProxier
from testbed.programs.proxy_status import ProxyHealth, ProxyMetrics

SVC, SLICE = service("web", "172.30.0.41"), endpoint_slice("web", endpoint("10.180.0.1"))


def service_cidr(*cidrs: str, name: str = "kubernetes") -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": list(cidrs)},
    }  # fmt: skip


class Proxy:
    """A `ProxyLoop` in nftables mode, whose time the test sets."""

    def __init__(self, **config: Any) -> None:
        self.now_s = 1000.0
        parsed, problems = parse_proxy_config({"clusterCIDR": "10.0.0.0/8", "mode": "nftables", **config})
        assert not problems
        self.nft, self.log = FakeNft(), list[str]()
        self.loop = ProxyLoop(
            parsed, NODE, NftablesProxier(kube_proxy_table(self.nft)),
            health=ProxyHealth(60), metrics=ProxyMetrics(), flows=FakeFlows(), links=FakeLinks(), log=self.log.append,
            local_addresses=lambda: [], clock=lambda: self.now_s,
        )  # fmt: skip

    def accept(self, *messages: Any) -> None:
        for message in messages:
            self.loop.accept(message, self.now_s)
        self.loop.step(self.now_s)

    def start(self) -> None:
        """Let everything be listed at once."""
        self.accept(
            Listed(SERVICES, (SVC,)),
            Listed(SLICES, (SLICE,)),
            Listed(NODES, (node_object(),)),
            Listed(SERVICE_CIDRS, (service_cidr("172.30.0.0/16"),)),
        )

    def sleep(self, seconds: float) -> None:
        """Let time pass as the process would: woken when the loop asked to be."""
        until = self.now_s + seconds
        while self.now_s < until:
            self.now_s = min(until, self.now_s + max(0.001, self.loop.wait_s(self.now_s)))
            self.loop.step(self.now_s)

    @property
    def unallocated_rule(self) -> str:
        assert self.nft.table is not None
        return self.nft.table.chains["cluster-ips-check"].rules[-1]


def test_service_cidrs_are_waited_for() -> None:
    """Nothing is written before ServiceCIDRs were listed as well: the first table is whole."""
    proxy = Proxy()
    proxy.accept(Listed(SERVICES, (SVC,)), Listed(SLICES, (SLICE,)), Listed(NODES, (node_object(),)))
    assert proxy.nft.table is None
    proxy.accept(Listed(SERVICE_CIDRS, ()))
    assert proxy.nft.table is not None
    assert "unallocated" not in proxy.unallocated_rule


def test_service_cidrs_change() -> None:
    """A network that is added or taken away changes the rule, and nothing else is written (TestProxier_OnServiceCIDRsChanged)."""
    proxy = Proxy(nftables={"minSyncPeriod": "0s"})
    proxy.start()
    assert proxy.unallocated_rule.startswith("ip daddr { 172.30.0.0/16 } drop")
    more = service_cidr("172.31.0.0/16", "fd00:172:30::/112", name="more")
    proxy.accept(Changed(SERVICE_CIDRS, False, more))
    assert proxy.unallocated_rule.startswith("ip daddr { 172.30.0.0/16 , 172.31.0.0/16 } drop")
    assert len(proxy.nft.payloads[-1].splitlines()) == 3  # the chain's flush and its two rules
    proxy.accept(Changed(SERVICE_CIDRS, True, more))
    assert proxy.unallocated_rule.startswith("ip daddr { 172.30.0.0/16 } drop")


def test_change_costs_what_changed() -> None:
    """An endpoint that comes writes its chain and its element; the same objects again write nothing."""
    proxy = Proxy(nftables={"minSyncPeriod": "0s"})
    proxy.start()
    proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.0.2"))))
    assert len(proxy.nft.payloads) == 2
    assert [line.split()[1] for line in proxy.nft.payloads[1].splitlines()] == ["chain", "rule", "element"]
    proxy.accept(Changed(SERVICES, False, SVC))
    assert len(proxy.nft.payloads) == 2


def test_pace_is_that_of_the_nftables_section() -> None:
    """nftables.minSyncPeriod holds back what comes too fast; the iptables section has no part in it."""
    proxy = Proxy(nftables={"minSyncPeriod": "5s"}, iptables={"minSyncPeriod": "0s"})
    proxy.start()
    for number in range(2, 6):
        proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint(f"10.180.0.{number}"))))
    assert len(proxy.nft.payloads) == 2  # the burst
    proxy.sleep(5.1)
    assert len(proxy.nft.payloads) == 3 and "10.180.0.5" in proxy.nft.payloads[2]


def test_damage_is_repaired_within_the_sync_period() -> None:
    """Somebody deletes the table: it is back after nftables.syncPeriod at the latest, and the log says why."""
    proxy = Proxy(nftables={"syncPeriod": "10s"})
    proxy.start()
    before, proxy.nft.table = proxy.nft.table, None
    proxy.nft.generation += 1
    proxy.sleep(10.5)
    assert proxy.nft.table == before
    assert any("the table ip kube-proxy is gone" in line for line in proxy.log)


def test_failures_are_counted_and_repeated() -> None:
    """nft fails: the metric of this mode counts it, and the next try is after the sync period."""

    class Broken(FakeNft):
        broken = True

        def run(self, argv: Any, *, stdin: str = "", timeout_s: float = 60) -> str:
            if self.broken:
                raise CommandError(argv, 1, "cannot allocate memory")
            return super().run(argv, stdin=stdin, timeout_s=timeout_s)

    proxy = Proxy(nftables={"syncPeriod": "10s"})
    nft = Broken()
    proxy.loop._proxier = NftablesProxier(kube_proxy_table(nft))
    proxy.start()
    assert proxy.loop.metrics.value("sync_proxy_rules_nftables_sync_failures_total") == 1
    assert proxy.loop.metrics.value("sync_proxy_rules_iptables_restore_failures_total") == 0
    nft.broken = False
    proxy.sleep(10.5)
    assert nft.table is not None
