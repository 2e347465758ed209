"""Random clusters against a plain model of the specification: the program of the DNS pods with its real dnsmasq.

The test runs this file in a network namespace of its own, where 127.0.0.1:53 is free.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from hypothesis import HealthCheck, Phase, given, seed, settings

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from dns_model import Cluster, clusters, expected, questions

from testbed.dataplane.corefile import RESPONDER_PORT, parse_corefile
from testbed.dataplane.dns import Zone
from testbed.kernel.rtnetlink import LOOPBACK_INDEX, RtnetlinkSocket, set_link
from testbed.lab.cluster_dns import corefile
from testbed.programs.dns import ClusterDns, Dnsmasq
from testbed.programs.dns_responder import Responder
from testbed.programs.kube_proxy import Listed

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(150),
    pytest.mark.skipif(
        shutil.which("dnsmasq") is None, reason="dnsmasq is not installed (Debian package dnsmasq-base)"
    ),
]

HOST = "127.0.0.1"
QUESTIONS_EACH = 40


def test_random_clusters_against_the_real_dnsmasq(pytestconfig: pytest.Config) -> None:
    """200 random sets of Services, slices and namespaces, one after another in one server, give what the model says.

    They are the same ones each time; with --slow others, by a seed that is printed: SEED, of this file as a program.
    """
    seeds = [str(random.SystemRandom().randrange(1 << 32))] if pytestconfig.getoption("--slow") else []
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", sys.executable, __file__, *seeds]
    print(*command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.splitlines()[-1].startswith("compared ")
    assert int(done.stdout.split()[-2]) >= 200


def run_inside(chosen_seed: int | None) -> None:
    with RtnetlinkSocket("test") as netlink:
        netlink.send([set_link(LOOPBACK_INDEX, up=True)])
    text = corefile("cluster.local")
    config = parse_corefile(text)
    responder = Responder(Zone(config.zone), config)
    responder.start(HOST, RESPONDER_PORT)
    compared = 0
    with tempfile.TemporaryDirectory() as folder:
        dnsmasq = Dnsmasq(Path(folder), lambda ended: None)
        dns = ClusterDns(
            config, text, dnsmasq, responder, addresses=(HOST,), log=print, on_watch=lambda resource: None
        )  # fmt: skip
        dns.start()

        @settings(
            max_examples=200,
            database=None,
            deadline=None,  # as conftest has it, which this program does not load
            derandomize=chosen_seed is None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(clusters)
        def compare(cluster: Cluster) -> None:
            nonlocal compared
            dns.accept([Listed(resource, objects) for resource, objects in cluster.listed().items()])
            while not dns.is_up_to_date:
                time.sleep(dns.wait_s())
                dns.step()
            everything = questions(cluster)
            chance = random.Random(repr(cluster))  # the same questions when hypothesis looks at a cluster again
            for question, kind in chance.sample(everything, min(QUESTIONS_EACH, len(everything))):
                assert ask(question, kind) == expected(cluster, question, kind), (question, kind)
            compared += 1

        (compare if chosen_seed is None else seed(chosen_seed)(compare))()
        dnsmasq.stop()
    print(f"compared {compared} clusters")


def ask(question: str, kind: str) -> tuple[str, set[str]]:
    """Return rcode and values of the records of that type, without SRV's priorities and weights."""
    query = DNSRecord.question(question, kind)
    reply = DNSRecord.parse(query.send(HOST, 53, timeout=5))
    if reply.header.tc:
        reply = DNSRecord.parse(_over_tcp(query))
    values = set()
    for rr in reply.rr:
        if QTYPE[rr.rtype] == kind:
            text = str(rr.rdata).removesuffix(".")
            values.add(text.split(" ", 2)[2] if kind == "SRV" else text)
    return RCODE[reply.header.rcode], values


def _over_tcp(query: DNSRecord) -> bytes:
    """Ask as resolvers do: again, when dnsmasq has closed a connection because all its 20 children are busy."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return bytes(query.send(HOST, 53, timeout=5, tcp=True))
        except (struct.error, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    run_inside(int(sys.argv[1]) if len(sys.argv) > 1 else None)
