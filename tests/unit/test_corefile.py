"""The Corefile: what is taken from it, every way to get it wrong, and dnsmasq's configuration."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hostile import hostile_texts

from testbed.dataplane.corefile import (
    CorefileError,
    DnsConfig,
    Upstream,
    parse_corefile,
    render_dnsmasq,
    resolv_conf_servers,
)
from testbed.lab.cluster_dns import corefile
from testbed.model.dns import PodMode, ZoneSettings

RESOLV = "# comment\nnameserver 192.168.93.53\nnameserver fe80::1\nsearch a.b\nnameserver 192.168.93.54\n"


def parse(text: str, resolv: str = RESOLV) -> DnsConfig:
    return parse_corefile(text, server="10.244.1.2", read_file={"/etc/resolv.conf": resolv}.__getitem__)


def block(*lines: str) -> str:
    return "\n".join([".:53 {", "    kubernetes cluster.local", *(f"    {line}" for line in lines), "}", ""])


def test_kubeadms_own() -> None:
    """The Corefile that every lab begins with."""
    config = parse(corefile("a.b"))
    assert config.zone == ZoneSettings(
        domain="a.b", ttl=30, pods=PodMode.INSECURE, fallthrough=("in-addr.arpa", "ip6.arpa"), server="10.244.1.2"
    )
    assert config.forwards == {"": (Upstream("192.168.93.53"), Upstream("192.168.93.54"))}
    assert config.lameduck_s == 5
    assert not config.logs_queries


def test_defaults_are_the_plugins() -> None:
    """Without options: five seconds, no pod records, nobody to ask."""
    config = parse(".:53 {\n kubernetes cluster.local\n}")
    assert config.zone == ZoneSettings(domain="cluster.local", ttl=5, pods=PodMode.DISABLED, server="10.244.1.2")
    assert config.upstreams("www.example.com") == ()


def test_stub_domains() -> None:
    """A server block of its own for a zone, as the Kubernetes documentation shows it; the longest zone counts."""
    config = parse(
        block("forward . 10.0.0.1", "log")
        + "example.com:53 {\n  errors\n  forward . 10.0.0.2:5300 10.0.0.3\n}\n# end\n"
        + "a.example.com b.example.com {\n  forward . dns://10.0.0.4\n}\n"
    )
    assert config.upstreams("www.example.com.") == (Upstream("10.0.0.2", 5300), Upstream("10.0.0.3"))
    assert config.upstreams("x.B.example.com") == (Upstream("10.0.0.4"),)
    assert config.upstreams("example.org") == (Upstream("10.0.0.1"),)
    assert config.upstreams("notexample.com") == (Upstream("10.0.0.1"),)
    assert config.logs_queries


def test_no_server_in_resolv_conf() -> None:
    """A node without a DNS server leaves nobody to ask, which is no mistake."""
    assert parse(block("forward . /etc/resolv.conf"), resolv="# nothing\n").upstreams("a.b") == ()


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (block("ttl 30"), ["3 - Error during parsing: Unknown directive 'ttl'"]),
        (block("forward ."), ["3 - Error during parsing: plugin/forward: wants a zone and at least one server"]),
        (
            block("forward . 1.2.3.4.5"),
            ["3 - Error during parsing: plugin/forward: not an IPv4 address or file: '1.2.3.4.5'"],
        ),
        (
            block("forward . 10.0.0.1:99999"),
            ["3 - Error during parsing: plugin/forward: '10.0.0.1:99999': ports go from 1 to 65535"],
        ),
        (
            block("forward . 127.0.0.1"),
            ["3 - Error during parsing: plugin/loop: Loop (127.0.0.1) detected: this server would ask itself"],
        ),
        (block("hosts {", "}"), ["3 - Error during parsing: plugin/hosts: is not available here"]),
        (
            block("health {", "lameduck soon", "}"),
            ["4 - Error during parsing: 'soon' is not a duration (500ms, 5s)"],
        ),
        (
            ".:53 {\n kubernetes cluster.local {\n  ttl 4000\n  pods maybe\n  what\n  namespaces a\n }\n}",
            [
                "3 - Error during parsing: plugin/kubernetes: ttl must be in range [0, 3600]: 4000",
                "4 - Error during parsing: plugin/kubernetes: wrong value for pods: maybe,  must be one of: disabled, insecure, verified",
                "5 - Error during parsing: plugin/kubernetes: unknown property 'what'",
                "6 - Error during parsing: plugin/kubernetes: namespaces is not available here",
            ],
        ),
        (
            ".:53 {\n kubernetes a.b c.d\n}",
            ["2 - Error during parsing: plugin/kubernetes: wants one zone for Services, got a.b, c.d"],
        ),
        (
            ".:53 {\n kubernetes a_" + "b" * 63 + "\n}",
            [
                f"2 - Error during parsing: {'a_' + 'b' * 63!r} is not a domain name",
                "2 - Error during parsing: plugin/kubernetes: wants one zone for Services, got none",
            ],
        ),
        (".:1053 {\n}", ["1 - Error during parsing: '.:1053': only port 53 is served here"]),
        (".:53 {\n errors\n", ["1 - Error during parsing: this block is not closed: '}' is missing"]),
        (".:53 {\n}\n}", ["3 - Error during parsing: Unexpected '}'"]),
        ("{\n}", ["1 - Error during parsing: a block without a name before it"]),
        ("errors\n", ["1 - Error during parsing: a server block wants '{' behind its zones, got 'errors'"]),
        ('.:53 {\n errors "x\n}', ["2 - Error during parsing: a quote is not closed"]),
        (
            ".:53 {\n errors\n}",
            ["1 - Error during parsing: no server block has the plugin kubernetes, so there would be no cluster names"],
        ),
        (
            "example.com {\n kubernetes cluster.local\n forward example.org 10.0.0.1\n}",
            ["3 - Error during parsing: plugin/forward: 'example.org' is not in the server block's zone 'example.com'"],
        ),
    ],
)
def test_what_is_wrong(text: str, problems: list[str]) -> None:
    """Every problem of a Corefile is told with its line, and none of it is used."""
    with pytest.raises(CorefileError) as caught:
        parse(text)
    assert str(caught.value).splitlines() == [f"Corefile:{problem}" for problem in problems]


def test_a_file_that_cannot_be_read() -> None:
    """`forward` may name a file."""

    def missing(path: str) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(CorefileError, match="plugin/forward: /etc/nothing: No such file or directory"):
        parse_corefile(block("forward . /etc/nothing"), read_file=missing)


def test_servers_of_a_resolv_conf() -> None:
    """IPv4 servers, in order."""
    assert resolv_conf_servers(RESOLV) == ["192.168.93.53", "192.168.93.54"]


def test_dnsmasq_configuration(tmp_path: Path) -> None:
    """The whole configuration of a cluster with an outside server and a stub domain; dnsmasq itself accepts it."""
    config = parse(corefile("cluster.local") + "example.com {\n forward . 10.0.0.2:5300\n log\n}\n")
    text = render_dnsmasq(config, addresses=("10.244.1.2", "127.0.0.1"), hosts_file="/run/coredns/hosts")
    assert text.splitlines() == [
        "port=53",
        "listen-address=10.244.1.2",
        "listen-address=127.0.0.1",
        "bind-interfaces",
        "user=root",
        "group=",
        "log-facility=-",
        "pid-file=",
        "no-resolv",
        "no-hosts",
        "no-poll",
        "addn-hosts=/run/coredns/hosts",
        "local-ttl=30",
        "cache-size=0",
        "dns-forward-max=2000",
        "edns-packet-max=1232",
        "local=/serial.testbed/",
        "server=/cluster.local/127.0.0.1#5355",
        "server=/in-addr.arpa/127.0.0.1#5355",
        "server=/ip6.arpa/127.0.0.1#5355",
        "server=/example.com/10.0.0.2#5300",
        "server=192.168.93.53#53",
        "server=192.168.93.54#53",
        "log-queries",
    ]
    if shutil.which("dnsmasq") is None:
        pytest.skip("dnsmasq is not installed")
    (tmp_path / "dnsmasq.conf").write_text(text)
    subprocess.run(["dnsmasq", "--test", "-C", str(tmp_path / "dnsmasq.conf")], check=True, capture_output=True)


def test_without_anybody_to_ask_the_responder_is() -> None:
    """Then names of the world fail at once instead of after a time-out."""
    text = render_dnsmasq(parse(corefile("cluster.local"), resolv=""), addresses=("10.244.1.2",), hosts_file="/h")
    assert text.splitlines()[-1] == "server=127.0.0.1#5355"


@pytest.mark.parametrize("quoted", [False, True], ids=["plain", "quoted"])
@pytest.mark.parametrize("text", hostile_texts("/canary"))
def test_a_corefile_brings_no_option_of_dnsmasq_in(text: str, quoted: bool) -> None:
    """Whatever stands for a zone, a server or an option's value: refused, or one word of the line that it belongs to."""
    word = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if quoted else text
    known = {
        line.partition("=")[0]
        for line in render_dnsmasq(
            parse(block("forward . 10.0.0.1", "log")), addresses=("1.2.3.4",), hosts_file="/h"
        ).splitlines()
    }
    for corefile_text in (
        block(f"forward . {word}"), block(f"forward {word} 10.0.0.1"), block(f"ready {word}"), block(f"log {word}"),
        block(f"forward . 10.0.0.1 {{\n policy {word}\n }}"), f".:53 {{\n kubernetes {word}\n}}",
        block("log") + f"{word} {{\n forward . 10.0.0.2\n}}\n", block(f"hosts {word}"), f"{word} {{\n kubernetes cluster.local\n}}",
    ):  # fmt: skip
        try:
            config = parse_corefile(corefile_text, read_file=lambda path: Path("/nothing", path[1:]).read_text())
        except CorefileError:
            continue
        lines = render_dnsmasq(config, addresses=("1.2.3.4",), hosts_file="/h").splitlines()
        assert {line.partition("=")[0] for line in lines} <= known
        assert not [line for line in lines if "canary" in line and not line.startswith("server=/")]
