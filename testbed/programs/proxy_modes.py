"""What differs between kube-proxy's modes, as far as its main loop is concerned: settings, periods, appliers, leftovers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Protocol

from testbed.dataplane import nft_names
from testbed.dataplane.iptables import make_settings
from testbed.dataplane.nftables import make_nftables_settings
from testbed.dataplane.state import ProxyState
from testbed.errors import MissingFeature
from testbed.kernel.iptables import Iptables, detect_backend
from testbed.kernel.nftables import Nftables, check_kernel, read_generation
from testbed.kernel.runner import Runner
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView
from testbed.programs.proxy_iptables import IptablesProxier, clean_up
from testbed.programs.proxy_nftables import NftablesProxier, deletes_at_once, remove_table

MODES = ("iptables", "nftables")


class Proxier(Protocol):
    """One proxy mode's way of making a node's kernel equal to a state."""

    def sync(self, state: ProxyState, changed: frozenset[Any], settings: Any) -> Any: ...

    def require_full(self) -> None: ...

    def find_damage(self) -> str: ...


def make_proxier(config: KubeProxyConfig, runner: Runner, backend: str = "", *, own_namespace: bool = True) -> Proxier:
    """Return the applier of the configured mode.

    Args:
        config: Says which mode.
        runner: Runs tools in the node's network namespace.
        backend: ``legacy`` or ``nft``; '' is what ``iptables`` is on this machine. For iptables mode.
        own_namespace: This process is in that namespace, too.

    Raises:
        MissingFeature: this mode's tools are not installed, or the mode is not there.
        KernelError: the kernel does not have what the mode needs.
    """
    if config.mode == "iptables":
        return IptablesProxier(Iptables(runner, detect_backend(runner, backend)))
    if config.mode == "nftables":
        check_kernel(runner)
        table = nftables_table(runner, own_namespace=own_namespace)
        return NftablesProxier(table, deletes_at_once=deletes_at_once(os.uname().release))
    raise MissingFeature(f"kube-proxy mode {config.mode!r} is not available here; use {' or '.join(MODES)}")


def nftables_table(runner: Runner, *, own_namespace: bool = True) -> Nftables:
    """Return the table ``ip kube-proxy`` of the runner's network namespace."""
    generation: Callable[[], int | None] = read_generation if own_namespace else lambda: None
    return Nftables(runner, nft_names.FAMILY, nft_names.TABLE, generation=generation)


def make_mode_settings(
    config: KubeProxyConfig,
    node: NodeView,
    local_addresses: Collection[IPv4Address],
    service_cidrs: Collection[IPv4Network] = (),
) -> Any:
    """Return what the configured mode's `Proxier.sync` takes beside the state."""
    if config.mode == "nftables":
        return make_nftables_settings(config, node, local_addresses, service_cidrs)
    return make_settings(config, node, local_addresses)


def clean_other_modes(config: KubeProxyConfig, runner: Runner, backend: str = "") -> None:
    """Remove what a kube-proxy of another mode left behind, if that mode surely no longer runs here.

    As upstream: nftables mode removes what iptables mode wrote, the others remove the nftables table.

    Raises:
        KernelError: a tool refused.
    """
    if config.mode == "nftables":
        _clean_iptables(runner, backend)
    else:
        _clean_nftables(runner)


def clean_everything(runner: Runner, backend: str = "") -> None:
    """Remove what kube-proxy wrote in any mode, as ``kube-proxy --cleanup`` does.

    Raises:
        KernelError: a tool refused.
    """
    _clean_iptables(runner, backend)
    _clean_nftables(runner)


def _clean_iptables(runner: Runner, backend: str) -> None:
    try:
        iptables = Iptables(runner, detect_backend(runner, backend))
    except MissingFeature:
        return  # then nobody wrote anything with it
    if "KUBE-" in iptables.save():
        clean_up(iptables)


def _clean_nftables(runner: Runner) -> None:
    try:
        remove_table(nftables_table(runner))
    except MissingFeature:
        return
