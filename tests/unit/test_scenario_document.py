"""Scenario files: what they become, and every rule that refuses one, with its whole text."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import jsonschema
import pytest

from testbed.errors import ManifestError
from testbed.manifests import check_file, load_scenario, scenario_schema
from testbed.manifests.source import parse_documents
from testbed.model.scenario import (
    AnsweredBy,
    ApplyStep,
    ArpStep,
    Condition,
    DeleteStep,
    ExecStep,
    ExpectStep,
    FaultAction,
    FaultStep,
    KubectlStep,
    ObjectRef,
    Request,
    ResolveStep,
    ScaleStep,
    Scenario,
    Scheme,
    Selector,
    Share,
    Spread,
    Takes,
    WaitStep,
)

MANIFEST = """\
apiVersion: v1
kind: Namespace
metadata: {name: dev}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: dev}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: nginx}]}
---
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: dev}
spec: {containers: [{name: shell, image: client}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: dev}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""
HEADER = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {name: s}
spec:
  topology: three-nodes
  proxyModes: [iptables, ipvs]
  steps:
    - apply: web.yaml
"""
FIRST_LINE = HEADER.count("\n") + 1  # of the step that a test adds


def write(folder: Path, *steps: str, header: str = HEADER, manifest: str = MANIFEST) -> Path:
    (folder / "web.yaml").write_text(manifest)
    (folder / "scenario.yaml").write_text(header + "".join(f"    - {step}\n" for step in steps))
    return folder


def load(folder: Path, *steps: str) -> Scenario:
    return load_scenario(write(folder, *steps))


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load_scenario(folder)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_every_kind_of_step_becomes_its_class(tmp_path: Path) -> None:
    """Fields, defaults, lines and titles of each kind of step."""
    scenario = load(
        tmp_path,
        "wait: {deployment: dev/web, for: available, within: 20s}",
        "wait: {service: dev/web, for: endpoints, count: 3}",
        "scale: {deployment: dev/web, replicas: 5, within: 500ms}",
        "exec: {in: dev/shell, run: \"curl -H 'a: b' web\", prints: hello, status: 7, within: 1m}",
        "exec: {in: node1, run: [echo, a b]}",
        "kubectl: {run: get svc -n dev, prints: web}",
        "fault: {kill: kube-system/kube-proxy@node2}",
        "fault: {link: client, down: true}",
        "delete: {deployment: dev/web, service: dev/web}",
        "{delete: web.yaml, name: clean up, modes: [ipvs]}",
    )
    about = {"file": str(tmp_path / "scenario.yaml")}
    assert scenario.steps == (
        ApplyStep(**about, line=8, title="apply web.yaml", files=(tmp_path / "web.yaml",)),
        WaitStep(**about, line=9, title="wait for deployment dev/web: available", resource="deployments.apps",
                 selector=Selector("dev", "web"), condition=Condition.AVAILABLE, within_s=20.0),
        WaitStep(**about, line=10, title="wait for service dev/web: 3 endpoints", resource="services",
                 selector=Selector("dev", "web"), condition=Condition.ENDPOINTS, count=3, within_s=60.0),
        ScaleStep(**about, line=11, title="scale deployment dev/web to 5",
                  object=ObjectRef("deployments.apps", "dev", "web"), replicas=5, within_s=0.5),
        ExecStep(**about, line=12, title="dev/shell: curl -H 'a: b' web prints 'hello', ends with status 7",
                 where=Selector("dev", "shell"), argv=("curl", "-H", "a: b", "web"), prints="hello", status=7, within_s=60.0),
        ExecStep(**about, line=13, title="node1: echo 'a b'", where="node1", argv=("echo", "a b")),
        KubectlStep(**about, line=14, title="kubectl get svc -n dev prints 'web'", argv=("get", "svc", "-n", "dev"), prints="web"),
        FaultStep(**about, line=15, title="kill kube-system/kube-proxy@node2", action=FaultAction.KILL,
                  pods=Selector("kube-system", "kube-proxy"), node="node2"),
        FaultStep(**about, line=16, title="cut the link of client", action=FaultAction.LINK_DOWN, node="client"),
        DeleteStep(**about, line=17, title="delete deployment dev/web, service dev/web",
                   objects=(ObjectRef("deployments.apps", "dev", "web"), ObjectRef("services", "dev", "web"))),
        DeleteStep(**about, line=18, title="clean up", modes=("ipvs",), files=(tmp_path / "web.yaml",)),
    )  # fmt: skip
    assert scenario.name == "s"
    assert scenario.proxy_modes == ("iptables", "ipvs")
    assert scenario.topology.name == "three-nodes"
    assert scenario.steps_for("iptables") == scenario.steps[:-1]
    assert scenario.steps_for("ipvs") == scenario.steps


def test_expectations(tmp_path: Path) -> None:
    """Each form of request and of claim."""
    scenario = load(
        tmp_path,
        'expect: {from: client, get: "http://192.168.93.11:30888/a?b", times: 300, headers: {Host: x}, status: 200, body: hi, '
        "answeredBy: {each: dev/app=web, spread: even}}",
        'expect: {from: dev/shell, get: "https://web.dev/", answeredBy: dev/web, sees: {client: dev/shell}, within: 0s}',
        'expect: {from: node1, tcp: "10.96.0.10:53", refused: true, patience: 100ms}',
        'expect: {from: node1, udp: "web.dev.svc.cluster.local:53", send: ping, timeout: true}',
        'expect: {from: client, tcp: "10.96.0.10:53", times: 9, answeredBy: {same: dev/app=web}, sees: {client: 192.168.93.100}}',
        'expect: {from: client, tcp: "10.96.0.10:53", takes: {atLeast: 80ms, atMost: 2s}, patience: 3s}',
    )
    first, second, third, fourth, fifth, sixth = [step for step in scenario.steps if isinstance(step, ExpectStep)]
    web = Selector("dev", labels=(("app", "web"),))
    assert first.request == Request(
        scheme=Scheme.HTTP, host="192.168.93.11", port=30888, path="/a?b", headers=(("Host", "x"),)
    )
    assert first.answered_by == AnsweredBy(pods=web, share=Share.EACH, spread=Spread.EVEN)
    assert (first.where, first.times, first.status, first.body, first.is_statistical) == (
        "client",
        300,
        200,
        "hi",
        True,
    )
    assert first.title == (
        "client → http://192.168.93.11:30888/a?b ×300: status 200, body 'hi', answered by each of dev/app=web, even spread"
    )
    assert second.request == Request(scheme=Scheme.HTTPS, host="web.dev", port=443, path="/")
    assert second.answered_by == AnsweredBy(pods=Selector("dev", "web"))
    assert (second.sees_client, second.within_s) == (Selector("dev", "shell"), 0.0)
    assert third.request == Request(scheme=Scheme.TCP, host="10.96.0.10", port=53, patience_s=0.1)
    assert (third.refused, third.timeout, third.within_s) == (True, False, 5.0)
    assert third.title == "node1 → tcp 10.96.0.10:53: refused"
    assert fourth.request == Request(scheme=Scheme.UDP, host="web.dev.svc.cluster.local", port=53, send="ping")
    assert fifth.answered_by == AnsweredBy(pods=web, share=Share.SAME)
    assert fifth.sees_client == IPv4Address("192.168.93.100")
    assert sixth.takes == Takes(at_least_s=0.08, at_most_s=2.0)
    assert sixth.title == "client → tcp 10.96.0.10:53: in at least 80 ms and at most 2000 ms"


def test_expectations_about_arp(tmp_path: Path) -> None:
    """Who answers on the LAN: these machines, nobody, or anybody."""
    scenario = load(
        tmp_path,
        "expect: {from: client, arp: 192.168.93.231, answeredBy: [node2]}",
        "expect: {from: node1, arp: 192.168.93.231, answeredBy: [], within: 0s, patience: 300ms}",
        "expect: {from: client, arp: 192.168.93.231}",
    )
    about = {"file": str(tmp_path / "scenario.yaml"), "address": IPv4Address("192.168.93.231")}
    assert scenario.steps[1:] == (
        ArpStep(**about, line=9, title="client → arp 192.168.93.231: answered by node2", where="client", answered_by=("node2",)),
        ArpStep(**about, line=10, title="node1 → arp 192.168.93.231: answered by nobody", where="node1", answered_by=(),
                within_s=0.0, patience_s=0.3),
        ArpStep(**about, line=11, title="client → arp 192.168.93.231: answered by anybody", where="client"),
    )  # fmt: skip


def test_expectations_about_names(tmp_path: Path) -> None:
    """What is asked, of whom, and what is to come back; an address asks for its name."""
    scenario = load(
        tmp_path,
        "expect: {from: dev/shell, resolve: web, answers: 10.96.0.7}",
        "expect: {from: node1, resolve: _http._tcp.web.dev.svc.cluster.local., type: SRV, server: 10.96.0.10, within: 0s}",
        "expect: {from: dev/shell, resolve: 10.96.0.7, answers: [web.dev.svc.cluster.local]}",
        "expect: {from: dev/shell, resolve: db, answers: [dev/app=web, 10.0.0.1]}",
        "expect: {from: dev/shell, resolve: web, type: AAAA, answers: []}",
        "expect: {from: dev/shell, resolve: no.dev.svc.cluster.local, rcode: NXDOMAIN}",
    )
    about = {"file": str(tmp_path / "scenario.yaml")}
    shell = Selector("dev", "shell")
    assert scenario.steps[1:] == (
        ResolveStep(**about, line=9, title="dev/shell → dns A web: 10.96.0.7", where=shell, name="web", answers=("10.96.0.7",)),
        ResolveStep(**about, line=10, title="node1 → dns SRV _http._tcp.web.dev.svc.cluster.local.: answers", where="node1",
                    name="_http._tcp.web.dev.svc.cluster.local.", record_type="SRV", server=IPv4Address("10.96.0.10"), within_s=0.0),
        ResolveStep(**about, line=11, title="dev/shell → dns PTR 10.96.0.7: web.dev.svc.cluster.local", where=shell,
                    name="10.96.0.7", record_type="PTR", answers=("web.dev.svc.cluster.local",)),
        ResolveStep(**about, line=12, title="dev/shell → dns A db: dev/app=web, 10.0.0.1", where=shell, name="db",
                    answers=(Selector("dev", labels=(("app", "web"),)), "10.0.0.1")),
        ResolveStep(**about, line=13, title="dev/shell → dns AAAA web: no AAAA record", where=shell, name="web",
                    record_type="AAAA", answers=()),
        ResolveStep(**about, line=14, title="dev/shell → dns A no.dev.svc.cluster.local: NXDOMAIN", where=shell,
                    name="no.dev.svc.cluster.local", rcode="NXDOMAIN"),
    )  # fmt: skip


def test_points_of_a_capture(tmp_path: Path) -> None:
    """Machines, interfaces, Services and `all` stay as they are written; pods are selected when the step begins."""
    step = "{apply: web.yaml, capture: [all, node1, 'client:eth0', svc/dev/web, 'dev/app=web:eth0', dev/web]}"
    points = load(tmp_path, step).steps[-1].capture
    assert [point.text for point in points] == [
        "all",
        "node1",
        "client:eth0",
        "svc/dev/web",
        "dev/app=web:eth0",
        "dev/web",
    ]
    assert [(str(point.pods), point.interface) for point in points if point.pods] == [
        ("dev/app=web", "eth0"), ("dev/web", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("expect: {from: node1, resolve: a b}", "expect.resolve: 'a b' is not a name that can be asked for: labels of 1 to 63 characters"),
        (f"expect: {{from: node1, resolve: {'a' * 64}.b}}", f"expect.resolve: '{'a' * 64}.b' is not a name that can be asked for: labels of 1 to 63 characters"),
        ("expect: {from: node1, resolve: 1.2.3}", "expect.resolve: '1.2.3' is not an IPv4 address"),
        ("expect: {from: node1, resolve: 1.2.3.4, type: A}", "expect.type: 1.2.3.4 is an address: it has PTR records"),
        ("expect: {from: node1, resolve: a, type: B}", "expect.type: 'B' is not one of A, AAAA, CNAME, MX, NS, PTR, SOA, SRV, TXT"),
        ("expect: {from: node1, resolve: a, times: 3}", "expect.times: goes with get, tcp and udp only, not with resolve"),
        ("expect: {from: node1, resolve: a, timeout: true}", "expect.timeout: goes with get, tcp and udp only, not with resolve"),
        ("expect: {from: node1, tcp: 'a:1', answers: x}", "expect.answers: goes with resolve only, not with tcp"),
        ("expect: {from: node1, tcp: 'a:1', rcode: NXDOMAIN}", "expect.rcode: goes with resolve only, not with tcp"),
        ("expect: {from: node1, resolve: a, rcode: NXDOMAIN, answers: x}", "expect.answers: an answer with NXDOMAIN has none"),
        ("expect: {from: node1, resolve: a, type: SRV, answers: dev/web}", "expect.answers: 'dev/web': pods stand for their addresses, which are A records"),
        ("expect: {from: node1, resolve: a, answers: dev/nothing}", "expect.answers: no manifest of the scenario makes the pod 'dev/nothing' (pods come from: dev/web, dev/shell)"),
        ("expect: {from: node1, arp: 10.0.0.1, answeredBy: [node9]}", "expect.answeredBy[0]: topology 'three-nodes' has no node or host 'node9' (did you mean \"node3\"?)"),
        ("expect: {from: node1, arp: 10.0.0.1, answeredBy: dev/app=web}", "expect.answeredBy: with arp it is a list of nodes and outside hosts; [] for nobody"),
        ("expect: {from: dev/web, arp: 10.0.0.1}", "expect.from: dev/web is a pod: ask on the LAN, from a node or an outside host"),
        ("expect: {from: node1, arp: lb.example.com}", "expect.arp: 'lb.example.com' is not an IPv4 address"),
        ("expect: {from: node1, arp: 10.0.0.1, times: 3}", "expect.times: goes with get, tcp and udp only, not with arp"),
        ("expect: {from: node1, arp: 10.0.0.1, type: A}", "expect.type: goes with resolve only, not with arp"),
        ("expect: {from: node1, resolve: a, patience: 3s}", "expect.patience: goes with get, tcp, udp and arp only, not with resolve"),
        ("expect: {from: node1, tcp: 'a:1', answeredBy: [node1]}", "expect.answeredBy: a list of machines goes with arp only; pods are NAMESPACE/label=value"),
        ("expect: {from: node1, resolve: a, tcp: 'a:1'}", "expect: wants exactly one of get, tcp, udp, resolve, arp; got tcp and resolve"),
    ],
)  # fmt: skip
def test_what_is_refused_about_names(tmp_path: Path, step: str, problem: str) -> None:
    """Each mistake at its step, in these words."""
    write(tmp_path, step)
    assert problems_of(tmp_path) == [f"scenario.yaml:{FIRST_LINE}: spec.steps[1].{problem}"]


def test_without_modes_the_topology_decides(tmp_path: Path) -> None:
    """A scenario that names no proxy mode runs in the one of its topology."""
    write(tmp_path, header=HEADER.replace("  proxyModes: [iptables, ipvs]\n", "").replace("three-nodes", "tutorial"))
    assert load_scenario(tmp_path / "scenario.yaml").proxy_modes == ("ipvs",)


NO_ACTION = "a step does exactly one of apply, delete, scale, exec, kubectl, wait, expect, fault, doctor; got none"
EXPECT = 'get: "http://1.2.3.4/"'


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("apply: wep.yaml", 'apply: no file \'wep.yaml\' beside the scenario (did you mean "web.yaml"?)'),
        ("apply: [web.yaml, nope/x.yaml]", "apply[1]: no file 'nope/x.yaml' beside the scenario"),
        ("apply: ../web.yaml", "apply: '../web.yaml' leaves the scenario's folder"),
        ("apply: /etc/passwd", "apply: '/etc/passwd' leaves the scenario's folder"),
        ('apply: "a\\nb"', "apply: 'a\\nb' is not a file name"),
        ("apply: 5", "apply: wants text or a list, got the number 5"),
        ("{apply: web.yaml, capture: node9}", """capture: topology 'three-nodes' has no node or host 'node9' (did you mean "node3"?)"""),
        ("{apply: web.yaml, capture: [client, 'node1:a/b']}", "capture[1]: 'node1:a/b': 'a/b' is not the name of an interface"),
        ("{apply: web.yaml, capture: []}", "capture: names no point"),
        ("{apply: web.yaml, capture: 5}", "capture: wants a list or text, got the number 5"),
        ("{capture: all}", "a step does exactly one of apply, delete, scale, exec, kubectl, wait, expect, fault, doctor; got none"),
        ("aply: web.yaml", 'unknown field "aply" (did you mean "apply"?)'),
        ("{apply: web.yaml, delete: web.yaml}",
         "a step does exactly one of apply, delete, scale, exec, kubectl, wait, expect, fault, doctor; got apply and delete"),
        ("{apply: web.yaml, modes: [nftables]}", "modes[0]: 'nftables' is not one of the scenario's proxyModes (iptables, ipvs)"),
        ("delete: {deploymnt: dev/web}", 'delete.deploymnt: no kind is called \'deploymnt\' (did you mean "deployment"?)'),
        ("delete: {deployment: web}", "delete.deployment: 'web' is not NAMESPACE/NAME or NAMESPACE/label=value"),
        ("delete: {pod: dev/app=web}", "delete.pod: 'dev/app=web' is a label selector: name one object"),
        ("scale: {deployment: dev/web, replicas: -1}", "scale.replicas: wants a whole number from 0 to 10000, got -1"),
        ("scale: {deployment: dev/wep, replicas: 1}",
         'scale.deployment: no manifest of the scenario makes the Deployment \'dev/wep\' (did you mean "dev/web"?)'),
        ("exec: {in: nod1, run: ls}", 'exec.in: topology \'three-nodes\' has no node or host \'nod1\' (did you mean "node1"?)'),
        ("exec: {in: xyz, run: ls}", "exec.in: topology 'three-nodes' has no node or host 'xyz' "
         "(there is: node1, node2, node3, client; a pod is NAMESPACE/POD)"),
        ("exec: {in: node1, run: \"ls 'a\"}", 'exec.run: "ls \'a" cannot be split into words: no closing quotation'),
        ("exec: {in: node1, run: ''}", "exec.run: names no program"),
        ("exec: {in: dev/nobody, run: ls}",
         "exec.in: no manifest of the scenario makes the pod 'dev/nobody' (pods come from: dev/web, dev/shell)"),
        ("exec: {in: 'dev/web;ls', run: ls}", "exec.in: 'dev/web;ls': 'web;ls' is not a valid name"),
        ("wait: {deployment: dev/web, for: endpoints}",
         "wait.for: a deployment is never 'endpoints': wait for available or ready or deleted"),
        ("wait: {deployment: dev/web, pod: dev/shell, for: ready}",
         "wait: wants exactly one of deployment, replicaset, daemonset, pod, pods, service, node, job, namespace; "
         "got deployment and pod"),
        ("wait: {deployment: dev/web, for: available, within: 20}", "wait.within: wants a duration such as 5s, got the number 20"),
        ("wait: {deployment: dev/web, for: available, within: 2 s}", "wait.within: '2 s' is not a duration such as 500ms, 5s or 1m"),
        ("wait: {pods: dev/app=wep, for: ready}",
         "wait.pods: no manifest of the scenario makes a pod with the labels of 'dev/app=wep' "
         "(did you mean \"dev/web\"?)"),
        ("wait: {node: node9, for: ready}", 'wait.node: the topology has no node \'node9\' (did you mean "node3"?)'),
        ("wait: {service: dev/wep, for: endpoints}",
         'wait.service: no manifest of the scenario makes the Service \'dev/wep\' (did you mean "dev/web"?)'),
        ("expect: {from: client}", "expect: wants exactly one of get, tcp, udp, resolve, arp; got none"),
        ("expect: {from: client, get: 'ftp://x/'}", "expect.get: 'ftp://x/' is not an http or https URL"),
        ("expect: {from: client, get: 'http://1.2.3.400/'}", "expect.get: '1.2.3.400' is not an IPv4 address"),
        ("expect: {from: client, get: 'http://a$(b)/'}", "expect.get: 'a$(b):80': 'a$(b)' is not an address or a host name"),
        ("expect: {from: client, get: \"http://a/\\nb\"}",
         "expect.get: 'http://a/\\nb' is not a URL: it holds blanks or control characters"),
        ("expect: {from: client, tcp: '1.2.3.4'}", "expect.tcp: '1.2.3.4' is not HOST:PORT"),
        ("expect: {from: client, tcp: '1.2.3.4:99999'}", "expect.tcp: '1.2.3.4:99999': ports go from 1 to 65535"),
        ("expect: {from: client, tcp: '1.2.3.4:80', status: 200}", "expect.status: goes with get only, not with tcp"),
        (f"expect: {{from: client, {EXPECT}, headers: {{a: \"b\\nc\"}}}}", "expect.headers.a: 'a': 'b\\nc' is not a valid header"),
        (f"expect: {{from: client, {EXPECT}, refused: true, status: 200}}",
         "expect.refused: no answer comes, so there is no status"),
        (f"expect: {{from: client, {EXPECT}, refused: true, timeout: true}}",
         "expect.timeout: a request cannot be both refused and timed out"),
        (f"expect: {{from: client, {EXPECT}, times: 299, answeredBy: {{each: dev/app=web, spread: even}}}}",
         "expect.answeredBy.spread: 'even' in proxy mode iptables, which picks pods at random, wants times of at least 300, got 299"),
        (f"expect: {{from: client, {EXPECT}, times: 300, answeredBy: {{each: dev/app=web, spread: exact}}}}",
         "expect.answeredBy.spread: 'exact' cannot hold in proxy mode iptables, which picks pods at random"),
        (f"expect: {{from: client, {EXPECT}, times: 300, answeredBy: {{same: dev/app=web, spread: even}}}}",
         "expect.answeredBy.spread: goes with each only"),
        (f"expect: {{from: client, {EXPECT}, answeredBy: {{same: dev/app=web}}}}",
         "expect.answeredBy.same: 'same' says something about several answers: set times"),
        (f"expect: {{from: client, {EXPECT}, answeredBy: dev/wep}}",
         'expect.answeredBy: no manifest of the scenario makes the pod \'dev/wep\' (did you mean "dev/web"?)'),
        (f"expect: {{from: client, {EXPECT}, sees: {{client: 'fd00::1'}}}}",
         "expect.sees.client: 'fd00::1' is an IPv6 address: IPv4 only so far"),
        (f"expect: {{from: client, {EXPECT}, sees: {{client: nobody}}}}",
         "expect.sees.client: topology 'three-nodes' has no node or host 'nobody' "
         "(there is: node1, node2, node3, client; a pod is NAMESPACE/POD)"),
        (f"expect: {{from: client, {EXPECT}, takes: {{}}}}", "expect.takes: needs atLeast, atMost or both"),
        (f"expect: {{from: client, {EXPECT}, takes: {{atLeast: 20}}}}", "expect.takes.atLeast: wants a duration such as 5s, got the number 20"),
        (f"expect: {{from: client, {EXPECT}, takes: {{atLeast: 20ms, atMost: 10ms}}}}",
         "expect.takes.atLeast: 0.02s is more than atMost, 0.01s"),
        (f"expect: {{from: client, {EXPECT}, takes: {{atMost: 2s}}}}",
         "expect.takes.atMost: 2s: an answer is not waited for longer than patience, 1s"),
        (f"expect: {{from: client, {EXPECT}, timeout: true, takes: {{atMost: 20ms}}}}",
         "expect.timeout: no answer comes, so there is no takes"),
        ("expect: {from: client, resolve: web, takes: {atMost: 20ms}}",
         "expect.takes: goes with get, tcp and udp only, not with resolve"),
        ("fault: {link: node1}", 'fault: required field "down" is missing'),
        ("fault: {link: node9, down: true}",
         "fault.link: topology 'three-nodes' has no node or host 'node9' (did you mean \"node3\"?)"),
        ("fault: {kill: dev/shell@node9}",
         "fault.kill: topology 'three-nodes' has no node or host 'node9' (did you mean \"node3\"?)"),
        ("fault: {kill: dev/shell, down: true}", "fault.down: goes with link and node only"),
        ("fault: {node: client, down: true}", "fault.node: 'client' is an outside host; only nodes can be switched off"),
        ("fault: {kill: dev/shell, stop: dev/shell}", "fault: wants exactly one of kill, stop, start, link, node; got kill and stop"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, step: str, problem: str) -> None:
    """Each mistake is reported at its line, in these words."""
    found = problems_of(write(tmp_path, step))
    place = "spec.steps[1]" + ("." if not problem.startswith(("unknown", "a step")) else ": ")
    expected = [f"scenario.yaml:{FIRST_LINE}: {place}{problem}"]
    if "aply" in step:  # then the step does nothing, too
        expected.insert(0, f"scenario.yaml:{FIRST_LINE}: spec.steps[1]: {NO_ACTION}")
    assert found == expected


def test_spread_is_free_to_be_exact_where_pods_take_turns(tmp_path: Path) -> None:
    """A step for ipvs alone may be small and exact."""
    load(
        tmp_path,
        f"{{modes: [ipvs], expect: {{from: client, {EXPECT}, times: 9, answeredBy: {{each: dev/app=web, spread: exact}}}}}}",
    )


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Mistakes of the scenario, of its topology and of its manifests are one report, in file order."""
    (tmp_path / "t.yaml").write_text("apiVersion: testbed/v1\nkind: Topology\nmetadata: {name: t}\nspec: {nodes: []}\n")
    header = HEADER.replace("three-nodes", "t.yaml").replace("proxyModes: [iptables, ipvs]", "proxyModes: [iptable]")
    write(
        tmp_path,
        "apply: nope.yaml",
        "exec: {in: dev/nobody, run: ls}",
        "wait: {deployment: dev/web, for: availible}",
        header=header,
        manifest=MANIFEST.replace("selector: {app: web}", "selectr: {app: web}"),
    )
    assert problems_of(tmp_path) == [
        "scenario.yaml:6: spec.proxyModes[0]: 'iptable' is not one of iptables, ipvs, nftables, userspace "
        '(did you mean "iptables"?)',
        "scenario.yaml:9: spec.steps[1].apply: no file 'nope.yaml' beside the scenario",
        "scenario.yaml:10: spec.steps[2].exec.in: no manifest of the scenario makes the pod 'dev/nobody' "
        "(pods come from: dev/web, dev/shell)",
        "scenario.yaml:11: spec.steps[3].wait.for: 'availible' is not one of available, deleted, endpoints, ready, running, "
        'succeeded (did you mean "available"?)',
        "t.yaml:4: spec.nodes: wants at least 1, got 0",
        't.yaml:4: spec: required field "networks" is missing',
        'web.yaml:22: spec: unknown field "selectr" (did you mean "selector"?)',
    ]


def test_a_selector_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    """The scenario is usable, and carries the warning; `validate` shows it too."""
    write(tmp_path, manifest=MANIFEST.replace("selector: {app: web}", "selector: {app: wep}"))
    (warning,) = load_scenario(tmp_path).warnings
    assert str(warning) == (
        f"{tmp_path}/web.yaml:22: warning: spec.selector: Service dev/web: selector 'app=wep' matches no pod of these manifests"
    )
    assert check_file(tmp_path) == [warning]


def test_a_namespace_that_nothing_makes(tmp_path: Path) -> None:
    """The API would refuse the objects in it."""
    write(tmp_path, manifest=MANIFEST.replace("name: dev}", "name: prod}"))
    assert problems_of(tmp_path) == [
        f"web.yaml:{line}: metadata.namespace: no manifest of the scenario makes the namespace 'dev'"
        for line in (7, 16, 21)
    ]


def test_what_kubectl_makes_is_not_known(tmp_path: Path) -> None:
    """After `kubectl create` there may be pods that no manifest shows; after `kubectl get` there are none."""
    load(
        tmp_path,
        "kubectl: {run: create deployment x --image=nginx -n dev}",
        "wait: {deployment: dev/x, for: available}",
    )
    write(tmp_path, "kubectl: {run: get pods -A}", "wait: {deployment: dev/x, for: available}")
    assert len(problems_of(tmp_path)) == 1


def test_topologies_that_are_not_there(tmp_path: Path) -> None:
    """A name is looked up beside the scenario and among ours; a path never leaves the folder."""
    write(tmp_path, header=HEADER.replace("three-nodes", "three-node"))
    assert problems_of(tmp_path)[0] == (
        "scenario.yaml:5: spec.topology: there is no topology 'three-node' (did you mean \"three-nodes\"?)"
    )
    write(tmp_path, header=HEADER.replace("three-nodes", "../../etc/passwd"))
    assert problems_of(tmp_path)[0] == "scenario.yaml:5: spec.topology: '../../etc/passwd' leaves the scenario's folder"


def test_the_schema_accepts_and_refuses(tmp_path: Path) -> None:
    """Editors get the same format: valid files pass; two actions in a step and misspelt fields do not."""
    schema = scenario_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    write(
        tmp_path,
        "wait: {deployment: dev/web, for: available, within: 20s}",
        'expect: {from: client, get: "http://a/", answeredBy: {each: dev/app=web, spread: even}}',
        "delete: {deployment: dev/web}",
    )
    (document,), _ = parse_documents((tmp_path / "scenario.yaml").read_text(), "s")
    jsonschema.validate(document.value, schema)
    for bad in (
        "{apply: a, delete: b}",
        "name: nothing",
        "wait: {deployment: a/b, fro: ready}",
        "expect: {from: 5, get: x}",
    ):
        (document,), _ = parse_documents(f"{HEADER}    - {bad}\n", "s")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document.value, schema)


def test_services_are_checked_for_the_topologys_ranges(tmp_path: Path) -> None:
    """A ClusterIP outside the topology's Service range is refused before a lab is started."""
    write(tmp_path, manifest=MANIFEST.replace("spec: {selector", "spec: {clusterIP: 10.96.4.1, selector"))
    assert problems_of(tmp_path) == [
        'web.yaml:22: spec.clusterIPs: Invalid value: []string{"10.96.4.1"}: failed to allocate IP 10.96.4.1: '
        "the provided IP (10.96.4.1) is not in the valid range. The range of valid IPs is 10.96.0.0/22"
    ]


def test_a_folder_with_a_benchmark(tmp_path: Path) -> None:
    """Who runs a benchmark's folder as a scenario is told what to type."""
    (tmp_path / "benchmark.yaml").write_text("")
    with pytest.raises(ManifestError) as refused:
        load_scenario(tmp_path)
    assert str(refused.value) == f"{tmp_path}: holds a benchmark, not a scenario: `testbed bench run {tmp_path}`"
