"""What programs print, as numbers."""

from __future__ import annotations

import json

import pytest

from testbed.bench.parse import (
    could_not_begin,
    parse_cpu_line,
    parse_iperf3_tcp,
    parse_iperf3_udp,
    parse_metrics,
    parse_service_order,
    parse_wrk,
)
from testbed.errors import KernelError

TCP = {
    "start": {"version": "iperf 3.12"},
    "end": {
        "sum_sent": {"bytes": 1256980480, "bits_per_second": 10052000000.0, "retransmits": 45},
        "sum_received": {"bytes": 1250000000, "bits_per_second": 9988000000.0},
        "cpu_utilization_percent": {"host_total": 45.1, "remote_total": 44.0},
    },
}
UDP = {
    "end": {
        "sum": {
            "bytes": 25000000, "bits_per_second": 200000000.0, "jitter_ms": 0.031, "lost_packets": 856, "packets": 17120,
            "lost_percent": 5.0, "sender": True,
        }
    }
}  # fmt: skip
WRK = """\
Running 1s test @ http://10.244.2.2:80/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.02ms    1.70ms  21.86ms   91.10%
    Req/Sec    19.07k     1.33k   20.55k    70.00%
  Latency Distribution
     50%  556.00us
     75%    1.06ms
     90%    1.99ms
     99%    9.32ms
  19151 requests in 1.01s, 2.59MB read
  Socket errors: connect 0, read 3, write 1, timeout 0
  Non-2xx or 3xx responses: 2
Requests/sec:  18958.30
Transfer/sec:      2.56MB
"""


def test_tcp() -> None:
    """The rate is what the server received."""
    assert parse_iperf3_tcp(json.dumps(TCP)) == {"rate": pytest.approx(9.988), "retransmits": 45, "gb": 1.25}


def test_udp() -> None:
    """What was received is what was sent without what was lost."""
    found = parse_iperf3_udp(json.dumps(UDP))
    assert found == {"received": pytest.approx(190), "loss": 5.0, "jitter": 0.031, "gb": pytest.approx(0.02375)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"start": {}, "end": {}, "error": "error - unable to connect to server: Connection refused"}',
         "iperf3: error - unable to connect to server: Connection refused"),
        ("iperf3: interrupt", "iperf3 printed no JSON, but 'iperf3: interrupt'"),
        ('{"start": {}, "end": {}}', "iperf3 ended without a result"),
    ],
)  # fmt: skip
def test_iperf3_that_failed(text: str, message: str) -> None:
    """What iperf3 says went wrong is what we say."""
    with pytest.raises(KernelError) as caught:
        parse_iperf3_tcp(text)
    assert str(caught.value) == message


def test_wrk() -> None:
    """Rate, tail in microseconds, everything that was not an answer of status 200, and the number of answers."""
    assert parse_wrk(WRK) == {"requests": 18958.3, "count": 19151, "p50": 556, "p99": 9320, "errors": 6}


@pytest.mark.parametrize("text", ["", WRK.replace("19151 requests", "0 requests"), "unable to connect to 10.0.0.1:80"])
def test_wrk_without_answers(text: str) -> None:
    """No answer is no figure."""
    with pytest.raises(KernelError, match="wrk had no answer"):
        parse_wrk(text)


def test_metrics() -> None:
    """Samples keep their labels; comments are passed over."""
    text = '# TYPE a counter\na 3\nb{le="0.5"} 1e-3\n'
    assert parse_metrics(text) == {"a": 3, 'b{le="0.5"}': 0.001}


def test_cpu_line() -> None:
    """Waiting for disks and idling are not busy; guests' time is part of user's and not counted twice."""
    text = "cpu  100 1 50 800 20 3 7 2 90 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert parse_cpu_line(text) == {"busy": 161, "softirq": 7, "all": 983}


def test_order_of_services() -> None:
    """Services come in the order of their rules, once each; NodePorts and Services of others are passed over."""
    rules = """\
*nat
-A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m comment --comment "bench/s-00002:http" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https" -m tcp --dport 443 -j KUBE-SVC-N
-A KUBE-SERVICES -d 10.96.0.7/32 -p tcp -m comment --comment "bench/s-00001:http" -m tcp --dport 80 -j KUBE-SVC-B
-A KUBE-SERVICES -d 10.96.0.9/32 -p udp -m comment --comment "bench/s-00002:dns" -m udp --dport 53 -j KUBE-SVC-C
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-A ! -s 10.244.0.0/16 -d 10.96.0.7/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
"""
    assert parse_service_order(rules, {"10.96.0.7": "s-00001", "10.96.0.9": "s-00002"}) == ["s-00002", "s-00001"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"error": "unable to connect to server: Connection refused"}', True),
        ('{"error": "unable to connect to server - server may have stopped running: Connection refused"}', True),
        ('{"error": "error - the server is busy running a test. try again later"}', True),
        ('{"error": "unable to connect to server: No route to host"}', False),
        ('{"error": "unable to connect stream: Connection refused"}', False),
        ('{"error": "control socket has closed unexpectedly"}', False),
        ('{"end": {}}', False),
        ("[]", False),
        ("iperf3: parameter error", False),
    ],
)
def test_a_server_that_is_not_free_yet(text: str, expected: bool) -> None:
    """Nobody listens, or somebody else's test is not over: every other message is about this test."""
    assert could_not_begin(text) == expected
