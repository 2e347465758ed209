"""Puts transactions into one nftables table of the runner's network namespace, and reads back what is there."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from typing import Final

from testbed.errors import CommandError, KernelError, MissingFeature
from testbed.kernel.iptables import rejected
from testbed.kernel.nft_netlink import encode
from testbed.kernel.runner import Runner

#: A first load of 10,000 Services takes the kernel a quarter of a minute.
_TIMEOUT_S: Final = 300.0

_OLDEST_KERNEL: Final = (5, 13)
SKIP_VERSION: Final = "KUBE_PROXY_NFTABLES_SKIP_KERNEL_VERSION_CHECK"
#: Commands in a transaction that is sent without nft; many more, and reading what is there is no longer most of nft's time.
_MOST_DIRECT: Final = 200

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM_NFTABLES: Final = 10
_GET_GENERATION: Final = (_SUBSYSTEM_NFTABLES << 8) | 16  # NFT_MSG_GETGEN
_REQUEST: Final = 1  # NLM_F_REQUEST
_ATTRIBUTE_ID: Final = 1  # NFTA_GEN_ID
_HEADER_BYTES: Final = 16 + 4  # nlmsghdr, nfgenmsg
_REFUSED = re.compile(r"^[^:\s]+:(\d+):\d+(?:-\d+)?: Error: (.*)$", re.MULTILINE)


def read_generation() -> int | None:
    """Return how often the nftables rules of this process's network namespace have been changed, by anyone.

    The kernel counts transactions (uapi/linux/netfilter/nf_tables.h, NFT_MSG_GETGEN). None: it does not tell.
    """
    message = struct.pack("=IHHIIBBH", _HEADER_BYTES, _GET_GENERATION, _REQUEST, 1, 0, socket.AF_UNSPEC, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.settimeout(5)
            netlink.bind((0, 0))
            netlink.send(message)
            answer = netlink.recv(4096)
    except OSError:
        return None
    at = _HEADER_BYTES
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _ATTRIBUTE_ID and length == 8:
            return int(struct.unpack_from(">I", answer, at + 4)[0])
        at += max(4, (length + 3) & ~3)
    return None


class Nftables:
    """One table in one network namespace.

    Args:
        runner: Runs nft(8) in that namespace.
        family, table: Which table.
        generation: Returns the namespace's count of transactions; None when that cannot be known from this process.
        send: Sends an encoded transaction (`nft_netlink`) to that namespace and says whether it was carried out; None
            where this process is in another one.
    """

    def __init__(
        self,
        runner: Runner,
        family: str,
        table: str,
        *,
        generation: Callable[[], int | None] = lambda: None,
        send: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._runner = runner
        self._family = family
        self._table = table
        self.generation = generation
        self._send = send

    def list(self) -> str | None:
        """Return the table as ``nft list table`` prints it, None when it is not there."""
        try:
            return self._runner.run(["nft", "list", "table", self._family, self._table], timeout_s=_TIMEOUT_S)
        except CommandError as error:
            # nft sets no locale, so its English is the same everywhere
            if "No such file or directory" in error.stderr:
                return None
            raise

    def apply(self, commands: str) -> None:
        """Carry out all commands in one transaction, or none of them.

        Raises:
            RulesRejected: nft or the kernel refused lines; names the first, with its neighbours.
            CommandError: it failed for another reason.
        """
        if self._send_directly(commands):
            return
        try:
            self._runner.run(["nft", "-f", "-"], stdin=commands, timeout_s=_TIMEOUT_S)
        except CommandError as error:
            refusals = _REFUSED.findall(error.stderr)
            if not refusals:
                raise
            numbers = sorted({int(number) for number, _ in refusals})
            raise rejected("nft", commands, numbers, refusals[0][1]) from error

    def _send_directly(self, commands: str) -> bool:
        """Try it without nft; what is refused is left to nft, which has the words for it."""
        lines = commands.splitlines()
        if self._send is None or len(lines) > _MOST_DIRECT:
            return False
        batch = encode(lines)
        return batch is not None and self._send(batch)


def check_kernel(runner: Runner, release: str, *, skip_version: bool = False) -> None:
    """Return when nft and nf_tables are there, and new enough.

    Args:
        runner: Runs nft.
        release: ``os.uname().release``.
        skip_version: Do not look at the kernel's version: upstream's KUBE_PROXY_NFTABLES_SKIP_KERNEL_VERSION_CHECK.

    Raises:
        MissingFeature: nft is not installed, or the kernel is too old.
        KernelError: nft cannot reach nf_tables here.

    Source: kubernetes pkg/proxy/nftables/supported.go (v1.36).
    """
    version = kernel_version(release)
    if not skip_version and version < _OLDEST_KERNEL:
        raise MissingFeature(
            f"nftables mode wants Linux {'.'.join(map(str, _OLDEST_KERNEL))} or newer, this is {release} "
            f"(set {SKIP_VERSION}=1 to try all the same)"
        )
    try:
        runner.run(["nft", "list", "tables"])
    except CommandError as error:
        raise KernelError(
            f"nftables does not work here (kernel option CONFIG_NF_TABLES): {error.stderr.strip()}"
        ) from error


def kernel_version(release: str) -> tuple[int, int]:
    """Return major and minor version of a kernel release such as ``6.1.0-18-amd64``; (0, 0) for other text."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)
