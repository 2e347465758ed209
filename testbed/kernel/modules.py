"""What the running kernel offers, asked of the kernel itself; a module is loaded where it can be."""

from __future__ import annotations

import subprocess
from pathlib import Path

from testbed.errors import MissingFeature

_BRIDGE_CALLS = Path("/proc/sys/net/bridge")


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
