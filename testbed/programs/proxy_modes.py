"""What differs between kube-proxy's modes, as far as its main loop is concerned: appliers, leftovers."""

from __future__ import annotations

import os
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Protocol

from testbed.dataplane import nft_names
from testbed.dataplane.ipvs_rules import DEVICE, parse_installed_rules, render_rules_cleanup
from testbed.dataplane.state import ProxyState
from testbed.errors import MissingFeature, TestbedError
from testbed.kernel.addresses import link_index
from testbed.kernel.iptables import Iptables, detect_backend
from testbed.kernel.modules import load_ipvs
from testbed.kernel.nft_netlink import send
from testbed.kernel.nftables import SKIP_VERSION, Nftables, check_kernel, kernel_version, read_generation
from testbed.kernel.runner import Runner
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView
from testbed.programs.proxy_iptables import IptablesProxier, clean_up
from testbed.programs.proxy_nftables import NftablesProxier, deletes_at_once, remove_tables
from testbed.programs.proxy_userspace import UserspaceProxier, clean_up_userspace

MODES = ("iptables", "nftables", "ipvs", "userspace")


class Proxier(Protocol):
    """One proxy mode's way of making a node's kernel equal to a state."""

    def make_settings(
        self,
        config: KubeProxyConfig,
        node: NodeView,
        local_addresses: Collection[IPv4Address],
        service_cidrs: Collection[IPv4Network] = (),
    ) -> Any: ...

    def sync(self, state: ProxyState, changed: frozenset[Any], settings: Any) -> Any: ...

    def require_full(self) -> None: ...

    def find_damage(self) -> str: ...

    def tend(self) -> float:
        """Do what time alone makes due; return in how many seconds to be asked again."""
        ...


def make_proxier(
    config: KubeProxyConfig, runner: Runner, backend: str = "", *, lock_file: str = "", own_namespace: bool = True
) -> Proxier:
    """Return the applier of the configured mode.

    Args:
        config: Says which mode.
        runner: Runs tools in the node's network namespace.
        backend: For iptables mode: ``legacy`` or ``nft``; '' is what the node uses.
        lock_file: For iptables mode: where the xtables lock is, when not where it usually is.
        own_namespace: This process is in that namespace, too.

    Raises:
        MissingFeature: this mode's tools are not installed, or the mode is not there.
        KernelError: the kernel does not have what the mode needs.
    """
    lock = {"lock_file": lock_file} if lock_file else {}
    if config.mode == "iptables":
        tools = Iptables(runner, detect_backend(runner, backend), **lock)
        return IptablesProxier(tools, clean_every_s=config.sync_period_s)
    if config.mode == "userspace":
        return UserspaceProxier(Iptables(runner, detect_backend(runner, backend), **lock), config)
    if config.mode == "nftables":
        release = os.uname().release
        check_kernel(runner, release, skip_version=bool(os.environ.get(SKIP_VERSION)))
        direct: dict[str, Any] = {"generation": read_generation, "send": send} if own_namespace else {}
        table = Nftables(runner, nft_names.FAMILY, nft_names.TABLE, **direct)
        return NftablesProxier(table, deletes_at_once=deletes_at_once(release))
    if config.mode == "ipvs":
        return _make_ipvs(config, runner, Iptables(runner, detect_backend(runner, backend), **lock))
    raise MissingFeature(f"kube-proxy mode {config.mode!r} is not available here; use {' or '.join(MODES)}")


def _make_ipvs(config: KubeProxyConfig, runner: Runner, iptables: Iptables) -> Proxier:
    # pyroute2 is heavy: only those who need it load it
    from testbed.kernel.ipvs_node import IpvsNode
    from testbed.programs.proxy_ipvs import IpvsProxier

    try:
        load_ipvs(config.ipvs.scheduler)
        node = IpvsNode(runner, config.hostname_override or "this node")
        try:
            node.probe(config.ipvs.scheduler)
        except TestbedError:
            node.close()
            raise
    except TestbedError as error:
        raise MissingFeature(f"can't use the IPVS proxier: {error}") from error
    return IpvsProxier(node, iptables, config.ipvs, kernel=kernel_version(os.uname().release))


def clean_up_other_modes(config: KubeProxyConfig, runner: Runner, backend: str = "") -> None:
    """Remove what another mode left that is certainly not in use.

    nftables mode removes what the iptables and ipvs modes wrote, these the nftables tables. iptables and ipvs share chains,
    and leave each other's: ``kube-proxy --cleanup`` in between removes them. All but userspace mode remove its rules, which
    lead to ports that nobody listens on any more, and userspace mode removes everybody's.

    Raises:
        KernelError: a tool refused.
    """
    if config.mode == "nftables":
        _clean_up_iptables(runner, backend)
        _clean_up_ipvs(runner)
    elif config.mode == "userspace":
        _clean_up_iptables(runner, backend, userspace=False)
        _clean_up_ipvs(runner)
        remove_tables(runner)
    else:
        _clean_up_userspace(runner, backend)
        remove_tables(runner)


def clean_up_all(runner: Runner, backend: str = "") -> None:
    """Do what ``kube-proxy --cleanup`` does, for every mode.

    Raises:
        KernelError: a tool refused.
    """
    _clean_up_iptables(runner, backend)
    _clean_up_ipvs(runner, certainly=True)
    remove_tables(runner)


def _clean_up_iptables(runner: Runner, backend: str, *, userspace: bool = True) -> None:
    try:
        iptables = Iptables(runner, detect_backend(runner, backend))
        if "KUBE-" in iptables.save():
            clean_up(iptables)
            iptables.apply(render_rules_cleanup(parse_installed_rules(iptables.save())))
            if userspace:
                clean_up_userspace(iptables)
    except MissingFeature:
        return  # then nobody wrote anything with it


def _clean_up_userspace(runner: Runner, backend: str) -> None:
    iptables = Iptables(runner, detect_backend(runner, backend))
    if "KUBE-PORTALS-" in iptables.save():
        clean_up_userspace(iptables)


def _clean_up_ipvs(runner: Runner, *, certainly: bool = False) -> None:
    """Remove IPVS's objects; rules that look into the sets are gone by now.

    All virtual servers go, whoever made them, as upstream has it. So it is only done where ipvs mode has left its link, or
    where somebody asked for it and the kernel has IPVS.
    """
    if link_index(DEVICE) or (certainly and os.path.exists("/proc/thread-self/net/ip_vs")):
        from testbed.kernel.ipvs_node import clean_up_ipvs

        clean_up_ipvs(runner, "this node")
