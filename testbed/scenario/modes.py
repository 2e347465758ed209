"""Which proxy modes this version can run, and what this kernel lacks for them and for topologies."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from testbed.errors import InputError, MissingFeature
from testbed.kernel.modules import WITHOUT_NETEM, has_netem, why_no_ipvs, why_no_nat_in_nftables
from testbed.model.topology import PROXY_MODES, Topology

NOT_NESTED: Mapping[str, str] = {"nftables": "the nested kernel (User-Mode Linux) has no NAT in nf_tables"}
"""Modes that the nested kernel cannot run, and why."""


def check_mode(mode: str) -> str:
    """Return the mode if this version can run it, be it in the nested kernel.

    Raises:
        InputError: there is no such mode.
        MissingFeature: this version does not program it, or its tools are missing.
    """
    if mode not in PROXY_MODES:
        raise InputError(f"there is no proxy mode {mode!r}; the modes are {', '.join(PROXY_MODES)}")
    reason = why_not(mode)
    if reason:
        raise MissingFeature(reason)
    return mode


def why_not(mode: str) -> str:
    """Return why a mode cannot be run, '' when it can (by this kernel or the nested one: `why_not_here`)."""
    if mode == "nftables" and shutil.which("nft") is None:
        return "proxy mode 'nftables' needs nft, which is not installed (apt-get install nftables)"
    if mode == "ipvs" and shutil.which("ipset") is None:
        return "proxy mode 'ipvs' needs ipset, which is not installed (apt-get install ipset ipvsadm)"
    return ""


def why_not_here(mode: str, topology: Topology | None = None) -> str:
    """Return what this kernel lacks for a mode, and for a topology, even after an attempt to load it, '' when it has it."""
    if mode == "ipvs" and (reason := why_no_ipvs()):
        return reason
    if mode == "nftables" and (reason := why_no_nat_in_nftables()):
        return reason
    if topology is not None and topology.needs_netem and not has_netem():
        return f"topology {topology.name!r}: {WITHOUT_NETEM}"
    return ""
