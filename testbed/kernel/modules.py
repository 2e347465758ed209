"""What the running kernel offers, asked of the kernel itself; a module is loaded where it can be."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

from testbed.errors import KernelError, MissingFeature
from testbed.kernel.pace import patient
from testbed.kernel.runner import not_installed

_BRIDGE_CALLS = Path("/proc/sys/net/bridge")
_IPVS = Path("/proc/net/ip_vs")
WITHOUT_NETEM = (
    "delay and loss need the kernel's netem (sch_netem), which this kernel does not have; "
    "try `modprobe sch_netem`, or run the lab on another kernel, or take delay and loss out of the topology"
)


def has_netem() -> bool:
    """Say whether links can have delay and loss; asking makes the kernel load the module where it is installed.

    Raises:
        MissingFeature: a program for that is not installed.
        KernelError: the kernel cannot be asked.
    """
    for program in ("unshare", "tc"):
        if shutil.which(program) is None:
            raise not_installed(program)
    done = subprocess.run(
        ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
        capture_output=True, text=True, timeout=patient(10), check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return True
    if is_unknown_qdisc(done.stderr):
        return False
    raise KernelError(f"asking the kernel for netem: tc said {done.stderr.strip() or f'status {done.returncode}'!r}")


def is_unknown_qdisc(message: str) -> bool:
    """Say whether tc complained of a queueing discipline that the kernel does not have (net/sched/sch_api.c)."""
    return "qdisc kind is unknown" in message


_NAT_BY_NFTABLES: Final = """table ip testbed-probe {
  chain nat {
    type nat hook prerouting priority dstnat
    dnat to 192.0.2.1
  }
}
"""


@cache
def why_no_nat_in_nftables() -> str:
    """Return '' when the kernel's nf_tables translates addresses, loading modules if need be, or what is in the way.

    A kernel can have nf_tables, with which listing and most of a kube-proxy's start succeed, but not this part of it.
    Without the programs to ask with, the answer is yes: a missing nft is told elsewhere.
    """
    if shutil.which("unshare") is None or shutil.which("nft") is None:
        return ""
    done = subprocess.run(
        ["unshare", "--net", "nft", "-f", "-"], input=_NAT_BY_NFTABLES,
        capture_output=True, text=True, timeout=patient(10), check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0].rpartition("Error: ")[2]
    return f"this kernel has no NAT in nf_tables (nft_chain_nat, nft_nat, nft_masq): nft said {said!r}"


def why_no_ipvs() -> str:
    """Return '' when the kernel has IPVS, loading it if need be, or what is in the way."""
    if _IPVS.exists():
        return ""
    said = _modprobe("ip_vs")
    if _IPVS.exists():
        return ""
    return f"this kernel has no ip_vs: `modprobe ip_vs` said {said!r}"


def _modprobe(name: str) -> str:
    """Try to load a module; return what modprobe said."""
    try:
        done = subprocess.run(["modprobe", name], capture_output=True, text=True, timeout=patient(10), check=False)
    except FileNotFoundError:
        return "modprobe: not installed (apt-get install kmod)"
    return done.stderr.strip() or "nothing"


def ensure_bridge_netfilter() -> None:
    """Have br_netfilter in the kernel, without a change for the host's own bridges.

    Loading the module makes iptables see frames that cross any bridge of the host's namespace, which can break what runs
    there; new namespaces start with it on all the same.

    Raises:
        MissingFeature: it is neither there nor loadable.
    """
    if _BRIDGE_CALLS.is_dir():
        return
    said = _modprobe("br_netfilter")
    if not _BRIDGE_CALLS.is_dir():
        raise MissingFeature(
            "the kernel lacks br_netfilter, without which a reply between two pods of one node is not translated back: "
            f"`modprobe br_netfilter` said {said!r}; install your kernel's full module package "
            "(Ubuntu: linux-modules-extra-$(uname -r))"
        )
    for name in ("iptables", "ip6tables", "arptables"):
        (_BRIDGE_CALLS / f"bridge-nf-call-{name}").write_text("0")


#: What ipvs mode uses beside the scheduler. The kernel loads most of them when they are first asked for, where it can.
_IPVS_MODULES: Final = (
    "ip_vs", "nf_conntrack", "dummy", "xt_set", "xt_ipvs", "xt_comment", "xt_mark", "xt_addrtype", "xt_physdev",
    "xt_conntrack", "xt_MASQUERADE", "ipt_REJECT", "ip_set_hash_ip", "ip_set_hash_ipport", "ip_set_hash_ipportip",
    "ip_set_hash_ipportnet", "ip_set_bitmap_port",
)  # fmt: skip


def load_ipvs(scheduler: str) -> None:
    """Try to have in the kernel what ipvs mode uses. What is missing shows when it is used: it may be built in."""
    wanted = [*_IPVS_MODULES, f"ip_vs_{scheduler}"]
    missing = [name for name in wanted if not (Path("/sys/module") / name).exists()]
    if missing:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["modprobe", "-a", "-q", "--", *missing], capture_output=True, timeout=patient(30), check=False
            )
