"""Strategic merge patches: merge keys, directives, and the order of lists."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import copy
from typing import Any

import pytest
from registry_support import refusal

from testbed.api.merge_keys import MERGE_KEYS
from testbed.api.strategic import strategic_merge
from testbed.manifests.kinds.fields import STRUCTS

A, B, C = ({"name": name, "image": f"{name}:1"} for name in "abc")


def containers(*items: Any, **more: Any) -> dict[str, Any]:
    return {"containers": list(items), **more}


@pytest.mark.parametrize(
    ("original", "patch", "expected"),
    [
        pytest.param({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}, "a": None}, {"b": {"c": 2, "d": 3}}, id="as a merge patch"),
        pytest.param(containers(A, B), containers({"name": "b", "image": "b:2"}), containers(A, {"name": "b", "image": "b:2"}), id="an element is merged by its key"),
        pytest.param(containers(A), containers(C), containers(C, A), id="a new element goes where the patch has it: first"),
        pytest.param(containers(A, B), containers({"name": "a", "$patch": "delete"}), containers(B), id="an element is deleted"),
        pytest.param(containers(A, B), containers({"$patch": "replace"}, C), containers(C), id="a list is replaced"),
        pytest.param(containers(A, B), containers(C, **{"$setElementOrder/containers": [{"name": "a"}, {"name": "c"}, {"name": "b"}]}), containers(A, C, B), id="the order is set"),
        pytest.param(containers(A, B, C), {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}]}, containers(B, C, A), id="the order is set without a list; what the server alone has keeps its place"),
        pytest.param({"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "b"}]}, {"tolerations": [{"key": "b"}]}, id="a list without a key is replaced"),
        pytest.param({"nodeSelector": {"a": "b"}}, {"nodeSelector": {"$patch": "replace", "c": "d"}}, {"nodeSelector": {"c": "d"}}, id="an object is replaced"),
        pytest.param({"nodeSelector": {"a": "b"}}, {"nodeSelector": {"$patch": "delete"}}, {"nodeSelector": {}}, id="an object is emptied"),
        pytest.param({"volumes": [{"name": "v", "emptyDir": {}}]}, {"volumes": [{"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}}]}, {"volumes": [{"name": "v", "secret": {"secretName": "s"}}]}, id="retainKeys drops what is not named"),
        pytest.param({}, containers({"name": "a", "env": [{"name": "x", "$patch": "delete"}, {"name": "y", "value": "1"}]}), containers({"name": "a", "env": [{"name": "y", "value": "1"}]}), id="directives do not end up in what is new"),
        pytest.param(containers({"name": "a", "ports": [{"containerPort": 80, "name": "http"}]}), containers({"name": "a", "ports": [{"containerPort": 80, "protocol": "TCP"}, {"containerPort": 81}]}), containers({"name": "a", "ports": [{"containerPort": 80, "name": "http", "protocol": "TCP"}, {"containerPort": 81}]}), id="keys may be numbers, and lists lie in lists"),
    ],
)  # fmt: skip
def test_patches_of_a_pod_spec(original: dict[str, Any], patch: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each rule on a PodSpec; neither the original nor the patch is touched."""
    before = copy.deepcopy((original, patch))
    assert strategic_merge(original, patch, "PodSpec") == expected
    assert (original, patch) == before


@pytest.mark.parametrize(
    ("finalizers", "patch", "expected"),
    [
        (["a"], {"finalizers": ["b", "a"]}, ["b", "a"]),
        (["a", "b"], {"$deleteFromPrimitiveList/finalizers": ["a"]}, ["b"]),
        (["a", "b"], {"finalizers": ["c"], "$setElementOrder/finalizers": ["b", "c"]}, ["a", "b", "c"]),
        (["a"], {"finalizers": None}, None),
    ],
)
def test_sets_of_plain_values(finalizers: list[str], patch: dict[str, Any], expected: list[str] | None) -> None:
    """Finalizers are a set: a patch adds to it, and takes away by name."""
    assert strategic_merge({"finalizers": finalizers}, patch, "ObjectMeta").get("finalizers") == expected


@pytest.mark.parametrize(
    "patch",
    [
        {"$patch": "explode"},
        containers({"image": "x"}),
        containers("a"),
        containers({"name": "a", "$patch": "explode"}),
        {"volumes": [{"name": "v", "$retainKeys": ["name"], "secret": {}}]},
        {"volumes": [{"name": "v", "$retainKeys": "name"}]},
        {"$setElementOrder/containers": 1},
        {"$deleteFromPrimitiveList/containers": {}},
    ],
)
def test_directives_that_make_no_sense(patch: dict[str, Any]) -> None:
    """A 400 says what is wrong with them."""
    original = {"containers": [A], "volumes": [{"name": "v"}]}
    error = refusal(strategic_merge, original, patch, "PodSpec")
    assert (error.code, error.reason) == (400, "BadRequest")


def test_the_merge_keys_are_fields() -> None:
    """Every list in the table exists, and so does its key."""
    for struct, lists in MERGE_KEYS.items():
        for field, key in lists.items():
            type_ = STRUCTS[struct][field]
            assert type_.startswith("[]"), (struct, field)
            assert (key == "") == (type_ == "[]string")
            assert not key or key in STRUCTS[type_.removeprefix("[]v1.")], (struct, field)
