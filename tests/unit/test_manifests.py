"""Kubernetes manifests and the YAML under them: values, lines, and every problem of a file."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.errors import ManifestError
from testbed.manifests import check_file, check_files, load_objects
from testbed.manifests.source import find_line, parse_documents

DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: dev}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
    spec:
      containers:
        - name: web
          image: nginx
"""


def parsed(text: str) -> tuple[list[Any], list[str]]:
    documents, problems = parse_documents(text, "f.yaml")
    return [document.value for document in documents], [str(problem) for problem in problems]


def problems_of(tmp_path: Path, text: str, name: str = "f.yaml") -> list[str]:
    path = tmp_path / name
    path.write_text(text)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in check_file(path)]


# ── YAML ──


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("y", True),
        ("'yes'", "yes"),
        ("~", None),
        ("0644", 420),
        ("0o17", 15),
        ("0x1F", 31),
        ("089", 89.0),
        ("1_000", 1000),
        ("-5", -5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("22:22", "22:22"),
        ("2020-01-01", "2020-01-01"),
        ("'.inf'", ".inf"),
        ("1.2.3.4", "1.2.3.4"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("|\n  a\n  b", "a\nb\n"),
    ],
)
def test_plain_scalars_mean_what_they_mean_to_kubectl(text: str, value: object) -> None:
    """YAML 1.1 by go-yaml's rules: words and octals count, dates and base-60 numbers are text."""
    assert parsed(f"- {text}\n") == ([[value]], [])
    assert type(parsed(f"- {text}\n")[0][0][0]) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 'f.yaml:3: duplicate key "a" (first in line 1)'),
        ("a: !!python/object/apply:os.system ['x']\n", "f.yaml:1: YAML tag !!python/object/apply:os.system is not supported"),
        ("a: &a [*a]\n", "f.yaml:1: YAML syntax: anchor &a contains itself"),
        ("a: *b\n", "f.yaml:1: YAML syntax: no anchor &b before this alias"),
        ("a: .nan\n", "f.yaml:1: .nan is no number that JSON has (json: unsupported value: NaN); for text, quote it"),
        ("a: -.Inf\n", "f.yaml:1: -.Inf is no number that JSON has (json: unsupported value: -Inf); for text, quote it"),
        ("a:\n  b: 0x" + 9998 * "f", "f.yaml:2: 0xffffffffffffffffff… (10000 characters) is no number that JSON has "
         "(json: unsupported value: +Inf); for text, quote it"),
        ("[a]: b\n", "f.yaml:1: a mapping or list cannot be a key"),
        ("a: b\nc: \x07\n", "f.yaml:2: YAML syntax: control characters are not allowed"),
        ("[" * 101, "f.yaml:1: nested deeper than 100 levels"),
        ("a:\n\tb: 1\n", "f.yaml:2: YAML syntax: while scanning for the next token, "
         "found character that cannot start any token"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text: str, problem: str) -> None:
    """Mistakes of YAML itself have their line; nothing in a file is executed."""
    assert parsed(text)[1] == [problem]


def test_aliases_cannot_fill_the_memory() -> None:
    """Nine lines that stand for a billion values are refused before they are built."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert parsed("\n".join(lines))[1] == ["f.yaml:5: aliases stand for more than 100000 values"]


def test_aliases_are_copies_and_merge_keys_give_way() -> None:
    """What is written under an anchor can be changed in one place only; a key of one's own wins over a merged one."""
    (value,), problems = parsed("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    assert problems == []
    assert value == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}
    assert value["a"]["y"] is not value["b"]["y"]


def test_documents_before_a_syntax_error_are_kept() -> None:
    """A mistake further down does not hide what comes before it."""
    values, problems = parsed("a: 1\n---\n---\nb: [\n")
    assert values == [{"a": 1}]
    assert len(problems) == 1


def test_every_path_has_its_line() -> None:
    """Fields are found by Kubernetes' paths, with keys that hold dots, and as near as possible when absent."""
    (document,), _ = parse_documents(DEPLOYMENT.replace("{app: web}\n    spec", "{a.b/c: web}\n    spec"), "f.yaml")
    assert find_line(document.lines, "spec.template.metadata.labels.a.b/c") == 9
    assert find_line(document.lines, "spec.template.metadata.labels[a.b/c]") == 9
    assert find_line(document.lines, "spec.template.spec.containers[0].image") == 13
    assert find_line(document.lines, "spec.template.spec.containers[0].ports[0]") == 12
    assert find_line(document.lines, "spec.strategy") == 4
    assert find_line(document.lines, "") == 1
    assert document.line_of(("spec", "template", "spec", "containers", 0, "image")) == 13


# ── objects ──


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param("replicas: 3", "replica: 3", [
            'f.yaml:5: spec: unknown field "replica" (did you mean "replicas"?)'], id="unknown field"),
        pytest.param("image: nginx", "imgae: nginx", [
            'f.yaml:13: spec.template.spec.containers[0]: unknown field "imgae" (did you mean "image"?)'], id="in a container"),
        pytest.param("replicas: 3", "replicas: three", [
            "f.yaml:5: spec.replicas: wants a whole number, got the text 'three'"], id="wrong type"),
        pytest.param("image: nginx", "image: nginx\n          ports: 80", [
            "f.yaml:14: spec.template.spec.containers[0].ports: wants a list, got the number 80"], id="not a list"),
        pytest.param("labels: {app: web}", "labels: {app: 5}", [
            "f.yaml:9: spec.template.metadata.labels.app: wants text, got the number 5"], id="label that is a number"),
        pytest.param("kind: Deployment", "kind: Deploymnet", [
            'f.yaml:2: no kind "Deploymnet" in version "apps/v1" (did you mean "Deployment"?)'], id="misspelt kind"),
        pytest.param("kind: Deployment\n", "", ['f.yaml:1: required field "kind" is missing'], id="no kind"),
        pytest.param("kind: Deployment", "kind: 5", ["f.yaml:2: kind: wants text, got the number 5"], id="kind is a number"),
        pytest.param("metadata: {name: web, namespace: dev}\n", "", ['f.yaml:1: required field "metadata" is missing'],
                     id="no metadata"),
        pytest.param("{name: web, namespace: dev}", "{namespace: dev}", [
            'f.yaml:3: metadata: required field "name" is missing'], id="no name"),
        pytest.param("{name: web, namespace: dev}", "5", ["f.yaml:3: metadata: wants a mapping, got the number 5"],
                     id="metadata is a number"),
        pytest.param("apiVersion: apps/v1", "apiVersion: testbed/v1", [
            "f.yaml:2: testbed/v1 has the kinds Topology, Scenario and Benchmark, not 'Deployment'"], id="not one of our kinds"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    """Each mistake in an object is reported at its line, in these words, and causes no other report."""
    assert DEPLOYMENT.count(old) == 1 or old == "image: nginx"
    text = (
        DEPLOYMENT.replace(old, new)
        if DEPLOYMENT.count(old) == 1
        else DEPLOYMENT.replace(f"          {old}", f"          {new}")
    )
    assert problems_of(tmp_path, text) == expected


@pytest.mark.parametrize("field", ["name", "namespace", "generateName"])
@pytest.mark.parametrize("name", ["a\nb", "../a", "$(x)", "a;b", "a/b", "a b", "..", ".", "a%2f"])
def test_hostile_names_are_refused(tmp_path: Path, field: str, name: str) -> None:
    """Names become path segments and arguments, also those of kinds we know nothing about."""
    quoted = '"' + name.replace("\n", "\\n") + '"'
    metadata = f"{{{field}: {quoted}}}" if field == "name" else f"{{name: a, {field}: {quoted}}}"
    text = f"apiVersion: example.com/v1\nkind: Anything\nmetadata: {metadata}\n"
    assert problems_of(tmp_path, text) == [f"f.yaml:3: metadata.{field}: {name!r} is not a valid name"]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Several mistakes in several objects, and a syntax error after them, are all in one report."""
    text = (
        DEPLOYMENT.replace("replicas: 3", "replica: 3").replace("image:", "imgae:")
        + "---\n5\n---\nkind: Pod\n---\na: [\n"
    )
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        load_objects(path)
    assert [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems] == [
        'f.yaml:5: spec: unknown field "replica" (did you mean "replicas"?)',
        'f.yaml:13: spec.template.spec.containers[0]: unknown field "imgae" (did you mean "image"?)',
        "f.yaml:15: wants a Kubernetes object, got the number 5",
        'f.yaml:17: required field "apiVersion" is missing',
        'f.yaml:17: required field "metadata" is missing',
        "f.yaml:17: spec.containers: Required value",
        "f.yaml:20: YAML syntax: while parsing a flow node, did not find expected node content",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "kind: Service\nmetadata:\n  name: a\n  namespace: [x]\n  labels: 5\nspec:\n  ports: {a: 80}\n  type: 7\n"
            "  clusterIP: 5\n  sessionAffinity: Maybe\n",
            [
                "f.yaml:5: metadata.namespace: wants text, got a list",
                "f.yaml:6: metadata.labels: wants a mapping, got the number 5",
                "f.yaml:8: spec.ports: wants a list, got a mapping",
                "f.yaml:9: spec.type: wants text, got the number 7",
                "f.yaml:10: spec.clusterIP: wants text, got the number 5",
                'f.yaml:11: spec.sessionAffinity: Unsupported value: "Maybe": supported values: "ClientIP", "None"',
            ],
            id="types of every field, and a rule",
        ),
        pytest.param(
            "kind: Service\nmetadata: {name: a}\nspec:\n  type: 7\n  externalTrafficPolicy: Local\n"
            "  ports: [{port: 80, nodePort: 30080}, {port: 0}]\n",
            [
                "f.yaml:5: spec.type: wants text, got the number 7",
                "f.yaml:7: spec.ports[0].name: Required value",
                "f.yaml:7: spec.ports[1].name: Required value",
                "f.yaml:7: spec.ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "f.yaml:7: spec.ports[1].targetPort: Invalid value: 0: must be between 1 and 65535, inclusive",
            ],
            id="what may be right with the type that was meant is not told",
        ),
        pytest.param(
            "kind: Pod\nmetadata:\n  name: 123\nspec:\n  containers: 5\n",
            [
                "f.yaml:4: metadata.name: wants text, got the number 123",
                "f.yaml:6: spec.containers: wants a list, got the number 5",
            ],
            id="name and containers",
        ),
        pytest.param(
            "kind: Pod\nmetadata: null\n",
            ["f.yaml:1: spec.containers: Required value", 'f.yaml:3: required field "metadata" is missing'],
            id="no metadata and no spec",
        ),
        pytest.param(
            "kind: Pod\nmetadata:\n  name: a/b\nspec:\n  restartPolicy: Sometimes\n  containers:\n  - imgae: x\n    name: c\n",
            [
                "f.yaml:4: metadata.name: 'a/b' is not a valid name",
                'f.yaml:6: spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always", "Never", "OnFailure"',
                'f.yaml:8: spec.containers[0]: unknown field "imgae" (did you mean "image"?)',
            ],
            id="hostile name, rule, misspelt field that is then not missing",
        ),
        pytest.param(
            "kind: ConfigMap\nmetadata:\n  name: ..\n  labels:\n    ok: ok\n    not ok: x\ndata:\n  '..': yes\n  n: 12\n",
            [
                "f.yaml:4: metadata.name: '..' is not a valid name",
                'f.yaml:7: metadata.labels: Invalid value: "not ok": name part must consist of alphanumeric characters, '
                "'-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or "
                "'123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
                "f.yaml:9: data[..]: Invalid value: \"..\": must not be '..'",
                "f.yaml:9: data[..]: wants text, got the boolean true",
                "f.yaml:10: data.n: wants text, got the number 12",
            ],
            id="keys and values, each at its own line",
        ),
    ],
)
def test_what_cannot_be_read_hides_nothing_else(tmp_path: Path, text: str, expected: list[str]) -> None:
    """Every problem of an object is told at its own line, and nothing that only follows from another problem."""
    assert problems_of(tmp_path, f"apiVersion: v1\n{text}") == expected


def test_a_size_is_told_of_the_largest_value(tmp_path: Path) -> None:
    """The API names no field for a ConfigMap that is too large; a file has one that makes it so."""
    big = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  small: x\n  big: " + "x" * 2**20 + "\n"
    assert problems_of(tmp_path, big) == ["f.yaml:6: data.big: Too long: must have at most 1048576 bytes"]


def test_an_object_defined_twice_is_a_warning(tmp_path: Path) -> None:
    """Both lines are named, and the second is checked like the first; the same name elsewhere is another object."""
    text = SERVICE.replace("WEB", "web") + "---\n" + SERVICE + "---\n" + DEPLOYMENT
    text += "---\n" + SERVICE.replace("WEB", "web").replace("dev", "prod").replace("  selector: {app: web}\n", "")
    assert problems_of(tmp_path, text) == [
        "f.yaml:8: warning: Service dev/web is defined twice in this file, first in line 1: the later one wins",
        "f.yaml:13: warning: spec.selector: Service dev/web: selector 'app=WEB' matches no pod of these manifests",
    ]


def test_lists_are_taken_apart(tmp_path: Path) -> None:
    """The items of a List are objects with lines of their own."""
    path = tmp_path / "f.yaml"
    path.write_text("apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- apiVersion: v1\n"
                    "  kind: ConfigMapList\n  items:\n  - {apiVersion: v1, kind: ConfigMap, metadata: {name: b}}\n")  # fmt: skip
    objects = load_objects(path)
    assert [(source.kind, source.namespace, source.name, source.line) for source in objects] == [
        ("Namespace", "", "a", 4),
        ("ConfigMap", "default", "b", 8),
    ]
    assert objects[1].line_of("metadata.name") == 8


def test_unknown_kinds_of_other_groups_pass(tmp_path: Path) -> None:
    """A custom resource is stored as it is; nobody here knows its fields."""
    text = "apiVersion: network.kubesphere.io/v1alpha2\nkind: Eip\nmetadata: {name: a}\nspec: {address: 1.2.3.4}\n"
    assert problems_of(tmp_path, text) == []


SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: dev}
spec:
  ports: [{port: 80}]
  selector: {app: WEB}
"""


def test_a_selector_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    """Files given together are one set of manifests; a warning does not stop them from being used."""
    service, deployment = tmp_path / "service.yaml", tmp_path / "deployment.yaml"
    service.write_text(SERVICE.replace("WEB", "web"))
    deployment.write_text(DEPLOYMENT)
    assert check_files([service, deployment]) == []
    service.write_text(SERVICE)
    (warning,) = check_files([service, deployment])
    assert str(warning) == (
        f"{service}:6: warning: spec.selector: Service dev/web: selector 'app=WEB' matches no pod of these manifests"
    )
    assert [source.name for source in load_objects(service)] == ["web"]


def test_large_files_are_read_in_linear_time() -> None:
    """Two thousand Services give two thousand documents, each with its lines."""
    documents, problems = parse_documents("---\n".join([SERVICE] * 2000), "f.yaml")
    assert problems == []
    assert len(documents) == 2000
    assert documents[-1].line_of(("spec", "selector", "app")) == 1999 * 7 + 6


def service(name: str, cluster_ip: str, node_port: int, protocol: str = "TCP") -> str:
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: NodePort\n  clusterIP: {cluster_ip}\n"
        f"  ports:\n  - {{port: 80, nodePort: {node_port}, protocol: {protocol}}}\n---\n"
    )


def test_addresses_and_ports_that_cannot_be_had(tmp_path: Path) -> None:
    """Out of range and taken are found before there is a cluster; UDP and TCP do not share numbers' owners."""
    text = (
        service("a", "10.96.1.10", 30888)
        + service("b", "10.96.1.10", 30888)
        + service("c", "10.1.1.1", 80)
        + service("d", "10.96.0.1", 30888, "UDP")
        + service("a", "10.96.1.10", 30888)
    )
    again = "f.yaml:37: warning: Service default/a is defined twice in this file, first in line 1: the later one wins"
    taken = "provided port is already allocated (to Service default/a)"
    assert problems_of(tmp_path, text) == [
        'f.yaml:15: spec.clusterIPs: Invalid value: []string{"10.96.1.10"}: failed to allocate IP 10.96.1.10: '
        "provided IP is already allocated (to Service default/a)",
        f"f.yaml:17: spec.ports[0].nodePort: Invalid value: 30888: {taken}",
        'f.yaml:24: spec.clusterIPs: Invalid value: []string{"10.1.1.1"}: failed to allocate IP 10.1.1.1: '
        "the provided IP (10.1.1.1) is not in the valid range. The range of valid IPs is 10.96.0.0/12",
        "f.yaml:26: spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. "
        "The range of valid ports is 30000-32767",
        'f.yaml:33: spec.clusterIPs: Invalid value: []string{"10.96.0.1"}: failed to allocate IP 10.96.0.1: '
        "provided IP is already allocated (to Service default/kubernetes)",
        again,
    ]


def test_a_topology_among_the_files_sets_the_ranges(tmp_path: Path) -> None:
    """Manifests checked together with a topology are checked for its cluster."""
    topology = Path(__file__).parents[2] / "topologies/three-nodes.yaml"
    path = tmp_path / "f.yaml"
    path.write_text(service("a", "10.96.4.1", 30000))
    assert check_files([path]) == []
    (problem,) = check_files([topology, path])
    assert problem.message.endswith("The range of valid IPs is 10.96.0.0/22")
