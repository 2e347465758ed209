"""Services through the registry: Kubernetes' refusals word for word, allocation, defaults, changes of type."""

# ruff: noqa: E501 (a row of a table is one line, so that whole texts can be compared and searched)

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_support import CONFIG, make_registry, refusal, service

from testbed.errors import ApiError
from testbed.model.json_values import copy_value
from testbed.model.objects import Object
from testbed.registry import Registry

NO_NAME = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an "
    "alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)
PORT_RANGE = "must be between 1 and 65535, inclusive"
NODE_PORTS = "provided port is not in the valid range. The range of valid ports is 30000-32767"


@pytest.fixture
def registry() -> Registry:
    """A registry in which 10.96.1.10 and node port 30888 are taken."""
    registry = make_registry()
    registry.create(
        "services", service("taken", type="NodePort", clusterIP="10.96.1.10", ports=[{"port": 80, "nodePort": 30888}])
    )
    return registry


def port(**fields: Any) -> list[dict[str, Any]]:
    return [{"port": 80, **fields}]


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        pytest.param(service(type="NodePort", ports=port(nodePort=80)), f"spec.ports[0].nodePort: Invalid value: 80: {NODE_PORTS}", id="nodePort outside the range"),
        pytest.param(service(type="NodePort", ports=port(nodePort=30888)), "spec.ports[0].nodePort: Invalid value: 30888: provided port is already allocated", id="nodePort taken"),
        pytest.param(service(ports=port(nodePort=30999)), "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'", id="nodePort of a ClusterIP Service"),
        pytest.param(service(clusterIP="10.96.1.10"), 'spec.clusterIPs: Invalid value: []string{"10.96.1.10"}: failed to allocate IP 10.96.1.10: provided IP is already allocated', id="clusterIP taken"),
        pytest.param(service(clusterIP="10.1.1.1"), 'spec.clusterIPs: Invalid value: []string{"10.1.1.1"}: failed to allocate IP 10.1.1.1: the provided IP (10.1.1.1) is not in the valid range. The range of valid IPs is 10.96.0.0/22', id="clusterIP outside the range"),
        pytest.param(service(clusterIP="10.96.3.255"), 'spec.clusterIPs: Invalid value: []string{"10.96.3.255"}: failed to allocate IP 10.96.3.255: the provided IP (10.96.3.255) is not in the valid range. The range of valid IPs is 10.96.0.0/22', id="the broadcast address"),
        pytest.param(service(clusterIP="10.96.1"), 'spec.clusterIPs[0]: Invalid value: "10.96.1": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)', id="clusterIP malformed"),
        pytest.param(service(type="NodePort", clusterIP="None"), "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services", id="headless NodePort"),
        pytest.param(service(type="LoadBalancer", clusterIP="None"), "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for LoadBalancer services", id="headless LoadBalancer"),
        pytest.param(service(ports=[]), "spec.ports: Required value", id="no ports"),
        pytest.param(service(ports=[{"port": 80}, {"port": 81}]), "[spec.ports[0].name: Required value, spec.ports[1].name: Required value]", id="two unnamed ports"),
        pytest.param(service(ports=[{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]), 'spec.ports[1]: Duplicate value: core.ServicePort{Name:"", Protocol:"TCP", AppProtocol:(*string)(nil), Port:80, TargetPort:intstr.IntOrString{Type:0, IntVal:0, StrVal:""}, NodePort:0}', id="one port twice"),
        pytest.param(service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]), 'spec.ports[1].name: Duplicate value: "a"', id="one port name twice"),
        pytest.param(service(ports=[{"port": 70000, "targetPort": 80}]), f"spec.ports[0].port: Invalid value: 70000: {PORT_RANGE}", id="port 70000"),
        pytest.param(service(ports=[{"port": 0, "targetPort": 80}]), f"spec.ports[0].port: Invalid value: 0: {PORT_RANGE}", id="port 0"),
        pytest.param(service(ports=port(targetPort="a_b")), 'spec.ports[0].targetPort: Invalid value: "a_b": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)', id="bad targetPort name"),
        pytest.param(service(ports=port(protocol="ICMP")), 'spec.ports[0].protocol: Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP"', id="bad protocol"),
        pytest.param(service(type="X"), 'spec.type: Unsupported value: "X": supported values: "ClusterIP", "ExternalName", "LoadBalancer", "NodePort"', id="bad type"),
        pytest.param(service(sessionAffinity="Cookie"), 'spec.sessionAffinity: Unsupported value: "Cookie": supported values: "ClientIP", "None"', id="bad affinity"),
        pytest.param(service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 90000}}), "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 90000: must be greater than 0 and less than 86400", id="affinity of more than a day"),
        pytest.param(service(externalTrafficPolicy="Local"), 'spec.externalTrafficPolicy: Invalid value: "Local": may only be set for externally-accessible services', id="externalTrafficPolicy of a ClusterIP Service"),
        pytest.param(service(type="NodePort", externalTrafficPolicy="X"), 'spec.externalTrafficPolicy: Unsupported value: "X": supported values: "Cluster", "Local"', id="bad externalTrafficPolicy"),
        pytest.param(service(internalTrafficPolicy="X"), 'spec.internalTrafficPolicy: Unsupported value: "X": supported values: "Cluster", "Local"', id="bad internalTrafficPolicy"),
        pytest.param(service("1svc"), f'metadata.name: Invalid value: "1svc": {NO_NAME}', id="name starts with a digit"),
        pytest.param(service("My_svc"), f'metadata.name: Invalid value: "My_svc": {NO_NAME}', id="name with capitals"),
        pytest.param(service("web\n"), f'metadata.name: Invalid value: "web\\n": {NO_NAME}', id="name with a newline"),
        pytest.param(service("../x"), f'metadata.name: Invalid value: "../x": {NO_NAME}', id="name that is a path"),
        pytest.param(service("a;reboot"), f'metadata.name: Invalid value: "a;reboot": {NO_NAME}', id="name for a shell"),
        pytest.param(service(type="ExternalName"), "spec.externalName: Required value", id="ExternalName without a name"),
        pytest.param(service(type="ExternalName", externalName="x", clusterIP="10.96.1.11"), "spec.clusterIPs: Forbidden: may not be set for ExternalName services", id="ExternalName with an address"),
        pytest.param(service(externalIPs=["127.0.0.1"]), 'spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)', id="loopback external IP"),
        pytest.param(service(externalIPs=["x"]), 'spec.externalIPs[0]: Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)', id="malformed external IP"),
        pytest.param(service(loadBalancerSourceRanges=["10.0.0.0/8"]), "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'", id="source ranges of a ClusterIP Service"),
        pytest.param(service(type="LoadBalancer", loadBalancerSourceRanges=["10.0.0.0"]), 'spec.LoadBalancerSourceRanges[0]: Invalid value: "10.0.0.0": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)', id="malformed source range"),
        pytest.param(service(loadBalancerClass="a/b"), "spec.loadBalancerClass: Forbidden: may only be used when `type` is 'LoadBalancer'", id="loadBalancerClass of a ClusterIP Service"),
        pytest.param(service(ipFamilies=["IPv6"]), 'spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster', id="IPv6"),
        pytest.param(service(ipFamilyPolicy="RequireDualStack"), 'spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services', id="dual stack"),
        pytest.param(service(clusterIP="fd00::1"), 'spec.clusterIPs[0]: Invalid value: []string{"fd00::1"}: IPv6 is not configured on this cluster', id="an IPv6 clusterIP"),
        pytest.param(service(healthCheckNodePort=30999), "spec.healthCheckNodePort: Invalid value: 30999: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'", id="health check port without need"),
        pytest.param(service(selector={"a b": "c"}), "spec.selector: Invalid value: \"a b\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')", id="bad selector key"),
    ],
)  # fmt: skip
def test_refused_in_kubernetes_words(registry: Registry, manifest: Object, text: str) -> None:
    """A wrong Service is refused with the text of a real API server, and nothing is stored or taken."""
    before, revision = registry.list("services"), registry.store.revision
    error = refusal(registry.create, "services", manifest)
    name = manifest["metadata"]["name"]
    assert str(error) == f'Service "{name}" is invalid: {text}'
    assert (error.code, error.reason, error.details["kind"]) == (422, "Invalid", "Service")
    joined = ", ".join(map(str, error.causes))
    assert text == (joined if len(error.causes) == 1 else f"[{joined}]"), "the causes carry the same"
    assert registry.list("services") == before
    assert registry.store.revision == revision


def test_the_cluster_ip_may_not_change(registry: Registry) -> None:
    """A Service keeps its address for life."""
    registry.create("services", service(clusterIP="10.96.1.20"))
    error = refusal(registry.update, "services", service(clusterIP="10.96.1.21"))
    assert str(error) == (
        'Service "web" is invalid: spec.clusterIPs[0]: Invalid value: []string{"10.96.1.21"}: may not change once set'
    )
    assert registry.get("services", "dev", "web")["spec"]["clusterIP"] == "10.96.1.20"


def test_wrong_types_are_bad_requests(registry: Registry) -> None:
    """A value of the wrong type is a 400 that names the field as Go does."""
    error = refusal(registry.create, "services", service(ports=[{"port": "80"}]))
    assert str(error) == (
        'Service in version "v1" cannot be handled as a Service: json: cannot unmarshal string into Go struct field '
        "ServicePort.spec.ports.port of type int32"
    )
    assert (error.code, error.reason) == (400, "BadRequest")
    error = refusal(registry.create, "services", {**service(), "spec": {"ports": "x"}})
    assert str(error).endswith(
        "json: cannot unmarshal string into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort"
    )


def test_names_absent_taken_and_namespaces_missing(registry: Registry) -> None:
    """Missing namespaces, taken names and absent objects have Kubernetes' texts and codes."""
    for call, code, text in (
        (lambda: registry.create("services", service(namespace="nope")), 404, 'namespaces "nope" not found'),
        (lambda: registry.create("services", service("taken")), 409, 'services "taken" already exists'),
        (lambda: registry.get("services", "dev", "nope"), 404, 'services "nope" not found'),
        (lambda: registry.delete("services", "dev", "nope"), 404, 'services "nope" not found'),
    ):
        error = refusal(call)
        assert (error.code, str(error)) == (code, text)


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_of_a_minimal_service(registry: Registry) -> None:
    """A Service with a port and nothing else comes back with every default of a single-stack IPv4 cluster."""
    spec = registry.create("services", service(selector={"app": "web"}))["spec"]
    address = spec.pop("clusterIP")
    assert IPv4Address(address) in CONFIG.service_cidr
    assert spec == {
        "type": "ClusterIP",
        "clusterIPs": [address],
        "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
        "selector": {"app": "web"},
        "sessionAffinity": "None",
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
    }


def test_defaults_that_depend_on_other_fields(registry: Registry) -> None:
    """Affinity gets three hours, LoadBalancer with Local a health check port, a headless selectorless Service both families."""
    sticky = registry.create("services", service("a", sessionAffinity="ClientIP"))["spec"]
    assert sticky["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}
    local = registry.create("services", service("b", type="LoadBalancer", externalTrafficPolicy="Local"))["spec"]
    assert 30086 <= local["healthCheckNodePort"] <= 32767
    assert local["healthCheckNodePort"] != local["ports"][0]["nodePort"]
    assert local["allocateLoadBalancerNodePorts"] is True
    headless = registry.create("services", service("c", clusterIP="None"))["spec"]
    assert (headless["clusterIPs"], headless["ipFamilies"], headless["ipFamilyPolicy"]) == (
        ["None"], ["IPv4", "IPv6"], "RequireDualStack",
    )  # fmt: skip
    selecting = registry.create("services", service("d", clusterIP="None", selector={"a": "b"}))["spec"]
    assert (selecting["ipFamilies"], selecting["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")
    reachable = registry.create("services", service("e", externalIPs=["192.0.2.1"]))["spec"]
    assert reachable["externalTrafficPolicy"] == "Cluster"


def test_unknown_fields_and_nulls_are_dropped(registry: Registry) -> None:
    """As in Kubernetes, a field that a Service does not have is not stored, and null means absent."""
    stored = registry.create("services", service(foo=1, selector=None))
    assert "foo" not in stored["spec"] and "selector" not in stored["spec"]


# --- allocation ------------------------------------------------------------------------------------------------------


def addresses(registry: Registry, count: int) -> list[IPv4Address]:
    created = [registry.create("services", service(f"s{number}")) for number in range(count)]
    return [IPv4Address(obj["spec"]["clusterIP"]) for obj in created]


def test_dynamic_addresses_come_from_the_upper_band() -> None:
    """In a /22 the first 64 addresses are left for people; all dynamic ones are above, and none twice (KEP-3070)."""
    found = addresses(make_registry(), 200)
    assert min(found) >= IPv4Address("10.96.0.65")
    assert max(found) <= IPv4Address("10.96.3.254")
    assert len(set(found)) == 200
    assert found != sorted(found), "the start is random"


def test_people_may_ask_for_an_address_of_either_band(registry: Registry) -> None:
    """A static address may come from the lower and from the upper band, and is free again after deletion."""
    for name, address in (("low", "10.96.0.10"), ("high", "10.96.2.29")):
        assert registry.create("services", service(name, clusterIP=address))["spec"]["clusterIPs"] == [address]
    registry.delete("services", "dev", "low")
    assert registry.create("services", service("again", clusterIP="10.96.0.10"))["spec"]["clusterIP"] == "10.96.0.10"


@pytest.mark.parametrize("cidr", ["10.96.0.0/28", "10.96.0.0/27"])
def test_a_full_upper_band_falls_to_the_lower_and_a_full_range_says_so(cidr: str) -> None:
    """Small ranges are used up to the last address; the next Service gets upstream's text and is not stored."""
    network = IPv4Network(cidr)
    registry = make_registry(replace(CONFIG, service_cidr=network))
    found = addresses(registry, network.num_addresses - 2)
    assert sorted(found) == list(network.hosts())
    if network.prefixlen == 27:
        assert min(found[:14]) == IPv4Address("10.96.0.17"), "the sixteen lower ones are the last to go"
    error = refusal(registry.create, "services", service("more"))
    assert str(error) == "Internal error occurred: failed to allocate a serviceIP: range is full"
    registry.delete("services", "dev", "s3")
    assert registry.create("services", service("more"))["spec"]["clusterIP"] == str(found[3])


def test_node_ports_of_both_bands() -> None:
    """Automatic node ports start at 30086; 30000 can be asked for; a deleted Service gives its port back (KEP-3668)."""
    registry = make_registry()
    chosen = [
        registry.create("services", service(f"s{number}", type="NodePort"))["spec"]["ports"][0]["nodePort"]
        for number in range(100)
    ]
    assert min(chosen) >= 30086 and max(chosen) <= 32767 and len(set(chosen)) == 100
    asked = service("asked", type="NodePort", ports=[{"port": 80, "nodePort": 30000}])
    assert registry.create("services", asked)["spec"]["ports"][0]["nodePort"] == 30000
    registry.delete("services", "dev", "asked")
    registry.create("services", asked)


def test_one_node_port_for_tcp_and_udp_of_one_service() -> None:
    """TCP and UDP of one port number share a node port, asked for or not; another Service cannot have it."""
    registry = make_registry()
    both = [{"port": 53, "name": "t"}, {"port": 53, "name": "u", "protocol": "UDP"}]
    given_ports = [
        item["nodePort"]
        for item in registry.create("services", service("a", type="NodePort", ports=both))["spec"]["ports"]
    ]
    assert given_ports[0] == given_ports[1]
    asked = [{**item, "nodePort": 30053} for item in both]
    registry.create("services", service("b", type="NodePort", ports=asked))
    other = service("c", type="NodePort", ports=[{"port": 1, "protocol": "UDP", "nodePort": 30053}])
    assert "provided port is already allocated" in str(refusal(registry.create, "services", other))


def test_a_refused_service_takes_nothing(registry: Registry) -> None:
    """What a refused request had claimed is free for the next one."""
    wrong = service(type="NodePort", clusterIP="10.96.2.2", ports=[{"port": 80, "nodePort": 30222, "protocol": "X"}])
    refusal(registry.create, "services", wrong)
    wrong["spec"]["ports"][0]["protocol"] = "TCP"
    registry.create("services", wrong)


def test_dry_run_allocates_and_stores_nothing(registry: Registry) -> None:
    """A dry run shows an address, and leaves it to the next who asks."""
    shown = registry.create("services", service(clusterIP="10.96.2.2"), dry_run=True)
    assert shown["spec"]["clusterIP"] == "10.96.2.2"
    registry.create("services", service("other", clusterIP="10.96.2.2"))
    assert registry.store.get("services", "dev", "web") is None


# --- updates ---------------------------------------------------------------------------------------------------------


def test_a_put_without_allocated_fields_keeps_them(registry: Registry) -> None:
    """A client that writes back only what it knows keeps address and node ports."""
    was = registry.create("services", service(type="NodePort"))["spec"]
    now = registry.update("services", service(type="NodePort", selector={"a": "b"}))["spec"]
    assert now == {**was, "selector": {"a": "b"}}


CHANGES = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]


@pytest.mark.parametrize("before", CHANGES)
@pytest.mark.parametrize("after", CHANGES)
def test_changes_of_type_keep_and_clear_the_right_fields(registry: Registry, before: str, after: str) -> None:
    """Between any two types: the address stays unless ExternalName is involved, node ports stay while they are needed."""
    extra = {"externalTrafficPolicy": "Local", "loadBalancerClass": "x.io/y"} if before == "LoadBalancer" else {}
    was = registry.create("services", service(type=before, externalName="example.com", **extra))
    if before == "LoadBalancer":
        registry.patch(
            "services",
            "dev",
            "web",
            {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}},
            subresource="status",
        )
    stored = registry.patch("services", "dev", "web", {"spec": {"type": after}})
    spec = stored["spec"]
    has_address, has_node_port = after != "ExternalName", after in ("NodePort", "LoadBalancer")
    assert ("clusterIP" in spec, "clusterIPs" in spec, "ipFamilies" in spec) == (has_address,) * 3
    if "ExternalName" not in (before, after):
        assert spec["clusterIP"] == was["spec"]["clusterIP"]
    assert ("nodePort" in spec["ports"][0]) == has_node_port
    if has_node_port and "nodePort" in was["spec"]["ports"][0]:
        assert spec["ports"][0]["nodePort"] == was["spec"]["ports"][0]["nodePort"]
    assert ("externalTrafficPolicy" in spec) == has_node_port
    assert ("healthCheckNodePort" in spec) == (before == after == "LoadBalancer")
    assert ("loadBalancerClass" in spec) == (before == after == "LoadBalancer")
    assert bool(stored["status"]["loadBalancer"]) == (before == after == "LoadBalancer")
    freed = was["spec"].get("clusterIP")
    if after == "ExternalName" and before != "ExternalName":
        registry.create("services", service("next", clusterIP=freed))
    registry.delete("services", "dev", "web")
    again = was["spec"]["ports"][0].get("nodePort")
    if again:
        registry.create("services", service("last", type="NodePort", ports=[{"port": 80, "nodePort": again}]))


def test_the_class_of_a_load_balancer_stays(registry: Registry) -> None:
    """loadBalancerClass is fixed for as long as the Service is a LoadBalancer."""
    registry.create("services", service(type="LoadBalancer", loadBalancerClass="x.io/y"))
    error = refusal(registry.patch, "services", "dev", "web", {"spec": {"loadBalancerClass": "x.io/z"}})
    assert (
        str(error)
        == 'Service "web" is invalid: spec.loadBalancerClass: Invalid value: "x.io/z": may not change once set'
    )


def test_status_of_a_load_balancer(registry: Registry) -> None:
    """The status subresource changes the status alone, defaults ipMode, and checks the addresses."""
    was = registry.create("services", service(type="LoadBalancer"))
    status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}
    stored = registry.update("services", {**was, "spec": {}, "status": status}, subresource="status")
    assert stored["spec"] == was["spec"]
    assert stored["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.9", "ipMode": "VIP"}]
    kept = registry.update("services", {**stored, "status": {}})
    assert kept["status"] == stored["status"], "a write of the object leaves the status"
    wrong = {"status": {"loadBalancer": {"ingress": [{"ip": "x"}]}}}
    assert "must be a valid IP address" in str(
        refusal(registry.patch, "services", "dev", "web", wrong, subresource="status")
    )


# --- anything at all -------------------------------------------------------------------------------------------------

VALID: list[Object] = [
    service(type="LoadBalancer", externalTrafficPolicy="Local", selector={"a": "b"}, sessionAffinity="ClientIP", externalIPs=["192.0.2.7"]),
    service(ports=[{"port": 80, "name": "a", "targetPort": "http"}, {"port": 81, "name": "b", "protocol": "UDP"}], clusterIP="10.96.0.9"),
    service(type="ExternalName", externalName="example.com", ports=[]),
]  # fmt: skip
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(["None", "NodePort", "ClusterIP", "10.96.0.9", "IPv6", "Local", "RequireDualStack", 0, 80, -1, 30000, 65536]),
    st.lists(st.one_of(st.none(), st.text(max_size=4), st.integers()), max_size=3),
    st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.text(max_size=4), st.integers()), max_size=3),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *places(item, (*path, key)))]


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_manifests_are_stored_whole_or_refused(data: st.DataObject) -> None:
    """Whatever is wrong with a Service, creating or updating it ends with a stored object or an ApiError below 500."""
    registry = make_registry()
    stored = registry.create("services", VALID[0])
    manifest = copy_value(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places(manifest)))
        holder = manifest
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()) or not isinstance(holder, dict):
            holder[last] = data.draw(JUNK)
        else:
            holder[
                data.draw(st.sampled_from(["clusterIPs", "ipFamilies", "nodePort", "status", "finalizers", "labels"]))
            ] = data.draw(JUNK)
    update = data.draw(st.booleans())
    revision = registry.store.revision
    try:
        result = registry.update("services", manifest) if update else registry.create("services", manifest)
    except ApiError as error:
        assert error.code < 500
        assert registry.store.revision == revision
        assert registry.list("services") == [stored]
    else:
        assert result in registry.list("services")
        again = registry.update("services", result)
        assert again["spec"] == result["spec"], "what is stored is valid and complete"
