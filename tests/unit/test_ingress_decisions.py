"""What the ingress generator decides: whose Ingress, which endpoints, which certificate, which address; the quick way too."""

# ruff: noqa: E501  # tables

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from ingress_objects import (
    CLASS,
    OPTIONS,
    Object,
    conf,
    document,
    ingress,
    key_pair,
    secret,
    service,
    settings,
    slices,
    tls_secret,
)  # fmt: skip

from testbed.dataplane.ingress.endpoints import same_but_for_endpoints, with_endpoints
from testbed.dataplane.ingress.render import Renderer, render
from testbed.dataplane.ingress.secrets import FOLDER
from testbed.dataplane.ingress.secrets import key_pair as read_key_pair
from testbed.dataplane.ingress.settings import Options, parse_options, parse_settings
from testbed.dataplane.ingress.status import published_addresses
from testbed.dataplane.ingress.translate import translate
from testbed.dataplane.ingress.world import World, endpoint_addresses, is_ours, service_port
from testbed.errors import InputError

ROOT = [("/", "Prefix", "a")]
A = [service("a"), slices("a", "10.0.0.1", "10.0.0.2")]


@pytest.mark.parametrize(
    ("ingress_class", "annotation", "options", "ours"),
    [
        ("nginx", "", {}, True),
        ("traefik", "", {}, False),
        ("no-such-class", "", {}, False),
        ("no-such-class", "", {"ingress_class_by_name": True, "ingress_class": "no-such-class"}, True),
        (None, "nginx", {}, True),
        (None, "other", {}, False),
        (None, "", {}, False),
        (None, "", {"watch_ingress_without_class": True}, True),
        ("nginx", "", {"watch_namespace": "prod"}, False),
    ],
)
def test_whose_ingress_it_is(ingress_class: str | None, annotation: str, options: dict[str, Any], ours: bool) -> None:
    """By class, else by the old annotation, else only when asked for."""
    shown = {"kubernetes.io/ingress.class": annotation} if annotation else {}
    one = ingress("x", {"a.com": ROOT}, shown, ingress_class=ingress_class)
    other = {**CLASS, "metadata": {"name": "traefik"}, "spec": {"controller": "traefik.io/x"}}
    world = World.of([CLASS, other, one])
    assert is_ours(one, world.classes, replace(OPTIONS, **options)) is ours


@pytest.mark.parametrize(
    ("wanted", "found"), [("80", "http"), ("8443", "tls"), ("web", "tls"), ("http", "http"), ("81", None), ("53", None)]
)
def test_a_service_port_is_meant_by_number_target_or_name(wanted: str, found: str | None) -> None:
    """The first port that fits, TCP only."""
    ports = [
        {"name": "http", "port": 80, "targetPort": 8080}, {"name": "tls", "port": 443, "targetPort": 8443},
        {"name": "web", "port": 90}, {"name": "dns", "port": 53, "protocol": "UDP"},
    ]  # fmt: skip
    ports[1]["targetPort"] = "web" if wanted == "web" else 8443
    port = service_port(ports, wanted)
    assert (port or {}).get("name") == found


def test_endpoints_are_the_ready_ones_of_all_slices_in_order() -> None:
    """Not ready ones are left out, unknown counts as ready, addresses are sorted as numbers, each once."""
    unknown = slices("a", "10.0.0.20")
    unknown["endpoints"][0]["conditions"] = {}
    many = [slices("a", "10.0.0.9", "10.0.0.10", not_ready="10.0.0.9"), unknown, slices("a", "10.0.0.10", "10.0.0.2")]
    assert endpoint_addresses(many, {"name": "http"}) == ("10.0.0.2:8080", "10.0.0.10:8080", "10.0.0.20:8080")
    assert endpoint_addresses(many, {"name": "other"}) == ()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "a.localhost", "", "bad name", 'x"; }'])
def test_an_external_name_may_not_lead_home(name: str) -> None:
    """ExternalName to this machine, or to no name at all, answers 503."""
    far = service("far", type="ExternalName", externalName=name, ports=[{"name": "http", "port": 80}])
    assert "return 503;" in conf(far, ingress("x", {"a.com": [("/", "Prefix", "far")]}))


def test_the_oldest_ingress_wins_a_path() -> None:
    """Of two with one host and path the older serves, whatever their names; the younger's other paths do too."""
    young = ingress("a", {"a.com": [("/", "Prefix", "b"), ("/b", "Prefix", "b")]}, created=9)
    made = document(*A, service("b"), slices("b", "10.0.1.1"), young, ingress("z", {"a.com": ROOT}, created=1))
    server = next(one for one in made.servers if one.host == "a.com")
    assert {one.uri: one.backend.service for one in server.locations} == {"/": "a", "/b/": "b", "/b": "b"}
    assert any("already defined in ingress dev/z" in note for _, note in made.notes)


def test_namespaces_do_not_mix() -> None:
    """Two backends whose names would read the same have an upstream each."""
    first = [
        service("c", namespace="a-b"),
        slices("c", "10.0.0.1", namespace="a-b"),
        ingress("x", {"x.com": [("/", "Prefix", "c")]}, namespace="a-b"),
    ]
    second = [
        service("b-c", namespace="a"),
        slices("b-c", "10.0.0.2", namespace="a"),
        ingress("y", {"y.com": [("/", "Prefix", "b-c")]}, namespace="a"),
    ]
    made = document(*first, *second)
    assert len([one for one in made.upstreams if one.name.startswith("a-b-c-80")]) == 2


# --- certificates -------------------------------------------------------------------------------------------------------


def test_a_key_of_another_certificate_is_no_pair() -> None:
    """Broken, missing and foreign keys give no certificate, and no error."""
    _, certificate, _ = key_pair("a.com")
    _, _, other = key_pair("b.com")
    assert read_key_pair(secret("s", {"tls.crt": certificate, "tls.key": other})) is None
    assert read_key_pair(secret("s", {"tls.crt": b"x", "tls.key": b"y"})) is None
    assert read_key_pair(secret("s", {})) is None and read_key_pair(None) is None
    assert read_key_pair({**tls_secret("s", "a.com"), "data": {"tls.crt": "%%", "tls.key": "%%"}}) is None
    found = read_key_pair(tls_secret("s", "*.a.com"))
    assert found is not None and found.covers("x.a.com") and not found.covers("a.com") and not found.covers("x.y.a.com")


def test_files_are_named_by_their_content() -> None:
    """No part of a path comes from a name that a user chose; what is in the file is PEM and nothing else."""
    pair = tls_secret("s", "a.com")
    made = document(*A, pair, ingress("x", {"a.com": ROOT}, tls=[{"hosts": ["a.com"], "secretName": "s"}]))
    (path,) = made.files
    assert path.startswith(f"{FOLDER}/") and path.endswith(".pem") and len(path) == len(FOLDER) + 37
    assert made.files[path].startswith(b"-----BEGIN CERTIFICATE-----")


def test_secrets_of_other_namespaces_are_closed() -> None:
    """A reference over the border closes the location, unless the ConfigMap allows it."""
    users = secret("users", {"auth": b"ann:x\n"}, namespace="other")
    one = ingress("x", {"a.com": ROOT}, {"auth-type": "basic", "auth-secret": "other/users"})
    assert "auth_basic " not in conf(*A, users, one) and "return 503;" in conf(*A, users, one)
    assert "auth_basic " in conf(*A, users, one, settings(allow_cross_namespace_resources="true"))


# --- addresses ----------------------------------------------------------------------------------------------------------


def node(name: str, internal: str, external: str = "") -> Object:
    addresses = [
        {"type": "InternalIP", "address": internal},
        *([{"type": "ExternalIP", "address": external}] if external else []),
    ]
    return {"metadata": {"name": name}, "status": {"addresses": addresses}}


def pod(name: str, on: str, *, ready: bool = True) -> Object:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"name": name},
        "spec": {"nodeName": on},
        "status": {"phase": "Running", "conditions": conditions},
    }


PODS = [pod("a", "n1"), pod("b", "n2"), pod("c", "n3", ready=False), pod("d", "n1")]
NODES = [node("n1", "10.0.0.1", "192.0.2.1"), node("n2", "10.0.0.2"), node("n3", "10.0.0.3")]
SHARED = {"publish_service": "dev/a"}


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        ({"publish_status_address": "192.0.2.9, lb.example.com"}, {}, [{"ip": "192.0.2.9"}, {"hostname": "lb.example.com"}]),
        (SHARED, {"type": "LoadBalancer", "externalIPs": ["192.0.2.7"]}, [{"ip": "192.0.2.7"}, {"ip": "192.168.93.232"}]),
        (SHARED, {"type": "ClusterIP"}, [{"ip": "10.96.0.9"}]),
        (SHARED, {"type": "NodePort"}, [{"ip": "10.96.0.9"}]),
        (SHARED, {"type": "NodePort", "externalIPs": ["192.0.2.7"]}, [{"ip": "192.0.2.7"}]),
        (SHARED, {"type": "ExternalName", "externalName": "lb.example.com"}, [{"hostname": "lb.example.com"}]),
        (SHARED, {"clusterIP": "None"}, []),
        ({"publish_service": "dev/none"}, {}, []),
        ({}, {}, [{"ip": "10.0.0.2"}, {"ip": "192.0.2.1"}]),
        ({"report_node_internal_ip_address": True}, {}, [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]),
    ],
)  # fmt: skip
def test_published_addresses(options: dict[str, Any], fields: dict[str, Any], expected: list[Object]) -> None:
    """Each source of addresses that the reference lists."""
    shown = service("a", **fields)
    shown["status"] = {"loadBalancer": {"ingress": [{"ip": "192.168.93.232"}]}}
    assert published_addresses(Options(**options), {("dev", "a"): shown}, PODS, NODES) == expected


# --- command line, ConfigMap ---------------------------------------------------------------------------------------------


def test_flags() -> None:
    """Those of the stock manifest are understood, and what has no meaning here is accepted; others are mistakes."""
    options = parse_options(
        [
            "--publish-service=a/b",
            "--election-id=x",
            "--enable-metrics=false",
            "--validating-webhook-key=/k",
            "--v",
            "2",
            "--http-port",
            "8080",
        ]
    )
    assert (options.publish_service, options.election_id, options.enable_metrics, options.http_port) == (
        "a/b",
        "x",
        False,
        8080,
    )
    for words, said in (
        (["--nonsense"], "unknown flag: --nonsense"), (["--configmap=x"], "must be NAMESPACE/NAME"), (["--http-port=x"], "must be a whole number"),
        (["word"], "unexpected argument 'word'"), (["--ingress-class"], "flag needs an argument: --ingress-class"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            parse_options(words)


def test_settings_are_told_of_mistakes() -> None:
    """Unknown keys and wrong values are one line each, and the default is used."""
    found, notes = parse_settings(
        {"proxy-body-size": "9m", "keep-alive": "x", "nonsense": "1", "allow-snippet-annotations": "true"}
    )
    assert found.proxy_body_size == "9m" and found.keep_alive == 75
    assert [note.split(":")[0] for note in notes] == [
        "ConfigMap key 'keep-alive'", "ConfigMap key 'nonsense' is not known and is ignored",
        "allow-snippet-annotations is not honoured",
    ]  # fmt: skip


# --- the quick way for endpoints -----------------------------------------------------------------------------------------


def random_world(seed: int) -> tuple[random.Random, list[Object]]:
    chance = random.Random(seed)
    names = [f"s{number}" for number in range(8)]
    kinds: list[dict[str, str]] = [
        {},
        {},
        {"upstream-hash-by": "$uri"},
        {"affinity": "cookie"},
        {"load-balance": "ewma"},
        {"service-upstream": "true"},
        {"default-backend": "s0"},
    ]
    objects = [service(name) for name in names]
    objects += [
        ingress(
            f"i{number}", {f"h{number % 5}.com": [(f"/{number}", "Prefix", chance.choice(names))]}, chance.choice(kinds)
        )
        for number in range(12)
    ]
    objects += [random_slice(chance, name) for name in names]
    return chance, objects


def random_slice(chance: random.Random, name: str) -> Object:
    return slices(name, *(f"10.0.0.{chance.randrange(1, 30)}" for _ in range(chance.choice((0, 1, 2, 3, 3)))))


@pytest.mark.parametrize("seed", range(30))
def test_the_quick_way_leads_to_the_same_text(seed: int) -> None:
    """Whenever only endpoints changed, and the quick way is taken, the text is that of the long way, byte for byte."""
    chance, objects = random_world(seed)
    world = World.of([CLASS, *objects])
    made = translate(world, OPTIONS)
    renderer, taken = Renderer(), 0
    renderer.render(made)
    for _ in range(20):
        name = f"s{chance.randrange(8)}"
        world.slices[("dev", f"{name}-1")] = random_slice(chance, name)
        whole = translate(world, OPTIONS)
        quick = with_endpoints(made, world, {("dev", name), ("dev", "somebody-elses")})
        taken += quick is not None
        assert renderer.render(quick or whole) == render(whole)
        if quick is not None:
            assert same_but_for_endpoints(made, whole)
        made = quick or whole
    assert taken > 0
