"""Bodies in protobuf, written here by hand as client-go writes them."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_support import refusal

from testbed.api.protobuf import parse_protobuf
from testbed.errors import ApiError


def field(number: int, value: int | str | bytes) -> bytes:
    """Return one field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def envelope(api_version: str, kind: str, raw: bytes) -> bytes:
    return b"k8s\0" + field(1, field(1, api_version) + field(2, kind)) + field(2, raw) + field(3, "") + field(4, "")


def metadata(name: str) -> bytes:
    # a Go ObjectMeta is sent whole: generateName, namespace, uid … are there and empty
    empty = b"".join(field(number, "") for number in (2, 3, 4, 5, 6)) + field(7, 0) + field(8, b"")
    return field(1, name) + empty + field(11, field(1, "app") + field(2, "web"))


def test_a_service() -> None:
    """Text, numbers, maps, lists, int-or-string; what Go sends empty is left out."""
    target = field(1, 1) + field(2, 0) + field(3, "http")
    port = field(1, "web") + field(2, "TCP") + field(3, 80) + field(4, target) + field(5, 0)
    spec = field(1, port) + field(2, field(1, "a") + field(2, "b")) + field(4, "ClusterIP") + field(3, "")
    body = envelope("v1", "Service", field(1, metadata("web")) + field(2, spec) + field(3, field(1, b"")))
    assert parse_protobuf(body) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {
            "ports": [{"name": "web", "protocol": "TCP", "port": 80, "targetPort": "http"}],
            "selector": {"a": "b"},
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def test_pointers_keep_their_zeros() -> None:
    """replicas: 0 is something that somebody has said; embedded messages are their parent's fields."""
    volume = field(1, "v") + field(2, field(2, field(1, "")))  # VolumeSource{emptyDir}
    template = field(2, field(1, volume) + field(2, field(1, "c") + field(2, "nginx")))
    spec = field(1, 0) + field(3, template)
    decoded = parse_protobuf(envelope("apps/v1", "Deployment", field(2, spec)))
    assert decoded["spec"]["replicas"] == 0
    assert decoded["spec"]["template"]["spec"] == {
        "volumes": [{"name": "v", "emptyDir": {}}],
        "containers": [{"name": "c", "image": "nginx"}],
    }


def test_bytes_and_times() -> None:
    """Secret data is base64 in JSON; a time is RFC 3339."""
    secret = parse_protobuf(envelope("v1", "Secret", field(2, field(1, "k") + field(2, b"\x00\xff"))))
    assert secret["data"] == {"k": "AP8="}
    created = field(1, field(8, field(1, 1704067200) + field(2, 0)))
    assert parse_protobuf(envelope("v1", "Pod", created))["metadata"]["creationTimestamp"] == "2024-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"k8s\0", b"k8s\0\x0a", b"k8s\0\x0a\xff", envelope("v1", "Nothing", b""), envelope("v1", "Pod", b"\x0a\x05x"),
        envelope("v1", "Pod", field(1, 5)), envelope("v1", "Pod", field(1, field(1, b"\xff\xfe"))), envelope("v1", "Pod", b"\x00"),
        envelope("v1", "Pod", b"\x0b\x0c"), envelope("v1", "ConfigMap", b"\xff" * 11),
        envelope("v1", "Pod", field(1, field(8, field(1, (1 << 62))))),
    ],
)  # fmt: skip
def test_bodies_that_are_no_protobuf(body: bytes) -> None:
    """A 400 that says so."""
    error = refusal(parse_protobuf, body)
    assert (error.code, error.reason) == (400, "BadRequest")


@given(st.binary(max_size=200), st.sampled_from(["Pod", "Service", "Node", "Event"]))
def test_anything_is_an_object_or_a_400(raw: bytes, kind: str) -> None:
    """No bytes make it fail in another way."""
    seen: Any
    try:
        seen = parse_protobuf(envelope("v1", kind, raw))
    except ApiError as error:
        assert error.code == 400
    else:
        assert seen["kind"] == kind
