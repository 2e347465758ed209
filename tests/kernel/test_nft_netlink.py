"""Transactions sent without nft: the same tables as nft makes, and whatever is not known or refused is left to nft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nft_support import real_nft

from testbed.errors import CommandError
from testbed.kernel.nft_netlink import encode
from testbed.kernel.nftables import Nftables

TABLE = "ip kube-proxy"
PROGRAM = """
import json, random, sys
sys.path[:0] = sys.argv[1:]
from proxy_support import NODE, nftables_settings
from random_cluster import random_objects
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.nft_table import parse_listing
from testbed.errors import RulesRejected
from testbed.kernel.nft_netlink import send
from testbed.kernel.nftables import Nftables, read_generation
from testbed.kernel.runner import SubprocessRunner
from testbed.programs.proxy_nftables import NftablesProxier, remove_tables

runner, sent = SubprocessRunner(), {True: 0, False: 0}
def counted(batch):
    done = send(batch)
    sent[done] += 1
    return done
def play(seed, **direct):
    "Let objects come and go by chance, and return the table after each sync."
    table = Nftables(runner, "ip", "kube-proxy", **direct)
    services, slices = random_objects(seed, services=6)
    tracker, proxier, chance = ChangeTracker(NODE), NftablesProxier(table), random.Random(seed)
    settings, found = nftables_settings(), []
    for obj in (services + slices) * 2:
        (tracker.set_slice if obj["kind"] == "EndpointSlice" else tracker.set_service)(obj)
        gone = chance.choice(services + slices)
        if chance.random() < 0.5:
            (tracker.delete_slice if gone["kind"] == "EndpointSlice" else tracker.delete_service)(
                gone["metadata"]["namespace"], gone["metadata"]["name"])
        report = proxier.sync(*tracker.take(), settings)
        assert report.refused == {}
        found.append(parse_listing(table.list()))
    assert proxier.find_damage() == ""
    remove_tables(runner)
    return found
same = all(play(seed) == play(seed, generation=read_generation, send=counted) for seed in range(4))
table = Nftables(runner, "ip", "kube-proxy", send=counted)
runner.run(["nft", "add", "table", "ip", "kube-proxy"])
failed_before = sent[False]
try:
    table.apply("add chain ip kube-proxy a\\ndelete chain ip kube-proxy nowhere\\n")
    refusal = None
except RulesRejected as error:
    refusal = [error.line_number, error.reason]
print(json.dumps({"same": same, "sent": sent[True], "refusal": refusal, "tried": sent[False] - failed_before,
                  "left": runner.run(["nft", "list", "table", "ip", "kube-proxy"])}))
"""


@pytest.fixture(scope="module")
def played() -> dict[str, object]:
    """What the program above says, in a network namespace of its own."""
    with real_nft():
        pass  # or skip
    folders = [str(Path(__file__).parents[1])]
    command = ["unshare", "--net", sys.executable, "-c", PROGRAM, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.root
def test_tables_are_those_that_nft_makes(played: dict[str, object]) -> None:
    """After every step of several histories the table is listed as if nft had made it; most steps were sent without it."""
    assert played["same"] is True
    assert isinstance(played["sent"], int) and played["sent"] > 20


@pytest.mark.root
def test_refusal_is_told_by_nft(played: dict[str, object]) -> None:
    """What the kernel refuses is not carried out in part; nft says which line it was."""
    assert played["tried"] == 1
    assert played["refusal"] == [2, "Could not process rule: No such file or directory"]
    assert "chain" not in str(played["left"])


KNOWN = [
    f"add chain {TABLE} service-X", f"flush chain {TABLE} service-X", f"delete chain {TABLE} service-X",
    f"add element {TABLE} cluster-ips {{ 10.0.0.1 }}", f"delete element {TABLE} service-ips {{ 10.0.0.1 . tcp . 80 }}",
    f'add element {TABLE} no-endpoint-services {{ 10.0.0.1 . tcp . 80 comment "ns/x:p" : goto reject-chain }}',
    f"add rule {TABLE} service-X meta l4proto sctp dnat ip addr . port to numgen random mod 1 map {{ 0 : 10.0.0.2 . 80 }}",
]  # fmt: skip


@pytest.mark.parametrize("command", KNOWN)
def test_known_commands(command: str) -> None:
    """These are encoded."""
    assert encode([command]) is not None


@pytest.mark.parametrize(
    "command",
    [
        f"add table {TABLE}", f"delete table {TABLE}", f"add set {TABLE} x {{ type ipv4_addr ; }}",
        f"add chain {TABLE} x {{ type nat hook output priority 0 ; }}", f"add rule {TABLE} x goto y",
        f"add rule {TABLE} x mark set mark or 0x4000", f"add element {TABLE} x {{ 10.0.0.1 : jump y }}",
        f"add element {TABLE} x {{ fd00::1 }}", f"add element {TABLE} x {{ 10.0.0.1 , 10.0.0.2 }}",
        "add chain ip6 kube-proxy x", "list table ip kube-proxy",
        f"add rule {TABLE} x meta l4proto icmp dnat ip addr . port to numgen random mod 1 map {{ 0 : 10.0.0.2 . 80 }}",
    ],
)  # fmt: skip
def test_unknown_commands(command: str) -> None:
    """One of these, and the whole transaction is nft's."""
    assert encode([KNOWN[0], command]) is None


def test_nothing_to_send() -> None:
    """An empty transaction has no messages."""
    assert encode([]) is None


def test_element_is_what_nft_sends() -> None:
    """The bytes of a map element, as nft 1.0.6 sends it (strace), between the marks of the batch."""
    batch = encode(
        [
            'add element ip kube-proxy no-endpoint-services { 172.30.0.3 . tcp . 80 comment "ns/x:p80" : goto reject-chain }'
        ]
    )
    assert batch is not None
    key = bytes.fromhex("14000180 10000100 ac1e0003 06000000 00500000")
    verdict = bytes.fromhex("24000280 20000280 08000100 fffffffc 11000200 72656a6563742d636861696e00 000000")
    comment = bytes.fromhex("0f000600 00096e732f783a70383000")
    assert key + verdict + comment in batch


class Nft:
    """Counts calls of nft."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, argv: list[str], *, stdin: str = "", timeout_s: float = 60) -> str:
        self.calls += 1
        raise CommandError(argv, 1, "no")


@pytest.mark.parametrize(
    ("commands", "carried_out", "asked", "nft_calls"),
    [
        pytest.param(KNOWN[:2], True, 1, 0, id="sent"),
        pytest.param(KNOWN[:2], False, 1, 1, id="refused: nft says why"),
        pytest.param([KNOWN[0], "add rule ip kube-proxy x goto y"], True, 0, 1, id="not known"),
        pytest.param(KNOWN[:1] * 201, True, 0, 1, id="too many"),
    ],
)
def test_when_nft_is_started(commands: list[str], carried_out: bool, asked: int, nft_calls: int) -> None:
    """Only for what cannot be sent without it."""
    batches: list[bytes] = []
    nft = Nft()

    def send(batch: bytes) -> bool:
        batches.append(batch)
        return carried_out

    table = Nftables(nft, "ip", "kube-proxy", send=send)
    try:
        table.apply("".join(f"{command}\n" for command in commands))
    except CommandError:
        assert nft_calls
    assert (len(batches), nft.calls) == (asked, nft_calls)
