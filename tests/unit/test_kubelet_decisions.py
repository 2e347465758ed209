"""What the kubelet decides, without a node: back-off, probes, environment, files of /etc, volumes, addresses, status."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from testbed.kubelet.environment import (
    MissingReference,
    container_environment,
    expand,
    service_variables,
    skipped_variables,
)
from testbed.kubelet.node import Machine, PodAddresses, node_object
from testbed.kubelet.probes import ProbeState, http_verdict, timing_of
from testbed.kubelet.restarts import next_back_off_s, should_restart
from testbed.kubelet.runtime import Mount, Volume
from testbed.kubelet.specs import RefusedContainer, container_start, not_honoured
from testbed.kubelet.status import ContainerView, pod_status, running, terminated, waiting
from testbed.kubelet.texts import dns_config_warnings, hostname_of, hosts_file, resolv_conf
from testbed.kubelet.volumes import UnsupportedVolume, live_sources, mounts_of, volumes_of
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object
from testbed.model.topology import NodeSpec, Taint
from testbed.programs.catalogue import Catalogue
from testbed.store import not_found

CLUSTER = ClusterConfig()
NODE_RESOLV = "nameserver 192.0.2.53\nsearch example.com\noptions timeout:1\n"


def pod(**spec: Any) -> Object:
    metadata = {"name": "web-1", "namespace": "dev", "uid": "u1", "labels": {"app": "web"}, "annotations": {"a": "b"}}
    return {
        "metadata": metadata,
        "spec": {"nodeName": "node1", "containers": [{"name": "web", "image": "nginx"}], **spec},
    }


def objects(**found: Object) -> Any:
    """Return a look-up in which ``configmaps_settings`` is ConfigMap settings."""
    return lambda resource, name: found.get(f"{resource}_{name}")


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "code", "wanted"),
    [("Always", 0, True), ("Always", 1, True), ("OnFailure", 0, False), ("OnFailure", 1, True), ("Never", 0, False),
     ("Never", 1, False)],
)  # fmt: skip
def test_restart_policies(policy: str, code: int, wanted: bool) -> None:
    """Who is started again after which exit code."""
    assert should_restart(policy, code) is wanted


def test_back_off_doubles_to_five_minutes() -> None:
    """The first restart is immediate, then the wait doubles from 10 s to 300 s."""
    waits: list[float] = []
    previous: float | None = None
    for _ in range(9):
        previous = next_back_off_s(previous, 1.0)
        waits.append(previous)
    assert waits == [0, 10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.parametrize(("ran_s", "wanted"), [(599.0, 300.0), (601.0, 0.0)])
def test_ten_good_minutes_are_a_new_beginning(ran_s: float, wanted: float) -> None:
    """A container that ran for ten minutes is restarted at once."""
    assert next_back_off_s(300.0, ran_s) == wanted


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probe_defaults() -> None:
    """A probe without numbers has Kubernetes' defaults."""
    timing = timing_of({"tcpSocket": {"port": 80}})
    assert (timing.initial_delay_s, timing.period_s, timing.timeout_s) == (0, 10, 1)
    assert (timing.success_threshold, timing.failure_threshold) == (1, 3)


@pytest.mark.parametrize(
    ("results", "verdicts"),
    [
        pytest.param([True], [True], id="one success is enough"),
        pytest.param([True, False, False], [True, True, True], id="two failures are not"),
        pytest.param([True, False, False, False], [True, True, True, False], id="three are"),
        pytest.param([True, False, False, True, False, False], [True] * 6, id="only in a row"),
        pytest.param([False, False, False, True], [False, False, False, True], id="late success"),
    ],
)
def test_readiness_follows_thresholds(results: list[bool], verdicts: list[bool]) -> None:
    """A verdict changes when enough equal results came one after another."""
    state = ProbeState(timing_of({}), begins_as=False)
    seen = []
    for result in results:
        state.observe(result)
        seen.append(state.verdict)
    assert seen == verdicts


def test_success_threshold() -> None:
    """successThreshold 2 needs two successes in a row."""
    state = ProbeState(timing_of({"successThreshold": 2}), begins_as=False)
    seen = []
    for result in (True, False, True, True):
        state.observe(result)
        seen.append(state.verdict)
    assert seen == [False, False, False, True]


def test_a_probe_hurries_until_its_first_success() -> None:
    """Tries come 0.1 s apart, doubling to the period; after a success once a period, for good."""
    state = ProbeState(timing_of({"periodSeconds": 1}), begins_as=False)
    delays = []
    for _ in range(6):
        state.observe(False)
        delays.append(state.next_delay_s(hurry=True))
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1, 1])
    state.observe(True)
    state.observe(False)
    assert state.next_delay_s(hurry=True) == 1
    assert ProbeState(timing_of({}), begins_as=True).next_delay_s(hurry=False) == 10


@pytest.mark.parametrize(
    ("status", "healthy"), [(199, False), (200, True), (302, True), (399, True), (400, False), (503, False)]
)
def test_http_statuses(status: int, healthy: bool) -> None:
    """2xx and 3xx are healthy; what else comes is in the words of the kubelet."""
    seen, words = http_verdict(status)
    assert seen is healthy
    assert words == ("" if healthy else f"HTTP probe failed with statuscode: {status}")


# --- environment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$(A)", "1"), ("x$(A)y$(B)", "x1y2"), ("$(UNKNOWN)", "$(UNKNOWN)"), ("$$(A)", "$(A)"), ("$$$(A)", "$1"),
        ("$$$$(A)", "$$(A)"), ("$", "$"), ("$$", "$"), ("$A", "$A"), ("$(", "$("), ("$()", "$()"), ("a$(A", "a$(A"),
        ("${A}", "${A}"),
    ],
)  # fmt: skip
def test_expansion(text: str, wanted: str) -> None:
    """The table of kubernetes' own expansion tests, in short."""
    assert expand(text, {"A": "1", "B": "2"}) == wanted


SERVICE = {
    "metadata": {"name": "my-db", "namespace": "dev"},
    "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "sql-x", "port": 5432}, {"port": 53, "protocol": "UDP"}]},
}  # fmt: skip


def test_service_variables() -> None:
    """The variables of one Service, as the documentation lists them."""
    assert service_variables([SERVICE], "dev") == {
        "MY_DB_SERVICE_HOST": "10.96.0.7",
        "MY_DB_SERVICE_PORT": "5432",
        "MY_DB_SERVICE_PORT_SQL_X": "5432",
        "MY_DB_PORT": "tcp://10.96.0.7:5432",
        "MY_DB_PORT_5432_TCP": "tcp://10.96.0.7:5432",
        "MY_DB_PORT_5432_TCP_PROTO": "tcp",
        "MY_DB_PORT_5432_TCP_PORT": "5432",
        "MY_DB_PORT_5432_TCP_ADDR": "10.96.0.7",
        "MY_DB_PORT_53_UDP": "udp://10.96.0.7:53",
        "MY_DB_PORT_53_UDP_PROTO": "udp",
        "MY_DB_PORT_53_UDP_PORT": "53",
        "MY_DB_PORT_53_UDP_ADDR": "10.96.0.7",
    }


def test_which_services_a_pod_hears_of() -> None:
    """Those of its namespace and default/kubernetes; headless ones have nothing to tell."""

    def service(namespace: str, name: str, address: str = "10.96.0.1") -> Object:
        return {
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": address, "ports": [{"port": 1}]},
        }

    services = [
        service("default", "kubernetes"),
        service("default", "other"),
        service("dev", "web"),
        service("dev", "hl", "None"),
    ]
    hosts = [name for name in service_variables(services, "dev") if name.endswith("_HOST")]
    assert hosts == ["KUBERNETES_SERVICE_HOST", "WEB_SERVICE_HOST"]


def environment(
    *env: Object, sources: tuple[Object, ...] = (), find: Any = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    container = {"name": "web", "env": list(env), "envFrom": list(sources)}
    return container_environment(
        container,
        pod(serviceAccountName="robot"),
        find=find or objects(),
        base=base or {},
        pod_ip="10.244.1.2",
        host_ip="192.168.93.11",
    )


CONFIG = {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"color": "red", "b-a-d": "x"}}
SECRET = {"kind": "Secret", "metadata": {"name": "keys"}, "data": {"key": base64.b64encode(b"s3cret").decode()}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "web-1"), ("metadata.namespace", "dev"), ("metadata.uid", "u1"), ("metadata.labels['app']", "web"),
        ("metadata.labels['none']", ""), ("metadata.annotations['a']", "b"), ("spec.nodeName", "node1"),
        ("spec.serviceAccountName", "robot"), ("status.podIP", "10.244.1.2"), ("status.podIPs", "10.244.1.2"),
        ("status.hostIP", "192.168.93.11"),
    ],
)  # fmt: skip
def test_field_references(path: str, value: str) -> None:
    """The fields that the downward API gives to variables."""
    assert environment({"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}) == {"X": value}


def test_keys_that_no_variable_can_be_called() -> None:
    """Kubernetes 1.30 takes '-' and '.', but no digit first and no way up; what it skips is said in the kubelet's words."""
    data = {"bad-key.x": "1", "index.html": "2", "2nd": "3", "1st": "4"}
    sources = (
        {"configMapRef": {"name": "c"}},
        {"secretRef": {"name": "keys"}},
        {"configMapRef": {"name": "c"}, "prefix": "P"},
    )
    found = objects(configmaps_c={"data": data}, secrets_keys=SECRET)
    assert environment(sources=sources, find=found) == {
        "bad-key.x": "1", "index.html": "2", "key": "s3cret",
        "Pbad-key.x": "1", "Pindex.html": "2", "P2nd": "3", "P1st": "4",
    }  # fmt: skip
    assert skipped_variables({"envFrom": sources}, "dev", find=found) == [
        "Keys [1st, 2nd] from the EnvFrom configMap dev/c were skipped since they are considered invalid environment "
        "variable names."
    ]
    assert environment(sources=sources[:1], find=objects(configmaps_c={"data": {"..x": "5"}})) == {}


def test_variables_see_earlier_ones() -> None:
    """env wins over envFrom, which wins over Services; $(NAME) sees what came before, never what comes after."""
    seen = environment(
        {"name": "A", "value": "$(color)-$(LATER)-$(DB_HOST)"},
        {"name": "LATER", "value": "late"},
        {"name": "color", "value": "blue"},
        sources=({"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "keys"}, "prefix": "P_"}),
        find=objects(configmaps_settings=CONFIG, secrets_keys=SECRET),
        base={"DB_HOST": "10.96.0.7", "color": "green"},
    )
    assert seen == {
        "DB_HOST": "10.96.0.7", "color": "blue", "b-a-d": "x", "P_key": "s3cret", "A": "red-$(LATER)-10.96.0.7", "LATER": "late",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"configMapKeyRef": {"name": "none", "key": "k"}}, 'configmap "none" not found'),
        ({"secretKeyRef": {"name": "none", "key": "k"}}, 'secret "none" not found'),
        ({"configMapKeyRef": {"name": "settings", "key": "k"}}, "couldn't find key k in ConfigMap dev/settings"),
        ({"secretKeyRef": {"name": "keys", "key": "k"}}, "couldn't find key k in Secret dev/keys"),
    ],
)
def test_missing_references(source: Object, message: str) -> None:
    """What is not there is named in the kubelet's words; optional references are left out instead."""
    find = objects(configmaps_settings=CONFIG, secrets_keys=SECRET)
    with pytest.raises(MissingReference) as caught:
        environment({"name": "X", "valueFrom": source}, find=find)
    assert str(caught.value) == message
    ((kind, reference),) = source.items()
    optional = {kind: {**reference, "optional": True}}
    assert environment({"name": "X", "valueFrom": optional}, find=find) == {}


# --- files of /etc ---------------------------------------------------------------------------------------------------

CLUSTER_SEARCH = "dev.svc.cluster.local svc.cluster.local cluster.local"
DNS = f"nameserver {CLUSTER.dns}\n"


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        pytest.param({}, f"{DNS}search {CLUSTER_SEARCH} example.com\noptions ndots:5\n", id="ClusterFirst"),
        pytest.param({"hostNetwork": True}, NODE_RESOLV, id="ClusterFirst on the host network is Default"),
        pytest.param(
            {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"},
            f"{DNS}search {CLUSTER_SEARCH} example.com\noptions ndots:5\n",
            id="ClusterFirstWithHostNet",
        ),
        pytest.param({"dnsPolicy": "Default"}, NODE_RESOLV, id="Default"),
        pytest.param(
            {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"], "searches": ["a.b"], "options": [{"name": "edns0"}]}},
            "nameserver 1.2.3.4\nsearch a.b\noptions edns0\n",
            id="None",
        ),
        pytest.param(
            {
                "dnsConfig": {
                    "nameservers": ["1.2.3.4", str(CLUSTER.dns), "1.2.3.5", "1.2.3.6"],
                    "searches": ["x.y", "cluster.local"],
                    "options": [{"name": "ndots", "value": "2"}, {"name": "rotate"}],
                }
            },
            f"{DNS}nameserver 1.2.3.4\nnameserver 1.2.3.5\nsearch {CLUSTER_SEARCH} example.com x.y\noptions ndots:2 rotate\n",
            id="dnsConfig is merged, without duplicates, three servers at most",
        ),
    ],
)  # fmt: skip
def test_resolv_conf(spec: Mapping[str, Any], wanted: str) -> None:
    """resolv.conf by dnsPolicy and dnsConfig."""
    assert resolv_conf(pod(**spec), CLUSTER, NODE_RESOLV) == wanted


def test_search_limits() -> None:
    """At most 32 search paths and 2048 characters."""
    many = [f"s{number}.example" for number in range(40)]
    long = ["a" * 60 + f"{number:02}.example" for number in range(40)]
    for searches, limit in ((many, 32), (long, 40)):
        text = resolv_conf(
            pod(dnsPolicy="None", dnsConfig={"nameservers": ["1.1.1.1"], "searches": searches}), CLUSTER, ""
        )
        found = text.split("search ")[1].splitlines()[0]
        assert len(found) <= 2048
        assert 0 < len(found.split()) <= limit


def test_a_cluster_without_dns() -> None:
    """Pods that ask for cluster DNS get the node's resolv.conf, and an event says so; others are as ever."""
    cluster = replace(CLUSTER, dns=None)
    for policy in ("ClusterFirst", "ClusterFirstWithHostNet"):
        assert resolv_conf(pod(dnsPolicy=policy), cluster, NODE_RESOLV) == NODE_RESOLV
        assert dns_config_warnings(pod(dnsPolicy=policy), cluster, NODE_RESOLV) == [
            (
                "MissingClusterDNS",
                f'kubelet does not have ClusterDNS IP configured and cannot create Pod using "{policy}" policy. '
                'Falling back to "Default" policy.',
            )
        ]
    for spec in ({"hostNetwork": True}, {"dnsPolicy": "Default"}):
        assert dns_config_warnings(pod(**spec), cluster, NODE_RESOLV) == []


def test_limits_are_said() -> None:
    """What does not fit into a resolv.conf is left out, and the kubelet says what is applied."""
    config = {"nameservers": ["1.1.1.1", "1.1.1.2", "1.1.1.3"], "searches": [f"s{n}.b" for n in range(30)]}
    (servers, searches) = dns_config_warnings(pod(dnsConfig=config), CLUSTER, NODE_RESOLV)
    applied = f"{CLUSTER.dns} 1.1.1.1 1.1.1.2"
    assert servers == (
        "DNSConfigForming",
        "Nameserver limits were exceeded, some nameservers have been omitted, "
        f"the applied nameserver line is: {applied}",
    )
    assert searches[1].startswith(
        "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: dev.svc."
    )
    assert searches[1].endswith(" s27.b")
    assert dns_config_warnings(pod(), CLUSTER, NODE_RESOLV) == []


def test_hosts_file() -> None:
    """/etc/hosts to the letter, with a subdomain's full name and aliases."""
    aliases = [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]
    text = hosts_file(pod(subdomain="peers", hostAliases=aliases), "web-1", IPv4Address("10.244.1.2"), "cluster.local")
    assert text == (
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        "fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
        "10.244.1.2\tweb-1.peers.dev.svc.cluster.local\tweb-1\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"
    )


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [({}, "web-1"), ({"hostname": "db"}, "db"), ({"hostNetwork": True, "hostname": "db"}, "node1")],
)
def test_hostnames(spec: Mapping[str, Any], wanted: str) -> None:
    """A pod is called like itself, as it says, or like its node."""
    assert hostname_of(pod(**spec), "node1") == wanted


def test_long_hostnames_are_cut() -> None:
    """63 characters are the kernel's limit, and a name does not end with a hyphen."""
    long = pod()
    long["metadata"]["name"] = "a" * 62 + "-" + "b" * 20
    assert hostname_of(long, "node1") == "a" * 62


# --- volumes ---------------------------------------------------------------------------------------------------------


def planned(volume: Object, **found: Object) -> Volume:
    (made,) = volumes_of(
        pod(volumes=[{"name": "v", **volume}]), find=objects(**found), pod_ip="10.244.1.2", host_ip="192.168.93.11"
    )
    return made


@pytest.mark.parametrize(
    ("volume", "wanted"),
    [
        pytest.param({"emptyDir": {}}, Volume(name="v"), id="emptyDir"),
        pytest.param({"hostPath": {"path": "/srv"}}, Volume(name="v", host_path="/srv"), id="hostPath"),
        pytest.param({"configMap": {"name": "settings"}}, Volume(name="v", files={"color": "red", "b-a-d": "x"}), id="configMap"),
        pytest.param(
            {"configMap": {"name": "settings", "items": [{"key": "color", "path": "a/b"}]}},
            Volume(name="v", files={"a/b": "red"}), id="items",
        ),
        pytest.param(
            {"configMap": {"name": "settings", "defaultMode": 0o400, "items": [{"key": "color", "path": "a", "mode": 0o755}]}},
            Volume(name="v", files={"a": "red"}, default_mode=0o400, modes={"a": 0o755}), id="modes",
        ),
        pytest.param(
            {"projected": {"defaultMode": 0o440, "sources": [
                {"configMap": {"name": "settings", "items": [{"key": "color", "path": "c", "mode": 0}]}}]}},
            Volume(name="v", files={"c": "red"}, default_mode=0o440, modes={"c": 0}), id="modes in a projected volume",
        ),
        pytest.param({"secret": {"secretName": "keys"}}, Volume(name="v", files={"key": "s3cret"}), id="secret"),
        pytest.param({"configMap": {"name": "none", "optional": True}}, Volume(name="v", files={}), id="optional"),
        pytest.param(
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            Volume(name="v", files={"labels": 'app="web"'}), id="downwardAPI",
        ),
        pytest.param(
            {"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "settings"}},
                                       {"secret": {"name": "keys"}}]}},
            Volume(name="v", files={"color": "red", "b-a-d": "x", "key": "s3cret"}), id="projected",
        ),
    ],
)  # fmt: skip
def test_volumes(volume: Object, wanted: Volume) -> None:
    """What each kind of volume holds."""
    assert planned(volume, configmaps_settings=CONFIG, secrets_keys=SECRET) == wanted


def test_volumes_that_cannot_be_mounted() -> None:
    """What is missing is named with the volume, as in a FailedMount event; other kinds are refused by name."""
    with pytest.raises(MissingReference, match=r'MountVolume.SetUp failed for volume "v" : configmap "none" not found'):
        planned({"configMap": {"name": "none"}})
    with pytest.raises(MissingReference, match=r"configmap references non-existent config key: k"):
        planned({"configMap": {"name": "settings", "items": [{"key": "k", "path": "k"}]}}, configmaps_settings=CONFIG)
    with pytest.raises(UnsupportedVolume, match="persistentVolumeClaim"):
        planned({"persistentVolumeClaim": {"claimName": "c"}})


def test_a_token_of_an_account_that_is_gone() -> None:
    """As when a namespace is deleted, and its ServiceAccount goes before its pods."""

    def token_of(_pod: Object) -> str:
        raise not_found("serviceaccounts", "default")

    volume = {"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
    said = 'MountVolume.SetUp failed for volume "v" : failed to fetch token: serviceaccounts "default" not found'
    with pytest.raises(MissingReference, match=f"^{said}$"):
        volumes_of(pod(volumes=[volume]), find=objects(), pod_ip="", host_ip="", token_of=token_of)


def test_mounts_and_sources() -> None:
    """Mounts keep subPath and readOnly; a pod follows what its volumes come from."""
    mounts = [{"name": "v", "mountPath": "/a", "subPath": "b", "readOnly": True}, {"name": "w", "mountPath": "/c"}]
    assert mounts_of({"volumeMounts": mounts}) == (
        Mount(volume="v", path="/a", sub_path="b", read_only=True),
        Mount(volume="w", path="/c"),
    )
    volumes = [
        {"name": "v", "configMap": {"name": "x"}},
        {"name": "w", "projected": {"sources": [{"secret": {"name": "y"}}]}},
    ]
    assert live_sources(pod(volumes=volumes)) == (("configmaps", "x"), ("secrets", "y"))


# --- containers ------------------------------------------------------------------------------------------------------


def start(container: Object, **spec: Any) -> Any:
    return container_start(
        pod(**spec), {"name": "web", "image": "nginx", **container}, Catalogue(lambda name: None), container_id="c1",
        find=objects(), services={"DB_HOST": "10.96.0.7"}, pod_ip="10.244.1.2", host_ip="192.168.93.11",
    )  # fmt: skip


def test_command_and_args_are_expanded() -> None:
    """$(NAME) in command and args takes the container's variables, those of Services among them."""
    made = start(
        {"command": ["sh", "-c"], "args": ["echo $(DB_HOST) $(A) $(NO)"], "env": [{"name": "A", "value": "1"}]}
    )
    assert made.spec.argv == ("sh", "-c", "echo 10.96.0.7 1 $(NO)")
    assert made.stop_signal.name == "SIGQUIT"


def test_security_contexts() -> None:
    """The container's own settings win over the pod's; groups and capabilities arrive as the runtime wants them."""
    made = start(
        {"securityContext": {"runAsUser": 5, "capabilities": {"add": ["NET_ADMIN", "CAP_SYS_TIME"], "drop": ["all"]}}},
        securityContext={"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3, "supplementalGroups": [4]},
    ).spec
    assert (made.uid, made.gid, set(made.groups)) == (5, 2, {3, 4})
    assert (made.add_capabilities, made.drop_capabilities) == (("NET_ADMIN", "SYS_TIME"), ("ALL",))
    assert not made.privileged


def test_root_may_be_refused() -> None:
    """runAsNonRoot refuses an image that runs as root, and nothing else."""
    with pytest.raises(RefusedContainer, match="container has runAsNonRoot and image will run as root"):
        start({"securityContext": {"runAsNonRoot": True}})
    assert start({"securityContext": {"runAsNonRoot": True, "runAsUser": 1000}}).spec.uid == 1000


def test_settings_without_effect_are_named() -> None:
    """What is asked for and not followed can be told."""
    container = {"securityContext": {"readOnlyRootFilesystem": True, "runAsUser": 1}}
    assert not_honoured(pod(), container) == ["securityContext.readOnlyRootFilesystem"]
    assert not_honoured(pod(), {}) == []


# --- addresses and nodes ---------------------------------------------------------------------------------------------


def test_addresses_are_given_in_turn() -> None:
    """The bridge's address is never given; one that was given back comes last; an exhausted range says so."""
    addresses = PodAddresses(IPv4Network("10.244.1.0/29"))
    first = [addresses.allocate() for _ in range(3)]
    assert [str(address) for address in first] == ["10.244.1.2", "10.244.1.3", "10.244.1.4"]
    assert first[0] is not None
    addresses.release(first[0])
    rest = [str(addresses.allocate()) for _ in range(4)]
    assert rest == ["10.244.1.5", "10.244.1.6", "10.244.1.2", "None"]


def test_every_address_of_a_large_range_is_used() -> None:
    """A /22 gives 1,021 pods an address, each its own."""
    addresses = PodAddresses(IPv4Network("10.244.0.0/22"))
    given = {addresses.allocate() for _ in range(1021)}
    assert len(given) == 1021
    assert addresses.allocate() is None


def test_a_node_registers_as_the_topology_says() -> None:
    """Labels, taints, addresses and room for maxPods pods, however many addresses there are."""
    spec = NodeSpec(
        name="node1", network="lan", address=IPv4Address("192.168.93.11"), pod_cidr=IPv4Network("10.244.0.0/22"),
        max_pods=500, labels={"zone": "a"}, taints=(Taint(key="k", value="v", effect="NoExecute"),),
    )  # fmt: skip
    machine = Machine(kernel="6.1.0", os_image="Debian", architecture="amd64", cpus=2, memory_kib=1024)
    node = node_object(spec, machine, "2024-01-01T00:00:00Z")
    assert (
        node["metadata"]["labels"].items()
        >= {"zone": "a", "kubernetes.io/hostname": "node1", "kubernetes.io/os": "linux"}.items()
    )
    assert node["spec"] == {
        "podCIDR": "10.244.0.0/22", "podCIDRs": ["10.244.0.0/22"], "taints": [{"key": "k", "value": "v", "effect": "NoExecute"}],
    }  # fmt: skip
    assert node["status"]["capacity"]["pods"] == "500"
    assert {one["type"]: one["status"] for one in node["status"]["conditions"]}["Ready"] == "True"


# --- status ----------------------------------------------------------------------------------------------------------

NOW = "2024-01-01T00:00:00Z"


def end(code: int) -> Mapping[str, Any]:
    return terminated(code=code, signal=0, reason="x", message="", started_at=NOW, finished_at=NOW, container_id="c")


def view(state: Mapping[str, Any], *, last: Mapping[str, Any] | None = None, ready: bool = False) -> ContainerView:
    return ContainerView(
        name="web", image="nginx", state=state, last_state=last or {}, is_ready=ready, has_started="running" in state
    )


def status(
    policy: str, main: list[ContainerView], init: list[ContainerView] | None = None, old: Object | None = None
) -> Object:
    described = {**pod(restartPolicy=policy), "status": old or {}}
    return pod_status(
        described,
        init=init or [],
        main=main,
        has_sandbox=True,
        pod_ip="10.244.1.2",
        host_ip="192.168.93.11",
        now=NOW,
        start_time=NOW,
    )


@pytest.mark.parametrize(
    ("policy", "main", "init", "wanted"),
    [
        ("Always", [view(waiting("ContainerCreating"))], [], "Pending"),
        ("Always", [view(running(NOW))], [], "Running"),
        ("Always", [view(running(NOW)), view(waiting("ContainerCreating"))], [], "Pending"),
        ("Always", [view(end(1))], [], "Running"),
        ("Always", [view(waiting("CrashLoopBackOff"), last=end(1))], [], "Running"),
        ("Never", [view(end(0))], [], "Succeeded"),
        ("Never", [view(end(1))], [], "Failed"),
        ("Never", [view(end(0)), view(end(1))], [], "Failed"),
        ("Never", [view(end(0)), view(running(NOW))], [], "Running"),
        ("OnFailure", [view(end(0)), view(end(0))], [], "Succeeded"),
        ("OnFailure", [view(end(1))], [], "Running"),
        ("Never", [view(waiting("PodInitializing"))], [view(end(1))], "Failed"),
        ("Always", [view(waiting("PodInitializing"))], [view(waiting("CrashLoopBackOff"), last=end(1))], "Pending"),
    ],
)  # fmt: skip
def test_phases(policy: str, main: list[ContainerView], init: list[ContainerView], wanted: str) -> None:
    """The phase by restart policy and what the containers do (getPhase upstream)."""
    assert status(policy, main, init)["phase"] == wanted


def conditions(shown: Object) -> dict[str, str]:
    return {one["type"]: one["status"] for one in shown["conditions"]}


def test_conditions_of_a_ready_pod() -> None:
    """All conditions of a pod whose containers are ready are true."""
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    assert conditions(status("Always", [view(running(NOW), ready=True)])) == dict.fromkeys(kinds, "True")


@pytest.mark.parametrize(
    ("policy", "state", "reason"),
    [("Always", running(NOW), "ContainersNotReady"), ("Never", end(0), "PodCompleted"), ("Never", end(1), "PodFailed")],
)
def test_why_a_pod_is_not_ready(policy: str, state: Mapping[str, Any], reason: str) -> None:
    """An unready pod says why, with the containers' names while it lives."""
    ready = next(one for one in status(policy, [view(state)])["conditions"] if one["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("False", reason)
    assert ready.get("message") == ("containers with unready status: [web]" if reason == "ContainersNotReady" else None)


def test_transition_times_stay_while_nothing_changes() -> None:
    """lastTransitionTime moves with the value only, and conditions of others stay."""
    old = {
        "qosClass": "Burstable",
        "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2023-01-01T00:00:00Z"},
            {"type": "ContainersReady", "status": "False", "lastTransitionTime": "2023-01-01T00:00:00Z"},
            {"type": "example.com/gate", "status": "True"},
        ],
    }
    shown = status("Always", [view(running(NOW), ready=True)], old=old)
    since = {one["type"]: one.get("lastTransitionTime") for one in shown["conditions"]}
    assert (since["Ready"], since["ContainersReady"]) == ("2023-01-01T00:00:00Z", NOW)
    assert {"type": "example.com/gate", "status": "True"} in shown["conditions"]
    assert shown["qosClass"] == "Burstable"


def test_a_running_init_container_is_not_done() -> None:
    """Initialized becomes true when the init containers have ended well, not when they run."""
    shown = status("Always", [view(waiting("PodInitializing"))], [view(running(NOW))])
    assert conditions(shown)["Initialized"] == "False"
