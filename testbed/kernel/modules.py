"""What the running kernel offers, asked of the kernel itself; a module is loaded where it can be."""

from __future__ import annotations

import subprocess
from pathlib import Path

from testbed.errors import KernelError, MissingFeature

_BRIDGE_CALLS = Path("/proc/sys/net/bridge")
WITHOUT_NETEM = (
    "delay and loss need the kernel's netem (sch_netem), which this kernel does not have; "
    "try `modprobe sch_netem`, or run the lab on another kernel, or take delay and loss out of the topology"
)


def has_netem() -> bool:
    """Say whether links can have delay and loss; asking makes the kernel load the module where it is installed.

    Raises:
        KernelError: the kernel cannot be asked.
    """
    done = subprocess.run(
        ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return True
    if is_unknown_qdisc(done.stderr):
        return False
    raise KernelError(f"asking the kernel for netem: tc said {done.stderr.strip() or f'status {done.returncode}'!r}")


def is_unknown_qdisc(message: str) -> bool:
    """Say whether tc complained of a queueing discipline that the kernel does not have (net/sched/sch_api.c)."""
    return "qdisc kind is unknown" in message


def ensure_bridge_netfilter() -> None:
    """Have br_netfilter in the kernel, without a change for the host's own bridges.

    Loading the module makes iptables see frames that cross any bridge of the host's namespace, which can break what runs
    there; new namespaces start with it on all the same.

    Raises:
        MissingFeature: it is neither there nor loadable.
    """
    if _BRIDGE_CALLS.is_dir():
        return
    done = subprocess.run(["modprobe", "br_netfilter"], capture_output=True, text=True, timeout=10, check=False)
    if not _BRIDGE_CALLS.is_dir():
        raise MissingFeature(
            "the kernel lacks br_netfilter, without which a reply between two pods of one node is not translated back: "
            f"`modprobe br_netfilter` said {done.stderr.strip() or 'nothing'!r}; install your kernel's full module package "
            "(Ubuntu: linux-modules-extra-$(uname -r))"
        )
    for name in ("iptables", "ip6tables", "arptables"):
        (_BRIDGE_CALLS / f"bridge-nf-call-{name}").write_text("0")
