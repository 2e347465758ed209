"""Label and field selectors of list and watch requests.

Grammar of a label selector, comma-separated, all of which must hold::

    a   !a   a=b   a==b   a!=b   a in (b,c)   a notin (b,c)   a>1   a<1

``!=`` and ``notin`` also hold for objects without the label.
Source: kubernetes apimachinery/pkg/labels/selector.go, pkg/fields/selector.go (v1.30).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from testbed.errors import ApiError
from testbed.manifests.kinds.names import label_value_problems, qualified_name_problems
from testbed.model.objects import Object

Matcher = Callable[[Object], bool]

_TERM = re.compile(
    r"""\s*(?:
      (?P<absent>!)\s*(?P<absent_key>[^\s=!<>,()]+)
    | (?P<set_key>[^\s=!<>,()]+)\s+(?P<set_operator>in|notin)\s*\((?P<values>[^()]*)\)
    | (?P<key>[^\s=!<>,()]+)\s*(?P<operator>==|=|!=|<|>)\s*(?P<value>[^\s=!<>,()]*)
    | (?P<exists>[^\s=!<>,()]+)
    )\s*(?P<end>,|\Z)""",
    re.VERBOSE,
)


def _bad_selector(text: str, why: str) -> ApiError:
    return ApiError(400, "BadRequest", f"unable to parse requirement: {why} in selector {text!r}")


def parse_label_selector(text: str) -> Callable[[dict[str, str]], bool] | None:
    """Return what says whether labels match, or None for the selector that matches everything."""
    tests: list[Callable[[dict[str, str]], bool]] = []
    at = 0
    if not text.strip():
        return None
    while at < len(text) or not tests:
        term = _TERM.match(text, at)
        if term is None:
            raise _bad_selector(text, f"unexpected text at position {at}")
        at = term.end()
        tests.append(_label_test(text, term))
        if term["end"] == "," and at >= len(text):
            raise _bad_selector(text, "found end of text after ','")
    return lambda labels: all(test(labels) for test in tests)


def _label_test(text: str, term: re.Match[str]) -> Callable[[dict[str, str]], bool]:
    key = term["absent_key"] or term["set_key"] or term["key"] or term["exists"]
    for problem in qualified_name_problems(key):
        raise _bad_selector(text, f"invalid label key {key!r}: {problem}")
    if term["absent"]:
        return lambda labels: key not in labels
    if term["exists"]:
        return lambda labels: key in labels
    operator = term["set_operator"] or term["operator"]
    values = {value.strip() for value in term["values"].split(",")} if term["set_key"] else {term["value"]}
    if operator in ("<", ">"):
        return _number_test(text, key, operator, term["value"])
    for value in values:
        for problem in label_value_problems(value):
            raise _bad_selector(text, f"invalid label value {value!r}: {problem}")
    if operator in ("=", "==", "in"):
        return lambda labels: key in labels and labels[key] in values
    return lambda labels: labels.get(key) not in values


def _number_test(text: str, key: str, operator: str, value: str) -> Callable[[dict[str, str]], bool]:
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise _bad_selector(text, f"for 'Gt', 'Lt' operators, the value must be an integer, got {value!r}")
    bound = int(value)

    def test(labels: dict[str, str]) -> bool:
        have = labels.get(key, "")
        if not re.fullmatch(r"-?[0-9]{1,18}", have):
            return False
        return int(have) > bound if operator == ">" else int(have) < bound

    return test


#: Which fields a resource can be selected by, beside metadata.name and metadata.namespace.
FIELDS: dict[str, frozenset[str]] = {
    "pods": frozenset(
        {"spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork"}
        | {"status.phase", "status.podIP", "status.nominatedNodeName"}
    ),
    "events": frozenset(
        {
            f"involvedObject.{part}"
            for part in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
        }
        | {"reason", "reportingComponent", "source", "type"}
    ),
    "namespaces": frozenset({"status.phase"}),
    "nodes": frozenset({"spec.unschedulable"}),
    "secrets": frozenset({"type"}),
    "services": frozenset({"spec.clusterIP", "spec.type"}),
    "replicasets.apps": frozenset({"status.replicas"}),
    "jobs.batch": frozenset({"status.successful"}),
}
_COMMON_FIELDS = frozenset({"metadata.name", "metadata.namespace"})


def parse_field_selector(text: str, resource: str) -> Matcher | None:
    """Return what says whether an object matches, or None for the selector that matches everything."""
    tests: list[tuple[list[str], bool, str]] = []
    for term in filter(None, text.split(",")):
        field, operator, value = _split_field_term(term)
        if field not in _COMMON_FIELDS and field not in FIELDS.get(resource, frozenset()):
            raise ApiError(400, "BadRequest", f'field label not supported: "{field}"')
        tests.append((field.split("."), operator != "!=", value))
    if not tests:
        return None
    return lambda obj: all((_field_text(obj, path) == value) == wanted for path, wanted, value in tests)


def _split_field_term(term: str) -> tuple[str, str, str]:
    for operator in ("!=", "==", "="):
        field, found, value = term.partition(operator)
        if found:
            return field, operator, value
    raise ApiError(400, "BadRequest", f"invalid field selector: {term!r}; can't understand it")


def _field_text(obj: Object, path: list[str]) -> str:
    value: object = obj
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):  # events: source means source.component
        value = value.get("component")
    return "" if value is None else str(value)


def parse_selectors(label_selector: str, field_selector: str, resource: str) -> Matcher | None:
    """Return one test for both selectors, or None when everything matches."""
    labels, fields = parse_label_selector(label_selector), parse_field_selector(field_selector, resource)
    if labels is None:
        return fields

    def matches(obj: Object) -> bool:
        return labels(obj["metadata"].get("labels") or {}) and (fields is None or fields(obj))

    return matches
