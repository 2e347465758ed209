"""The zone of cluster DNS: every kind of record, names that are not there, and random clusters against a plain model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from dns_model import (
    DOMAIN,
    TTL,
    Cluster,
    clusters,
    endpoint,
    endpoint_slice,
    expected,
    namespace,
    port,
    questions,
    service,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.dataplane.dns import Zone
from testbed.model.dns import Answer, PodMode, Rcode, Record, RecordType, ZoneSettings

SETTINGS = ZoneSettings(ttl=TTL, pods=PodMode.INSECURE, fallthrough=("in-addr.arpa", "ip6.arpa"), server="10.244.9.9")
HTTP = [port("http", 80)]


def zone_of(*objects: dict[str, Any], settings: ZoneSettings = SETTINGS, namespaces: Iterable[str] = ("dev",)) -> Zone:
    zone = Zone(settings)
    for name in namespaces:
        zone.put("namespaces", namespace(name))
    for obj in objects:
        resource = {"Service": "services", "EndpointSlice": "endpointslices.discovery.k8s.io", "Pod": "pods"}[
            obj["kind"]
        ]
        zone.put(resource, obj)
    return zone


def headless(name: str, **spec: Any) -> dict[str, Any]:
    return service(name, clusterIP="None", clusterIPs=["None"], ports=HTTP, **spec)


def at(name: str, address: str, **spec: Any) -> dict[str, Any]:
    return service(name, clusterIP=address, clusterIPs=[address], **{"ports": HTTP, **spec})


def said(answer: Answer) -> str:
    """Return an answer as one line: rcode, then records."""
    return " | ".join([answer.rcode.name, *map(shown, answer.records)])


def shown(record: Record) -> str:
    value = record.value if isinstance(record.value, str) else " ".join(map(str, record.value))
    return f"{record.name} {record.ttl} {record.type.name} {value}"


WEB = at("web", "10.96.0.20", ports=[port("http", 80), port("", 81), port("dns", 53, "UDP")])
DB = headless("db")
DB_SLICE = endpoint_slice(
    "db", endpoint("10.244.1.5", hostname="db-0"), endpoint("10.244.1.6"), endpoint("10.244.1.7", ready=False),
    ports=[port("http", 8080)],
)  # fmt: skip
EXTERNAL = service("ext", type="ExternalName", externalName="Shop.Example.com.")
ALIAS = service("alias", type="ExternalName", externalName=f"db.dev.svc.{DOMAIN}")
LOOP = service("loop", type="ExternalName", externalName=f"loop2.dev.svc.{DOMAIN}")
LOOP2 = service("loop2", type="ExternalName", externalName=f"loop.dev.svc.{DOMAIN}")
DANGLING = service("dangling", type="ExternalName", externalName=f"nothing.dev.svc.{DOMAIN}")


@pytest.mark.parametrize(
    ("question", "kind", "wanted"),
    [
        # Services with a ClusterIP
        ("web.dev.svc.cluster.local.", "A", "NOERROR | web.dev.svc.cluster.local 30 A 10.96.0.20"),
        ("Web.DEV.svc.Cluster.local", "A", "NOERROR | Web.DEV.svc.Cluster.local 30 A 10.96.0.20"),
        ("web.dev.svc.cluster.local", "AAAA", "NOERROR"),
        ("web.dev.svc.cluster.local", "TXT", "NOERROR"),
        ("web.dev.svc.cluster.local", "CNAME", "NOERROR"),
        (
            "_http._tcp.web.dev.svc.cluster.local", "SRV",
            "NOERROR | _http._tcp.web.dev.svc.cluster.local 30 SRV 0 100 80 web.dev.svc.cluster.local",
        ),
        (
            "_dns._UDP.web.dev.svc.cluster.local", "SRV",
            "NOERROR | _dns._UDP.web.dev.svc.cluster.local 30 SRV 0 100 53 web.dev.svc.cluster.local",
        ),
        ("_dns._tcp.web.dev.svc.cluster.local", "SRV", "NXDOMAIN"),
        ("_tcp.web.dev.svc.cluster.local", "SRV", "NXDOMAIN"),
        (
            "web.dev.svc.cluster.local", "SRV",  # all ports, also those without a name
            "NOERROR | web.dev.svc.cluster.local 30 SRV 0 33 80 web.dev.svc.cluster.local"
            " | web.dev.svc.cluster.local 30 SRV 0 33 81 web.dev.svc.cluster.local"
            " | web.dev.svc.cluster.local 30 SRV 0 33 53 web.dev.svc.cluster.local",
        ),
        ("20.0.96.10.in-addr.arpa", "PTR", "NOERROR | 20.0.96.10.in-addr.arpa 30 PTR web.dev.svc.cluster.local"),
        # headless ones
        (
            "db.dev.svc.cluster.local", "A",
            "NOERROR | db.dev.svc.cluster.local 30 A 10.244.1.5 | db.dev.svc.cluster.local 30 A 10.244.1.6",
        ),
        ("db-0.db.dev.svc.cluster.local", "A", "NOERROR | db-0.db.dev.svc.cluster.local 30 A 10.244.1.5"),
        ("10-244-1-6.db.dev.svc.cluster.local", "A", "NOERROR | 10-244-1-6.db.dev.svc.cluster.local 30 A 10.244.1.6"),
        ("10-244-1-5.db.dev.svc.cluster.local", "A", "NXDOMAIN"),  # it has a name instead
        ("10-244-1-7.db.dev.svc.cluster.local", "A", "NXDOMAIN"),  # not ready
        (
            "_http._tcp.db.dev.svc.cluster.local", "SRV",
            "NOERROR | _http._tcp.db.dev.svc.cluster.local 30 SRV 0 50 8080 db-0.db.dev.svc.cluster.local"
            " | _http._tcp.db.dev.svc.cluster.local 30 SRV 0 50 8080 10-244-1-6.db.dev.svc.cluster.local",
        ),
        ("5.1.244.10.in-addr.arpa", "PTR", "NOERROR | 5.1.244.10.in-addr.arpa 30 PTR db-0.db.dev.svc.cluster.local"),
        ("7.1.244.10.in-addr.arpa", "PTR", "NXDOMAIN"),
        ("empty.dev.svc.cluster.local", "A", "NXDOMAIN"),  # headless, nobody is ready
        # aliases
        ("ext.dev.svc.cluster.local", "CNAME", "NOERROR | ext.dev.svc.cluster.local 30 CNAME Shop.Example.com"),
        ("ext.dev.svc.cluster.local", "SRV", "NOERROR"),
        ("ext.dev.svc.cluster.local", "MX", "NOERROR"),
        ("x.ext.dev.svc.cluster.local", "A", "NXDOMAIN"),
        (
            "alias.dev.svc.cluster.local", "A",
            "NOERROR | alias.dev.svc.cluster.local 30 CNAME db.dev.svc.cluster.local"
            " | db.dev.svc.cluster.local 30 A 10.244.1.5 | db.dev.svc.cluster.local 30 A 10.244.1.6",
        ),
        ("alias.dev.svc.cluster.local", "AAAA", "NOERROR"),
        ("loop.dev.svc.cluster.local", "A", "NOERROR"),
        ("dangling.dev.svc.cluster.local", "A", "NOERROR"),
        # pods, by address
        ("10-244-7-7.dev.pod.cluster.local", "A", "NOERROR | 10-244-7-7.dev.pod.cluster.local 30 A 10.244.7.7"),
        ("fd00--1.dev.pod.cluster.local", "AAAA", "NOERROR | fd00--1.dev.pod.cluster.local 30 AAAA fd00::1"),
        ("fd00--1.dev.pod.cluster.local", "A", "NOERROR"),
        ("10-244-7-777.dev.pod.cluster.local", "A", "NXDOMAIN"),
        ("10-244-7-7.nowhere.pod.cluster.local", "A", "NXDOMAIN"),
        # names that only have names below them, and names that are not there
        ("cluster.local", "A", "NOERROR"),
        ("svc.cluster.local", "A", "NOERROR"),
        ("pod.cluster.local", "A", "NOERROR"),
        ("dev.svc.cluster.local", "A", "NOERROR"),
        ("dev.pod.cluster.local", "A", "NOERROR"),
        ("nowhere.svc.cluster.local", "A", "NXDOMAIN"),
        ("dev.other.cluster.local", "A", "NXDOMAIN"),
        ("nothing.dev.svc.cluster.local", "A", "NXDOMAIN"),
        ("a.b.c.web.dev.svc.cluster.local", "A", "NXDOMAIN"),
        ("_under_score.dev.svc.cluster.local", "A", "NXDOMAIN"),
        ("9.9.96.10.in-addr.arpa", "PTR", "NXDOMAIN"),
        ("in-addr.arpa", "PTR", "NOERROR"),
        ("1.0.0.127.ip6.arpa", "PTR", "NXDOMAIN"),
        # the zone itself
        ("dns-version.cluster.local", "TXT", "NOERROR | dns-version.cluster.local 28800 TXT 1.1.0"),
        ("cluster.local", "NS", "NOERROR | cluster.local 30 NS kube-dns.dev.svc.cluster.local"),
        ("ns.dns.cluster.local", "A", "NOERROR | ns.dns.cluster.local 30 A 10.96.0.10"),
        # the world
        ("www.example.com", "A", "SERVFAIL"),
        ("mycluster.local", "A", "SERVFAIL"),
        (".", "NS", "SERVFAIL"),
    ],
)  # fmt: skip
def test_what_a_name_means(question: str, kind: str, wanted: str) -> None:
    """Each row of the specification, and of CoreDNS where that is silent."""
    zone = zone_of(
        WEB, DB, DB_SLICE, EXTERNAL, ALIAS, LOOP, LOOP2, DANGLING, headless("empty"), at("kube-dns", "10.96.0.10"),
        endpoint_slice("kube-dns", endpoint("10.244.9.9")),
    )  # fmt: skip
    assert said(zone.answer(question, {"MX": 15}.get(kind) or RecordType[kind])) == wanted


def test_negative_answers_name_the_zone() -> None:
    """A missing name and a missing type come with the zone's SOA, whose minimum is the TTL."""
    zone = zone_of(WEB)
    for question, kind in (("web.dev.svc.cluster.local", RecordType.AAAA), ("no.dev.svc.cluster.local", RecordType.A)):
        (soa,) = zone.answer(question, kind).authority
        assert shown(soa).startswith("cluster.local 30 SOA ns.dns.cluster.local hostmaster.cluster.local ")
        assert shown(soa).endswith(" 7200 1800 86400 30")
    (soa,) = zone.answer("1.1.1.1.in-addr.arpa", RecordType.PTR).authority
    assert soa.name == "in-addr.arpa"


def test_the_serial_grows_with_every_change() -> None:
    """The SOA's serial tells one state of the zone from the next."""
    zone = zone_of(WEB)
    before = zone.answer("cluster.local", RecordType.SOA).records[0].value
    zone.delete("services", "dev", "web")
    after = zone.answer("cluster.local", RecordType.SOA).records[0].value
    assert after[2] > before[2]


def test_srv_records_bring_the_addresses_of_their_targets() -> None:
    """Beside a SRV answer there is an address for each target, so that nobody needs to ask again."""
    answer = zone_of(DB, DB_SLICE).answer("_http._tcp.db.dev.svc.cluster.local", RecordType.SRV)
    assert [shown(record) for record in answer.additional] == [
        "db-0.db.dev.svc.cluster.local 30 A 10.244.1.5",
        "10-244-1-6.db.dev.svc.cluster.local 30 A 10.244.1.6",
    ]


def test_outside_names_are_for_others() -> None:
    """An alias of an outside name asks for that name; unknown reverse names and the world fall through."""
    zone = zone_of(EXTERNAL)
    assert zone.answer("ext.dev.svc.cluster.local", RecordType.A).outside == "Shop.Example.com"
    assert zone.answer("ext.dev.svc.cluster.local", RecordType.CNAME).outside == ""
    assert zone.answer("www.example.com", RecordType.A).falls_through
    assert zone.answer("1.2.3.4.in-addr.arpa", RecordType.PTR).falls_through
    assert not zone.answer("nothing.cluster.local", RecordType.A).falls_through
    strict = zone_of(settings=ZoneSettings())
    assert not strict.answer("1.2.3.4.in-addr.arpa", RecordType.PTR).falls_through


def test_pods_are_verified_when_that_is_asked_for() -> None:
    """With `pods verified` only the address of a living pod of that namespace has a name; with `disabled` none has."""
    pod = {
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "dev"},
        "status": {"podIP": "10.244.1.5", "phase": "Running"},
    }
    zone = zone_of(pod, settings=ZoneSettings(pods=PodMode.VERIFIED), namespaces=("dev", "prod"))
    assert zone.answer("10-244-1-5.dev.pod.cluster.local", RecordType.A).records
    assert zone.answer("10-244-1-6.dev.pod.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN
    assert zone.answer("10-244-1-5.prod.pod.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN
    zone.put("pods", {**pod, "status": {**pod["status"], "phase": "Succeeded"}})
    assert zone.answer("10-244-1-5.dev.pod.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN
    disabled = zone_of(settings=ZoneSettings())
    assert disabled.answer("10-244-1-5.dev.pod.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN


def test_the_hosts_file() -> None:
    """ClusterIPs first, then ready addresses, each line beginning with the name that its PTR is to give."""
    zone = zone_of(DB_SLICE, DB, WEB, EXTERNAL, headless("empty"), at("api", "10.96.0.1"))
    assert zone.hosts_text() == (
        "10.96.0.1 api.dev.svc.cluster.local\n"
        "10.96.0.20 web.dev.svc.cluster.local\n"
        "10.244.1.5 db-0.db.dev.svc.cluster.local db.dev.svc.cluster.local\n"
        "10.244.1.6 10-244-1-6.db.dev.svc.cluster.local db.dev.svc.cluster.local\n"
    )


def test_services_that_share_an_address_are_not_in_the_hosts_file() -> None:
    """A hosts file gives one PTR to an address, which has one for each Service: then both Services are left to the zone,
    and come back when the address is one Service's alone again."""
    zone = zone_of(DB, DB_SLICE, headless("db2"))
    alone = zone.hosts_text()
    shared = endpoint_slice("db2", endpoint("10.244.1.5"))
    zone.put("endpointslices.discovery.k8s.io", shared)
    assert zone.hosts_text() == ""
    assert said(zone.answer("5.1.244.10.in-addr.arpa", RecordType.PTR)) == (
        "NOERROR | 5.1.244.10.in-addr.arpa 30 PTR db-0.db.dev.svc.cluster.local"
        " | 5.1.244.10.in-addr.arpa 30 PTR 10-244-1-5.db2.dev.svc.cluster.local"
    )
    zone.delete("endpointslices.discovery.k8s.io", "dev", "db2-1")
    assert zone.hosts_text() == alone


def test_a_slice_that_changes_its_service() -> None:
    """The label decides whose slice it is, also when it changes."""
    zone = zone_of(DB, DB_SLICE, headless("db2"))
    zone.put(
        "endpointslices.discovery.k8s.io",
        {**DB_SLICE, "metadata": {**DB_SLICE["metadata"], "labels": {"kubernetes.io/service-name": "db2"}}},
    )
    assert zone.answer("db.dev.svc.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN
    assert len(zone.answer("db2.dev.svc.cluster.local", RecordType.A).records) == 2


def ask_both(zone: Zone, hosts: str, question: str, kind: str) -> tuple[str, set[str]]:
    """Return what dnsmasq with that hosts file and the zone behind it say together, as dnsmasq(8) says it works."""
    name = question.lower()
    lines = [line.split() for line in hosts.splitlines()]
    if kind == "A" and (found := {address for address, *names in lines if name in names}):
        return "NOERROR", found
    if kind == "PTR":
        address = ".".join(reversed(name.removesuffix(".in-addr.arpa").split(".")))
        first = next((names[0] for found, *names in lines if found == address), "")
        if first:
            return "NOERROR", {first}
    answer = zone.answer(question, RecordType[kind])
    values = set()
    for record in answer.records:
        if record.type is RecordType.SRV:
            values.add(f"{record.value[2]} {record.value[3]}")
        elif record.type is RecordType[kind]:
            values.add(f'"{record.value}"' if kind == "TXT" else str(record.value))
    return answer.rcode.name, values


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(clusters, min_size=1, max_size=3))
def test_random_clusters(sequence: list[Cluster]) -> None:
    """Whatever the objects, and whatever they were before, hosts file and zone together say what the specification says."""
    zone = Zone(SETTINGS)
    for cluster in sequence:
        for resource, objects in cluster.listed().items():
            zone.replace(resource, objects)
        hosts = zone.hosts_text()
        fresh = Zone(SETTINGS)
        for resource, objects in reversed(cluster.listed().items()):
            fresh.replace(resource, objects)
        assert fresh.hosts_text() == hosts
        for question, kind in questions(cluster):
            assert ask_both(zone, hosts, question, kind) == expected(cluster, question, kind), (question, kind)
    for resource in sequence[-1].listed():
        zone.replace(resource, [])
    assert zone.hosts_text() == ""
    assert zone.answer("dev.svc.cluster.local", RecordType.A).rcode is Rcode.NXDOMAIN
