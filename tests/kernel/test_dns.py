"""Cluster DNS in a running lab, asked with dig and with the resolvers that programs use: real dnsmasq, real rules."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dns_model import endpoint, endpoint_slice, namespace, port, service
from dnslib import DNSRecord

from testbed.errors import ApiError
from testbed.kernel.pace import patient
from testbed.lab.handle import Lab
from testbed.lab.kubectl import find_kubectl
from testbed.lab.start import start_lab
from testbed.manifests.topology import load_topology

Object = dict[str, Any]

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed (Debian package dnsutils)"),
]

TOPOLOGY = Path(__file__).parents[2] / "scenarios/dns/outside-dns.yaml"
DNS = "10.96.0.10"
HTTP = [port("http", 80)]
SLICES = "endpointslices.discovery.k8s.io"


# -- objects -----------------------------------------------------------------------------------------------------------


def pod(name: str, *, namespace: str = "dev", labels: dict[str, str] | None = None, **spec: Any) -> Object:
    container = {"name": "c", "image": spec.pop("image", "dnsutils"), **spec.pop("container", {})}
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container], **spec}}


def headless(name: str, *, ports: list[Object] | None = None, **spec: Any) -> Object:
    return service(name, clusterIP="None", ports=HTTP if ports is None else ports, **spec)


def at(name: str, address: str, **spec: Any) -> Object:
    return service(name, clusterIP=address, **{"ports": HTTP, **spec})


OBJECTS: list[Object] = [
    at("web", "10.96.1.1", ports=[{**port("http", 80), "targetPort": 8080}, port("dns", 53, "UDP"), port("dns-tcp", 53)]),
    at("unnamed", "10.96.1.2", ports=[{"port": 8443, "protocol": "TCP"}]),
    at("np", "10.96.1.3", type="NodePort"),
    at("lb", "10.96.1.4", type="LoadBalancer"),
    # endpoints written by hand, so that addresses are known
    headless("hl", ports=[port("http", 80), port("admin", 81)]),
    endpoint_slice("hl", endpoint("10.244.77.1"), endpoint("10.244.77.2", ready=None), endpoint("10.244.77.3", ready=False),
                   ports=[port("http", 8080), port("admin", 8081)]),
    headless("sts"),
    endpoint_slice("sts", endpoint("10.244.77.11", hostname="sts-0"), endpoint("10.244.77.12", hostname="sts-1")),
    headless("nobody"),
    endpoint_slice("nobody", endpoint("10.244.77.21", ready=False)),
    headless("one"),
    headless("two"),
    endpoint_slice("one", *(endpoint(f"10.244.78.{n}") for n in (1, 2, 3))),
    endpoint_slice("two", *(endpoint(f"10.244.78.{n}") for n in (1, 2, 3))),
    headless("many"),
    endpoint_slice("many", *(endpoint(f"10.244.79.{n}") for n in range(1, 121)), ports=[port("http", 8080)]),
    service("shop", type="ExternalName", externalName="shop.example.com"),
    service("gone", type="ExternalName", externalName="gone.example.com"),
    service("alias", type="ExternalName", externalName="web.dev.svc.cluster.local"),
    pod("client", nodeName="node1"),
    pod("client", namespace="other", nodeName="node2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with all of OBJECTS, whose client pods run."""
    topology = load_topology(TOPOLOGY)
    with start_lab(topology, name=f"dns-{os.getpid()}", proxy_mode="iptables", attached=True) as lab:
        for name in ("dev", "other", "nothing-in-it"):
            lab.api.create(namespace(name))
        for obj in OBJECTS:
            lab.api.create(obj)
        wait_ready(lab, "dev", "client")
        wait_ready(lab, "other", "client")
        wait_known(lab)
        yield lab


def wait_until(check: Callable[[], Any], *, within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + patient(within_s)
    while not (seen := check()):
        assert time.monotonic() < deadline, f"did not happen within {within_s:g} s; last seen: {seen!r}"
        time.sleep(0.02)
    return seen


def is_ready(obj: Object) -> bool:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def wait_ready(lab: Lab, namespace: str, name: str) -> Object:
    found = wait_until(
        lambda: [p for p in lab.api.list("pods", namespace)[0] if p["metadata"]["name"] == name and is_ready(p)]
    )
    return found[0]


def dns_pods(lab: Lab) -> list[Object]:
    """Return the pods of DNS that stay: one that is being deleted is ready until its end."""
    found = lab.api.list("pods", "kube-system", label_selector="k8s-app=kube-dns")[0]
    return [each for each in found if "deletionTimestamp" not in each["metadata"]]


def dns_addresses(lab: Lab) -> list[str]:
    return [found["status"]["podIP"] for found in dns_pods(lab) if is_ready(found)]


def wait_known(lab: Lab) -> None:
    """Return when every server has all that was written: a name that is made last is the last one to be known."""
    name = f"barrier-{time.monotonic_ns()}"
    lab.api.create(headless(name))
    lab.api.create(endpoint_slice(name, endpoint("10.244.99.99")))
    for address in dns_addresses(lab):
        wait_until(lambda address=address: dig(lab, f"{name}.dev.svc.cluster.local", server=address).values)  # type: ignore[misc]
    lab.api.delete("services", "dev", name)
    lab.api.delete(SLICES, "dev", f"{name}-1")


# -- dig ---------------------------------------------------------------------------------------------------------------


class Dug:
    """What dig printed: ``status``, ``flags``, and the records of each section as [name, TTL, type, value]."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.status = (re.search(r"status: (\w+)", text) or ["", ""])[1]
        self.flags = (re.search(r"flags: ([a-z ]*);", text) or ["", ""])[1].split()
        self.sections: dict[str, list[list[str]]] = {}
        section = ""
        for line in text.splitlines():
            if line.startswith(";;") and line.endswith("SECTION:"):
                section = line.split()[1]
            elif line and not line.startswith(";"):
                name, ttl, _, kind, value = line.split(None, 4)
                self.sections.setdefault(section, []).append([name, ttl, kind, value])

    @property
    def records(self) -> list[str]:
        return sorted(f"{kind} {value}" for _, _, kind, value in self.sections.get("ANSWER", []))

    @property
    def values(self) -> list[str]:
        return sorted(value for *_, value in self.sections.get("ANSWER", []))


def dig(lab: Lab, name: str, kind: str = "A", *options: str, where: str = "dev/client", server: str = DNS) -> Dug:
    done = lab.run(where, ["dig", f"@{server}", "+tries=3", "+time=2", *options, "-t", kind, "-q", name], timeout_s=30)
    return Dug(done.stdout.decode())


def reverse(address: str) -> str:
    return ".".join(reversed(address.split("."))) + ".in-addr.arpa"


HL = [f"10-244-77-{n}.hl.dev.svc.cluster.local." for n in (1, 2)]


@pytest.mark.parametrize(
    ("name", "kind", "status", "records"),
    [
        # a Service with a ClusterIP
        ("web.dev.svc", "A", "NOERROR", ["A 10.96.1.1"]),
        ("web.dev.svc", "AAAA", "NOERROR", []),
        ("web.dev.svc", "TXT", "NOERROR", []),
        ("web.dev.svc", "MX", "NOERROR", []),
        ("np.dev.svc", "A", "NOERROR", ["A 10.96.1.3"]),
        ("lb.dev.svc", "A", "NOERROR", ["A 10.96.1.4"]),
        ("_http._tcp.web.dev.svc", "SRV", "NOERROR", ["SRV 0 100 80 web.dev.svc.cluster.local."]),
        ("_dns._udp.web.dev.svc", "SRV", "NOERROR", ["SRV 0 100 53 web.dev.svc.cluster.local."]),
        ("_dns._tcp.web.dev.svc", "SRV", "NXDOMAIN", []),
        ("_http._tcp.unnamed.dev.svc", "SRV", "NXDOMAIN", []),
        ("unnamed.dev.svc", "SRV", "NOERROR", ["SRV 0 100 8443 unnamed.dev.svc.cluster.local."]),
        (reverse("10.96.1.1"), "PTR", "NOERROR", ["PTR web.dev.svc.cluster.local."]),
        (reverse("10.96.0.1"), "PTR", "NOERROR", ["PTR kubernetes.default.svc.cluster.local."]),
        ("kubernetes.default.svc", "A", "NOERROR", ["A 10.96.0.1"]),
        ("kube-dns.kube-system.svc", "A", "NOERROR", [f"A {DNS}"]),
        # headless: ready addresses (a condition that is not given means ready), their names, their ports
        ("hl.dev.svc", "A", "NOERROR", ["A 10.244.77.1", "A 10.244.77.2"]),
        ("hl.dev.svc", "AAAA", "NOERROR", []),
        ("nobody.dev.svc", "A", "NXDOMAIN", []),
        ("sts-1.sts.dev.svc", "A", "NOERROR", ["A 10.244.77.12"]),
        ("10-244-77-1.hl.dev.svc", "A", "NOERROR", ["A 10.244.77.1"]),
        ("10-244-77-3.hl.dev.svc", "A", "NXDOMAIN", []),
        ("10-244-77-11.sts.dev.svc", "A", "NXDOMAIN", []),
        ("_http._tcp.hl.dev.svc", "SRV", "NOERROR", [f"SRV 0 50 8080 {name}" for name in HL]),
        ("hl.dev.svc", "SRV", "NOERROR", [f"SRV 0 25 {number} {name}" for number in (8080, 8081) for name in HL]),
        (reverse("10.244.77.1"), "PTR", "NOERROR", [f"PTR {HL[0]}"]),
        (reverse("10.244.77.12"), "PTR", "NOERROR", ["PTR sts-1.sts.dev.svc.cluster.local."]),
        (reverse("10.244.78.2"), "PTR", "NOERROR", [
            "PTR 10-244-78-2.one.dev.svc.cluster.local.", "PTR 10-244-78-2.two.dev.svc.cluster.local."]),
        (reverse("10.244.77.3"), "PTR", "NXDOMAIN", []),
        # ExternalName
        ("shop.dev.svc", "A", "NOERROR", ["A 192.168.93.80", "CNAME shop.example.com."]),
        ("shop.dev.svc", "AAAA", "NOERROR", ["CNAME shop.example.com."]),
        ("shop.dev.svc", "CNAME", "NOERROR", ["CNAME shop.example.com."]),
        ("gone.dev.svc", "A", "NOERROR", ["CNAME gone.example.com."]),
        ("alias.dev.svc", "A", "NOERROR", ["A 10.96.1.1", "CNAME web.dev.svc.cluster.local."]),
        # the schema, pods, empty names, names that are not there
        ("dns-version", "TXT", "NOERROR", ['TXT "1.1.0"']),
        ("10-244-1-77.dev.pod", "A", "NOERROR", ["A 10.244.1.77"]),
        ("10-244-1-77.dev.pod", "AAAA", "NOERROR", []),
        ("10-244-1-77.nowhere.pod", "A", "NXDOMAIN", []),
        ("no-address-at-all.dev.pod", "A", "NXDOMAIN", []),
        ("", "A", "NOERROR", []),
        ("svc", "A", "NOERROR", []),
        ("pod", "A", "NOERROR", []),
        ("dev.svc", "A", "NOERROR", []),
        ("nothing-in-it.svc", "A", "NOERROR", []),
        ("nowhere.svc", "A", "NXDOMAIN", []),
        ("nothing.dev.svc", "A", "NXDOMAIN", []),
        ("nothing.dev.svc", "AAAA", "NXDOMAIN", []),
        ("a.b.c.web.dev.svc", "A", "NXDOMAIN", []),
        ("web.dev", "A", "NXDOMAIN", []),
        ("_under_score.dev.svc", "A", "NXDOMAIN", []),
        ("l" * 63 + ".dev.svc", "A", "NXDOMAIN", []),
        (reverse("10.244.200.200"), "PTR", "NXDOMAIN", []),
        # the world
        ("www.example.com.", "A", "NOERROR", ["A 192.168.93.80"]),
        ("www.example.com.", "AAAA", "NOERROR", []),
        ("nothing.example.com.", "A", "NXDOMAIN", []),
        (reverse("192.168.93.80"), "PTR", "NOERROR", ["PTR www.example.com."]),
    ],
)  # fmt: skip
def test_what_a_name_means(lab: Lab, name: str, kind: str, status: str, records: list[str]) -> None:
    """Each row of the specification, asked from a pod at the Service's address."""
    if name.endswith("in-addr.arpa"):
        question = f"{name}."
    else:
        question = name if name.endswith(".") else f"{name}.cluster.local.".lstrip(".")
    found = dig(lab, question, kind)
    assert (found.status, found.records) == (status, sorted(records)), found.text
    if question.endswith("cluster.local."):
        ttls = {ttl for _, ttl, found_kind, _ in found.sections.get("ANSWER", []) if found_kind not in ("TXT",)}
        assert ttls <= {"30", "60"}  # 60 is what the outside server gives to its own
        assert "aa" in found.flags
        if not records:
            (soa,) = found.sections["AUTHORITY"]
            assert soa[:3] == ["cluster.local.", "30", "SOA"]
            assert soa[3].startswith("ns.dns.cluster.local. hostmaster.cluster.local. ")
            assert soa[3].endswith(" 7200 1800 86400 30")


def test_the_case_of_a_question_does_not_matter(lab: Lab) -> None:
    """A name is found in any case, and the answer repeats the question's."""
    for name, kind in (("WEB.Dev.svc.CLUSTER.local.", "A"), ("_HTTP._tcp.Web.dev.svc.cluster.local.", "SRV")):
        (record,) = dig(lab, name, kind).sections["ANSWER"]
        assert record[0] == name


def test_srv_answers_bring_addresses(lab: Lab) -> None:
    """The targets' addresses are beside the answer."""
    found = dig(lab, "_http._tcp.sts.dev.svc.cluster.local", "SRV")
    assert sorted((name, value) for name, _, _, value in found.sections["ADDITIONAL"]) == [
        ("sts-0.sts.dev.svc.cluster.local.", "10.244.77.11"),
        ("sts-1.sts.dev.svc.cluster.local.", "10.244.77.12"),
    ]


@pytest.mark.parametrize("where", ["dev/client", "node3"])
@pytest.mark.parametrize("options", [["+notcp"], ["+tcp"]], ids=["UDP", "TCP"])
def test_the_service_is_reached_from_everywhere(lab: Lab, where: str, options: list[str]) -> None:
    """Pods and nodes ask 10.96.0.10, over UDP and TCP: names of dnsmasq's own and of the responder behind it."""
    for name, kind, value in (
        ("web.dev.svc.cluster.local", "A", "10.96.1.1"),
        ("_http._tcp.web.dev.svc.cluster.local", "SRV", "0 100 80 web.dev.svc.cluster.local."),
        ("www.example.com", "A", "192.168.93.80"),
    ):
        assert dig(lab, name, kind, *options, where=where).values == [value]


@pytest.mark.parametrize("name", ["many.dev.svc.cluster.local", "_http._tcp.many.dev.svc.cluster.local"])
def test_more_than_fits_into_a_datagram(lab: Lab, name: str) -> None:
    """120 records: cut and marked over UDP, whole over TCP, and whole for whoever retries as it should."""
    kind = "SRV" if name.startswith("_") else "A"
    cut = dig(lab, name, kind, "+ignore", "+noedns")
    assert "tc" in cut.flags
    assert len(cut.values) < 30
    assert len(dig(lab, name, kind, "+tcp").values) == 120
    retried = dig(lab, name, kind)
    assert "Truncated, retrying in TCP mode" in retried.text
    assert len(retried.values) == 120


@pytest.mark.parametrize("name", ["sts", "one", "two"])
def test_addresses_take_turns(lab: Lab, name: str) -> None:
    """Of 3 × N answers of one server, each address comes first N times: also where two Services share the pods."""
    server = dns_addresses(lab)[0]
    question = f"{name}.dev.svc.cluster.local"
    size = len(dig(lab, question, server=server).values)
    argv = ["dig", f"@{server}", "+noall", "+answer", *[question] * (3 * size)]
    lines = lab.run("dev/client", argv, timeout_s=30).stdout.decode().splitlines()
    firsts = Counter(line.split()[-1] for line in lines[::size])
    assert len(lines) == 3 * size * size
    assert set(firsts.values()) == {3}, firsts


# -- changes -----------------------------------------------------------------------------------------------------------


def test_names_come_and_go(lab: Lab) -> None:
    """A Service that is made is known, changed is known so, deleted is not there."""
    name = "passing.dev.svc.cluster.local"
    assert dig(lab, name).status == "NXDOMAIN"
    lab.api.create(at("passing", "10.96.1.50"))
    wait_until(lambda: all(dig(lab, name, server=one).values == ["10.96.1.50"] for one in dns_addresses(lab)))
    lab.api.delete("services", "dev", "passing")
    wait_until(lambda: all(dig(lab, name, server=one).status == "NXDOMAIN" for one in dns_addresses(lab)))
    assert dig(lab, reverse("10.96.1.50"), "PTR").status == "NXDOMAIN"


def test_an_alias_that_changes(lab: Lab) -> None:
    """Another externalName is another answer."""
    lab.api.create(service("moving", type="ExternalName", externalName="www.example.com"))
    name = "moving.dev.svc.cluster.local"
    wait_until(lambda: dig(lab, name).records == ["A 192.168.93.80", "CNAME www.example.com."])
    lab.api.patch("services", "dev", "moving", {"spec": {"externalName": "gone.example.com"}})
    wait_until(
        lambda: all(dig(lab, name, server=one).records == ["CNAME gone.example.com."] for one in dns_addresses(lab))
    )


@pytest.mark.parametrize("target", ["under_score.example.com", "Upper.example.com", "a" * 254, "-a", ""])
def test_names_that_no_alias_can_have(lab: Lab, target: str) -> None:
    """An externalName that is no DNS name is refused by the API, so that it never reaches DNS."""
    with pytest.raises(ApiError) as caught:
        lab.api.create(service("bad", type="ExternalName", externalName=target))
    assert caught.value.code == 422
    assert "spec.externalName" in caught.value.message


def test_an_alias_that_fits_in_no_message(lab: Lab) -> None:
    """The API takes parts of more than 63 characters, as Kubernetes' does; DNS has no record for them, and goes on."""
    lab.api.create(service("long", type="ExternalName", externalName="a" * 64 + ".example.com"))
    name = "long.dev.svc.cluster.local"
    wait_until(lambda: all(dig(lab, name, server=one).status == "NOERROR" for one in dns_addresses(lab)))
    for kind in ("A", "CNAME", "AAAA"):
        assert dig(lab, name, kind).records == []
    assert dig(lab, "web.dev.svc.cluster.local").values == ["10.96.1.1"]


def test_pods_that_become_ready_and_stop_being_so(lab: Lab) -> None:
    """A headless Service follows the readiness of real pods; publishNotReadyAddresses keeps them."""
    flag = {
        "readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1}
    }
    lab.api.create(headless("flip", selector={"app": "flip"}))
    lab.api.create(headless("kept", selector={"app": "flip"}, publishNotReadyAddresses=True))
    created = pod("flip", labels={"app": "flip"}, container=flag, hostname="named", subdomain="flip")
    lab.api.create(created)

    def running() -> str:
        status = lab.api.get("pods", "dev", "flip").get("status") or {}
        return str(status.get("podIP") or "") if status.get("phase") == "Running" else ""

    def everywhere(name: str, values: list[str]) -> bool:
        """Say whether each server gives these values for a name; none: says that there is no such name."""
        found = [dig(lab, f"{name}.dev.svc.cluster.local", server=one) for one in dns_addresses(lab)]
        return all(each.values == values and (values or each.status == "NXDOMAIN") for each in found)

    address = wait_until(running)
    wait_until(lambda: everywhere("kept", [address]))
    assert dig(lab, "flip.dev.svc.cluster.local").status == "NXDOMAIN"
    lab.run("dev/flip", ["touch", "/tmp/ready"], timeout_s=5)
    wait_until(lambda: everywhere("named.flip", [address]))
    assert dig(lab, reverse(address), "PTR").values == [
        f"{address.replace('.', '-')}.kept.dev.svc.cluster.local.", "named.flip.dev.svc.cluster.local.",
    ]  # fmt: skip
    lab.run("dev/flip", ["rm", "/tmp/ready"], timeout_s=5)
    wait_until(lambda: everywhere("flip", []))
    assert dig(lab, "kept.dev.svc.cluster.local").values == [address]
    lab.api.delete("pods", "dev", "flip", grace_s=0)
    wait_until(lambda: everywhere("kept", []))


# -- resolvers ---------------------------------------------------------------------------------------------------------

SEARCH = "search dev.svc.cluster.local svc.cluster.local cluster.local\n"
CLUSTER_FIRST = f"nameserver {DNS}\n{SEARCH}options ndots:5\n"
OF_THE_NODE = "nameserver 192.168.93.53\n"


@pytest.mark.parametrize(
    ("name", "spec", "resolv_conf"),
    [
        ("default", {}, CLUSTER_FIRST),
        ("host", {"hostNetwork": True}, OF_THE_NODE),
        ("host-first", {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}, CLUSTER_FIRST),
        ("as-node", {"dnsPolicy": "Default"}, OF_THE_NODE),
        (
            "own", {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}},
            "nameserver 1.2.3.4\nsearch a.b\noptions ndots:2 edns0\n",
        ),
        (
            "merged", {"dnsConfig": {"nameservers": [DNS, "1.2.3.4"], "searches": ["a.b", "cluster.local"], "options": [{"name": "ndots", "value": "2"}]}},
            f"nameserver {DNS}\nnameserver 1.2.3.4\n{SEARCH[:-1]} a.b\noptions ndots:2\n",
        ),
    ],
)  # fmt: skip
def test_resolv_conf(lab: Lab, name: str, spec: Object, resolv_conf: str) -> None:
    """Each dnsPolicy, as a program in the pod reads it."""
    lab.api.create(pod(f"resolv-{name}", nodeName="node3", **spec))
    wait_ready(lab, "dev", f"resolv-{name}")
    done = lab.run(f"dev/resolv-{name}", ["cat", "/etc/resolv.conf"], timeout_s=5)
    assert done.stdout.decode() == resolv_conf
    lab.api.delete("pods", "dev", f"resolv-{name}", grace_s=0)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"dnsPolicy": "None"}, "spec.dnsConfig.nameservers: Required value: must provide at least one DNS nameserver when `dnsPolicy` is None"),
        ({"dnsConfig": {"searches": [f"s{n}.example.com" for n in range(33)]}}, "must not have more than 32 search paths"),
        ({"dnsConfig": {"searches": ["a" * 60 + f".{'b' * 60}.x{n}.com" for n in range(20)]}}, "must not have more than 2048 characters (including spaces) in the search list"),
        ({"dnsConfig": {"searches": ["under_score.com"]}}, "spec.dnsConfig.searches[0]: Invalid value"),
    ],
)  # fmt: skip
def test_dns_settings_that_are_refused(lab: Lab, spec: Object, problem: str) -> None:
    """What no resolver could use is refused in Kubernetes' words."""
    with pytest.raises(ApiError) as caught:
        lab.api.create(pod("refused", **spec))
    assert problem in caught.value.message


def test_files_of_a_pod_with_a_name_in_dns(lab: Lab) -> None:
    """hostname and subdomain are in /etc/hosts by their whole name."""
    lab.api.create(pod("whole", hostname="h", subdomain="sts"))
    address = wait_ready(lab, "dev", "whole")["status"]["podIP"]
    hosts = lab.run("dev/whole", ["cat", "/etc/hosts"], timeout_s=5).stdout.decode()
    assert hosts.startswith("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n")
    assert f"{address}\th.sts.dev.svc.cluster.local\th\n" in hosts
    assert lab.run("dev/whole", ["hostname", "-f"], timeout_s=5).stdout.decode() == "h.sts.dev.svc.cluster.local\n"
    lab.api.delete("pods", "dev", "whole", grace_s=0)


def corefile(lab: Lab) -> str:
    return str(lab.api.get("configmaps", "kube-system", "coredns")["data"]["Corefile"])


def write_corefile(lab: Lab, text: str) -> None:
    lab.api.patch("configmaps", "kube-system", "coredns", {"data": {"Corefile": text}})


def logs(lab: Lab) -> list[str]:
    """Return what each DNS pod has printed."""
    kubectl = [find_kubectl(), f"--kubeconfig={lab.kubeconfig}", "logs", "-n", "kube-system"]
    names = [found["metadata"]["name"] for found in dns_pods(lab)]
    return [subprocess.run([*kubectl, name], capture_output=True, text=True, check=True).stdout for name in names]


@contextlib.contextmanager
def changed_corefile(lab: Lab, text: str, *, wait_for: str = "[INFO] Reloading complete") -> Iterator[None]:
    """Have both pods take another Corefile, and the old one again."""
    before = corefile(lab)
    _write_and_wait(lab, text, wait_for)
    try:
        yield
    finally:
        if wait_for.startswith("[ERROR]"):  # they never left the old one
            write_corefile(lab, before)
        else:
            _write_and_wait(lab, before, wait_for)


def _write_and_wait(lab: Lab, text: str, wait_for: str) -> None:
    seen = [log.count(wait_for) for log in logs(lab)]
    write_corefile(lab, text)
    wait_until(lambda: all(log.count(wait_for) > count for log, count in zip(logs(lab), seen, strict=True)))
    wait_until(lambda: all(dig(lab, "web.dev.svc.cluster.local", server=one).values for one in dns_addresses(lab)))


def questions(lab: Lab, action: Callable[[], object]) -> list[str]:
    """Return the questions of type A that reach DNS while something is done, sorted: each server has its own log."""
    before = [len(log) for log in logs(lab)]
    action()
    texts = [log[start:] for log, start in zip(logs(lab), before, strict=True)]
    return sorted(name for text in texts for name in re.findall(r"query\[A\] (\S+) from 10\.244\.", text))


def test_the_search_path_question_by_question(lab: Lab) -> None:
    """With ndots:5 a name with fewer dots is tried with each suffix first: glibc's own resolver, counted in DNS' log."""

    def look_up(where: str, name: str) -> Callable[[], object]:
        return lambda: lab.run(where, ["getent", "ahostsv4", name], timeout_s=20)

    with changed_corefile(lab, corefile(lab).replace("    errors\n", "    errors\n    log\n")):
        assert questions(lab, look_up("dev/client", "web")) == ["web.dev.svc.cluster.local"]
        assert questions(lab, look_up("other/client", "web.dev")) == [
            "web.dev.other.svc.cluster.local",
            "web.dev.svc.cluster.local",
        ]
        whole = "web.dev.svc.cluster.local"
        wasted = [f"{whole}.{suffix}" for suffix in ("dev.svc.cluster.local", "svc.cluster.local", "cluster.local")]
        assert questions(lab, look_up("dev/client", whole)) == sorted([*wasted, whole])
        assert questions(lab, look_up("dev/client", f"{whole}.")) == [whole]
        outside = [
            f"www.example.com.{suffix}" for suffix in ("dev.svc.cluster.local", "svc.cluster.local", "cluster.local")
        ]
        assert questions(lab, look_up("dev/client", "www.example.com")) == sorted([*outside, "www.example.com"])
        ours = [line for log in logs(lab) for line in log.splitlines() if "serial.testbed" in line or " - " in line]
        assert ours == []  # that it reads its names again is no news to whoever debugs DNS


@pytest.mark.parametrize(
    ("argv", "prints", "status"),
    [
        (["getent", "hosts", "web"], "10.96.1.1       web.dev.svc.cluster.local", 0),
        (["nslookup", "web"], "Name:\tweb.dev.svc.cluster.local\nAddress: 10.96.1.1\n", 0),
        (["nslookup", "nothing.dev.svc.cluster.local", DNS], "** server can't find nothing.dev.svc.cluster.local: NXDOMAIN", 1),
        (["dig", "+search", "+short", "hl"], "10.244.77.", 0),
        (["dig", "+search", "+short", "web.dev"], "10.96.1.1", 0),
    ],
)  # fmt: skip
def test_real_resolvers_in_a_pod(lab: Lab, argv: list[str], prints: str, status: int) -> None:
    """glibc, nslookup and dig find short names by the pod's own resolv.conf, and say what is not there."""
    done = lab.run("dev/client", argv, timeout_s=20)
    assert prints in done.stdout.decode()
    assert done.status == status


def test_an_application_reaches_pods_by_name(lab: Lab) -> None:
    """`curl http://SERVICE.NAMESPACE` from another namespace: a headless name leads to a pod, without any rule."""
    lab.api.create(headless("site", selector={"app": "site"}))
    lab.api.create(pod("site", image="nginx", labels={"app": "site"}))
    wait_ready(lab, "dev", "site")
    wait_until(lambda: all(dig(lab, "site.dev.svc.cluster.local", server=one).values for one in dns_addresses(lab)))
    done = lab.run("other/client", ["curl", "-sS", "-m", "10", "http://site.dev/"], timeout_s=20)
    assert "Welcome to nginx!" in done.stdout.decode()


# -- configuration -----------------------------------------------------------------------------------------------------


def test_another_ttl_and_no_pods(lab: Lab) -> None:
    """The ConfigMap's Corefile counts, and is followed while the pods run."""
    text = corefile(lab).replace("ttl 30", "ttl 7").replace("pods insecure", "pods disabled")
    with changed_corefile(lab, text):
        for server in dns_addresses(lab):
            for name, kind in (("web", "A"), ("_http._tcp.web", "SRV"), ("hl", "A")):
                found = dig(lab, f"{name}.dev.svc.cluster.local", kind, server=server)
                assert {ttl for _, ttl, _, _ in found.sections["ANSWER"]} == {"7"}
            assert dig(lab, "10-244-1-77.dev.pod.cluster.local", server=server).status == "NXDOMAIN"
            assert dig(lab, "no.dev.svc.cluster.local", server=server).sections["AUTHORITY"][0][1] == "7"
    assert dig(lab, "web.dev.svc.cluster.local").sections["ANSWER"][0][1] == "30"


def test_verified_pods(lab: Lab) -> None:
    """With `pods verified` only real pods have names."""
    address = lab.api.get("pods", "dev", "client")["status"]["podIP"]
    dashed = address.replace(".", "-")
    with changed_corefile(lab, corefile(lab).replace("pods insecure", "pods verified")):
        wait_until(
            lambda: all(
                dig(lab, f"{dashed}.dev.pod.cluster.local", server=one).values == [address]
                for one in dns_addresses(lab)
            )
        )
        assert dig(lab, f"{dashed}.other.pod.cluster.local").status == "NXDOMAIN"
        assert dig(lab, "10-244-1-250.dev.pod.cluster.local").status == "NXDOMAIN"


def test_nobody_to_ask(lab: Lab) -> None:
    """Without `forward` names of the world fail at once, while the cluster's go on."""
    text = re.sub(r"    forward .*?\}\n", "", corefile(lab), flags=re.DOTALL)
    with changed_corefile(lab, text):
        began = time.monotonic()
        assert dig(lab, "www.example.com", "A", "+tries=1", "+time=10").status == "SERVFAIL"
        assert time.monotonic() - began < 5  # half of dig's patience
        assert dig(lab, "web.dev.svc.cluster.local").values == ["10.96.1.1"]


def test_a_bad_corefile_is_refused(lab: Lab) -> None:
    """The old configuration stays, and the log says which line is wrong."""
    with changed_corefile(lab, corefile(lab).replace("ttl 30", "ttl many"), wait_for="[ERROR] Restart failed"):
        assert dig(lab, "web.dev.svc.cluster.local").sections["ANSWER"][0][1] == "30"
        assert all(
            "Corefile:10 - Error during parsing: plugin/kubernetes: ttl must be in range [0, 3600]: many" in log
            for log in logs(lab)
        )


# -- faults ------------------------------------------------------------------------------------------------------------


def dnsmasq_pid(lab: Lab, name: str) -> str:
    return lab.run(f"kube-system/{name}", ["pidof", "dnsmasq"], timeout_s=5).stdout.decode().strip()


RESOLVERS_PATIENCE_S = 5.0
"""How long a client asks until a question is lost to it: resolv.conf's default time-out."""


def ask_all_the_time(seconds: float, gap_s: float, patience_s: float) -> list[str]:
    """Ask for a name for a while, each time until it is answered; return the answers, 'lost' where none was in time."""
    query = DNSRecord.question("web.dev.svc.cluster.local")
    seen = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = "lost"
        deadline = time.monotonic() + patience_s
        while answer == "lost" and (left_s := deadline - time.monotonic()) > 0:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made, contextlib.suppress(OSError):
                made.settimeout(min(1.0, left_s))
                made.connect((DNS, 53))
                made.send(query.pack())
                answer = ",".join(str(rr.rdata) for rr in DNSRecord.parse(made.recv(4096)).rr)
            time.sleep(gap_s)
        seen.append(answer)
    return seen


def ask_while(lab: Lab, action: Callable[[], object], *, seconds: float) -> set[str]:
    """Return the answers that there were meanwhile; 'lost' among them: a question took longer than a resolver waits."""
    seen: set[str] = set()
    patience_s = patient(RESOLVERS_PATIENCE_S)
    thread = threading.Thread(
        target=lambda: seen.update(
            lab.call("dev/client", ask_all_the_time, seconds, 0.005, patience_s, timeout_s=seconds + patience_s + 60)
        )
    )
    thread.start()
    time.sleep(0.3)  # so that the questions run before anything happens
    action()
    thread.join()
    return seen


def test_a_dnsmasq_that_dies(lab: Lab) -> None:
    """Its pod starts another at once, with the same data; a client that tries again loses nothing."""
    name = dns_pods(lab)[0]["metadata"]["name"]
    address = dns_pods(lab)[0]["status"]["podIP"]
    before = dnsmasq_pid(lab, name)
    seen = ask_while(lab, lambda: lab.run(f"kube-system/{name}", ["kill", "-9", before], timeout_s=5), seconds=2)
    assert seen == {"10.96.1.1"}
    wait_until(lambda: dnsmasq_pid(lab, name) not in ("", before))
    wait_until(lambda: dig(lab, "sts.dev.svc.cluster.local", server=address).values == ["10.244.77.11", "10.244.77.12"])
    assert dig(lab, "_http._tcp.sts.dev.svc.cluster.local", "SRV", server=address).values
    assert any("starting it again" in log for log in logs(lab))


def test_both_pods_die(lab: Lab) -> None:
    """Containers that are killed are started again by the kubelet, and DNS is back."""

    def restarts() -> list[int]:
        return [found["status"]["containerStatuses"][0]["restartCount"] for found in dns_pods(lab)]

    before = restarts()
    for found in dns_pods(lab):
        lab.signal_pod("kube-system", found["metadata"]["name"], signal.SIGKILL)
    wait_until(lambda: restarts() == [count + 1 for count in before])
    wait_until(lambda: len(dns_addresses(lab)) == len(before))
    wait_until(lambda: dig(lab, "web.dev.svc.cluster.local").values == ["10.96.1.1"])
    for server in dns_addresses(lab):
        assert dig(lab, "sts.dev.svc.cluster.local", server=server).values == ["10.244.77.11", "10.244.77.12"]
        assert dig(lab, "web.dev.svc.cluster.local", server=server).values == ["10.96.1.1"]


def test_a_pod_that_is_deleted_still_answers_for_a_while(lab: Lab) -> None:
    """Between losing its endpoint and its end a pod answers (lameduck), so that a rolling restart loses nothing."""
    name = dns_pods(lab)[0]["metadata"]["name"]
    seen = ask_while(lab, lambda: lab.api.delete("pods", "kube-system", name), seconds=2)
    assert seen == {"10.96.1.1"}
    wait_until(lambda: len(dns_addresses(lab)) == 2)


def test_health_and_metrics(lab: Lab) -> None:
    """The ports of CoreDNS: health, readiness, and counters that grow."""
    address = dns_addresses(lab)[0]

    def get(port: int, path: str) -> str:
        return lab.run(
            "node1", ["curl", "-sS", "-m", "5", f"http://{address}:{port}{path}"], timeout_s=10
        ).stdout.decode()

    assert get(8080, "/health") == "OK"
    assert get(8181, "/ready") == "OK"

    def requests() -> int:
        return int(re.search(r"^coredns_dns_requests_total (\d+)$", get(9153, "/metrics"), re.MULTILINE)[1])  # type: ignore[index]

    before = requests()
    dig(lab, "web.dev.svc.cluster.local", server=address)
    dig(lab, "web.dev.svc.cluster.local", "SRV", server=address)
    assert requests() >= before + 2


def test_a_lab_without_cluster_dns(tmp_path: Path) -> None:
    """`dns: none`: no pods of DNS, and pods get the node's resolv.conf with the kubelet's own warning."""
    text = TOPOLOGY.read_text().replace("dns: 10.96.0.10", "dns: none")
    (tmp_path / "none.yaml").write_text(text)
    with start_lab(
        load_topology(tmp_path / "none.yaml"), name=f"nodns-{os.getpid()}", proxy_mode="iptables", attached=True
    ) as lab:
        assert dns_pods(lab) == []
        lab.api.create(namespace("dev"))
        lab.api.create(pod("client"))
        wait_ready(lab, "dev", "client")
        assert lab.run("dev/client", ["cat", "/etc/resolv.conf"], timeout_s=5).stdout.decode() == OF_THE_NODE
        said = [
            event["message"] for event in lab.api.list("events", "dev")[0] if event["reason"] == "MissingClusterDNS"
        ]
        assert said == [
            'kubelet does not have ClusterDNS IP configured and cannot create Pod using "ClusterFirst" policy. Falling back to "Default" policy.'
        ]
