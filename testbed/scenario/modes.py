"""Which proxy modes this version can run, and which scenarios this kernel."""

from __future__ import annotations

import shutil

from testbed.errors import InputError, MissingFeature
from testbed.kernel.modules import WITHOUT_NETEM, has_netem, why_no_ipvs
from testbed.model.topology import PROXY_MODES, Topology

IMPLEMENTED = ("iptables", "nftables", "ipvs")


def check_mode(mode: str) -> str:
    """Return the mode if it can be run.

    Raises:
        InputError: there is no such mode.
        MissingFeature: this version does not program it.
    """
    if mode not in PROXY_MODES:
        raise InputError(f"there is no proxy mode {mode!r}; the modes are {', '.join(PROXY_MODES)}")
    reason = why_not(mode)
    if reason:
        raise MissingFeature(reason)
    return mode


def why_not(mode: str) -> str:
    """Return why a mode cannot be run, '' when it can."""
    if mode not in IMPLEMENTED:
        return f"proxy mode {mode!r} is not built yet: this version programs {' and '.join(IMPLEMENTED)}"
    if mode == "nftables" and shutil.which("nft") is None:
        return "proxy mode 'nftables' needs nft, which is not installed (apt-get install nftables)"
    if mode == "ipvs" and shutil.which("ipset") is None:
        return "proxy mode 'ipvs' needs ipset, which is not installed (apt-get install ipset ipvsadm)"
    if mode == "ipvs" and (reason := why_no_ipvs()):
        return f"proxy mode 'ipvs': {reason}; `testbed vm -- testbed …` runs it in a kernel that has it"
    return ""


def what_kernel_lacks(topology: Topology) -> str:
    """Return which feature of the kernel a topology needs and does not find, '' when there is all."""
    return f"topology {topology.name!r}: {WITHOUT_NETEM}" if topology.needs_netem and not has_netem() else ""
