"""Field tables, names and rules that need no cluster: what `testbed validate` shares with the registry."""

from __future__ import annotations

import pytest
from registry_support import deployment, pod, service

from testbed.manifests import kinds
from testbed.manifests.kinds import names
from testbed.manifests.kinds.causes import go_value
from testbed.manifests.kinds.fields import KINDS, STRUCTS
from testbed.model.objects import RESOURCES


def test_every_resource_has_a_table() -> None:
    """Each kind of the resource table has its fields, and every struct that a field names is there."""
    assert {resource.key for resource in RESOURCES} == KINDS.keys()
    named = {type_.split("v1.")[-1] for fields in STRUCTS.values() for type_ in fields.values() if "v1." in type_}
    assert named <= STRUCTS.keys()


def test_unknown_fields_are_found_where_they_are() -> None:
    """Unknown fields are reported by their path, in lists and templates too; known ones are not."""
    assert kinds.unknown_fields(service()) == []
    odd = service(ports=[{"port": 80}, {"port": 81, "nodeport": 30000}], sessionaffinity="None")
    assert kinds.unknown_fields(odd) == ["spec.ports[1].nodeport", "spec.sessionaffinity"]
    manifest = deployment()
    manifest["spec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    assert kinds.unknown_fields(manifest) == ["spec.template.spec.containers[0].imagePullpolicy"]
    assert "imagePullPolicy" in kinds.known_fields(manifest, "spec.template.spec.containers[0].imagePullpolicy")


def test_validate_object_judges_what_the_user_wrote() -> None:
    """Defaults are filled in first, every problem is reported, and the manifest itself is left alone."""
    manifest = service(ports=[{"port": 0, "targetPort": 80, "protocol": "X"}], type="Y")
    before = repr(manifest)
    fields = [cause.field for cause in kinds.validate_object(manifest)]
    assert fields == ["spec.ports[0].port", "spec.ports[0].protocol", "spec.type"]
    assert repr(manifest) == before
    assert kinds.validate_object(service()) == kinds.validate_object(pod()) == kinds.validate_object(deployment()) == []
    assert kinds.default_object(service())["spec"]["ports"][0]["targetPort"] == 80
    assert [cause.reason for cause in kinds.validate_object(service(ports="x"))] == ["FieldValueTypeInvalid"]


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (names.dns1123_label_problems, ["a", "0a-b", "a" * 63], ["", "A", "a.b", "-a", "a-", "a\n", "a" * 64, "ä"]),
        (names.dns1123_subdomain_problems, ["a.b-c", "1.2.3.4"], ["a..b", ".a", "a_b", "a" * 254, "a\n", "a/b"]),
        (names.dns1035_label_problems, ["a1"], ["1a", "a.b", "a" * 64]),
        (names.qualified_name_problems, ["a", "x.io/A_b.c", "a" * 63], ["", "/a", "x/", "a/b/c", "X.io/a", "a" * 64, "a b"]),
        (names.label_value_problems, ["", "A_b-c.1"], ["a b", "-a", "a" * 64, "a\n", "a;b"]),
        (names.config_key_problems, ["a.b", ".bashrc", "A_1-x"], ["", ".", "..", "..a", "a/b", "a b", "a\n"]),
        (names.port_name_problems, ["http", "a-1"], ["", "1", "a--b", "-a", "a" * 16, "A", "a_b"]),
        (names.env_name_problems, ["A", "_a.b-c"], ["", "1A", "A=B", "A\n"]),
        (names.path_segment_problems, ["system:x"], [".", "..", "a/b", "a%b"]),
        (names.address_problems, ["10.0.0.1", "fd00::1"], ["", "10.0.0", "10.0.0.1/8", "fe80::1%eth0", "x"]),
    ],
)  # fmt: skip
def test_names(check: object, good: list[str], bad: list[str]) -> None:
    """Each rule takes what Kubernetes takes, and nothing that could break out of a file name, a URL or a command."""
    assert callable(check)
    assert [value for value in good if check(value)] == []
    assert [value for value in bad if not check(value)] == []


def test_values_are_printed_as_go_prints_them() -> None:
    """Strings are quoted and escaped, numbers bare, lists and maps in Go's syntax."""
    assert go_value('a"\n\x01é') == '"a\\"\\n\\x01é"'
    assert [go_value(value) for value in (80, True, None)] == ["80", "true", "null"]
    assert go_value(["a", "b"]) == '[]string{"a", "b"}'
    assert go_value({"b": "2", "a": "1"}) == 'map[string]string{"a":"1", "b":"2"}'
