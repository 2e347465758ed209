"""Deployments, ReplicaSets, DaemonSets and Jobs: defaults, and the rules that need no cluster to check.

Source: kubernetes pkg/apis/{apps,batch}/v1/defaults.go, pkg/apis/{apps,batch}/validation (v1.30).
"""

from __future__ import annotations

import re
from typing import Any

from testbed.manifests.kinds.causes import Causes, GoText, go_map, go_value
from testbed.manifests.kinds.metadata import selector_matches, validate_annotations, validate_labels, validate_selector
from testbed.manifests.kinds.pod import default_pod_spec, validate_pod_spec
from testbed.model.objects import Object

_PERCENT = re.compile(r"[0-9]+%")


def default_deployment(obj: Object) -> None:
    """Fill in the defaults of a Deployment."""
    spec = obj.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    strategy = spec.setdefault("strategy", {})
    strategy["type"] = strategy.get("type") or "RollingUpdate"
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", "25%")
        rolling.setdefault("maxSurge", "25%")
    _default_template(spec)


def default_replica_set(obj: Object) -> None:
    """Fill in the defaults of a ReplicaSet."""
    spec = obj.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    _default_template(spec)


def default_daemon_set(obj: Object) -> None:
    """Fill in the defaults of a DaemonSet."""
    spec = obj.setdefault("spec", {})
    spec.setdefault("revisionHistoryLimit", 10)
    strategy = spec.setdefault("updateStrategy", {})
    strategy["type"] = strategy.get("type") or "RollingUpdate"
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", 1)
        rolling.setdefault("maxSurge", 0)
    _default_template(spec)


def default_job(obj: Object) -> None:
    """Fill in the defaults of a Job, but for its selector, which needs the Job's uid."""
    spec = obj.setdefault("spec", {})
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("backoffLimit", 6)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)
    _default_template(spec)


def _default_template(spec: Object) -> None:
    if "template" in spec:
        spec["template"].setdefault("metadata", {})
        default_pod_spec(spec["template"].setdefault("spec", {}))


def validate_deployment(obj: Object, causes: Causes) -> None:
    """Check a defaulted Deployment."""
    spec = obj.get("spec", {})
    _not_negative(
        spec, "spec", ("replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"), causes
    )
    _validate_selector(spec, causes)
    strategy = spec.get("strategy", {})
    _validate_strategy(strategy, "spec.strategy", ("Recreate", "RollingUpdate"), causes)
    _validate_template(spec, causes, restart_policies=("Always",))
    deadline = spec.get("progressDeadlineSeconds", 600)
    if deadline <= spec.get("minReadySeconds", 0):
        causes.invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds")


def validate_replica_set(obj: Object, causes: Causes) -> None:
    """Check a defaulted ReplicaSet."""
    spec = obj.get("spec", {})
    _not_negative(spec, "spec", ("replicas", "minReadySeconds"), causes)
    _validate_selector(spec, causes)
    _validate_template(spec, causes, restart_policies=("Always",))


def validate_daemon_set(obj: Object, causes: Causes) -> None:
    """Check a defaulted DaemonSet."""
    spec = obj.get("spec", {})
    _validate_selector(spec, causes)
    _validate_template(spec, causes, restart_policies=("Always",))
    _not_negative(spec, "spec", ("minReadySeconds", "revisionHistoryLimit"), causes)
    _validate_strategy(spec.get("updateStrategy", {}), "spec.updateStrategy", ("OnDelete", "RollingUpdate"), causes)


def validate_job(obj: Object, causes: Causes) -> None:
    """Check a defaulted Job."""
    spec = obj.get("spec", {})
    _not_negative(
        spec,
        "spec",
        ("parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"),
        causes,
    )
    if spec.get("completionMode") not in ("NonIndexed", "Indexed"):
        causes.unsupported("spec.completionMode", spec.get("completionMode", ""), ("Indexed", "NonIndexed"))
    elif spec["completionMode"] == "Indexed" and spec.get("completions") is None:
        causes.required("spec.completions", "when completion mode is Indexed")
    if spec.get("selector") is not None and not spec.get("manualSelector"):
        _validate_generated_selector(obj, causes)
    _validate_template(spec, causes, restart_policies=("Never", "OnFailure"), needs_match=False)


def _validate_generated_selector(obj: Object, causes: Causes) -> None:
    """Refuse a selector that somebody wrote without saying manualSelector (batch/validation, ValidateGeneratedSelector)."""
    uid = obj["metadata"].get("uid")
    wanted = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    legacy = {"matchLabels": {"controller-uid": uid}}
    if uid and obj["spec"]["selector"] not in (wanted, legacy):
        causes.invalid("spec.selector", GoText(go_selector(obj["spec"]["selector"])), "`selector` not auto-generated")


def _not_negative(spec: Object, path: str, fields: tuple[str, ...], causes: Causes) -> None:
    for field in fields:
        if spec.get(field, 0) < 0:
            causes.invalid(f"{path}.{field}", spec[field], "must be greater than or equal to 0")


def _validate_selector(spec: Object, causes: Causes) -> None:
    selector = spec.get("selector")
    if selector is None:
        causes.required("spec.selector")
        return
    validate_selector(selector, "spec.selector", causes)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        shown = GoText(go_selector(selector))
        causes.invalid("spec.selector", shown, "empty selector is invalid for deployment")


def go_selector(selector: Object | None) -> str:
    """Return a LabelSelector as Go's %#v prints it."""
    selector = selector or {}
    terms = selector.get("matchExpressions")
    shown = "[]v1.LabelSelectorRequirement(nil)"
    if terms is not None:
        parts = [tuple(_go_or_nil(term.get(field)) for field in ("key", "operator", "values")) for term in terms]
        each = ", ".join(f"v1.LabelSelectorRequirement{{Key:{k}, Operator:{o}, Values:{v}}}" for k, o, v in parts)
        shown = f"[]v1.LabelSelectorRequirement{{{each}}}"
    return f"v1.LabelSelector{{MatchLabels:{go_map(selector.get('matchLabels'))}, MatchExpressions:{shown}}}"


def _go_or_nil(value: Any) -> str:
    return "[]string(nil)" if value is None else go_value(value)


def _validate_template(
    spec: Object, causes: Causes, *, restart_policies: tuple[str, ...], needs_match: bool = True
) -> None:
    template = spec.get("template") or {}
    metadata = template.get("metadata") or {}
    selector = spec.get("selector") or {}
    if needs_match and (selector.get("matchLabels") or selector.get("matchExpressions")):
        labels = metadata.get("labels")
        if not selector_matches(selector, labels or {}):
            causes.invalid(
                "spec.template.metadata.labels", GoText(go_map(labels)), "`selector` does not match template `labels`"
            )
    validate_labels(metadata.get("labels"), "spec.template.labels", causes)
    validate_annotations(metadata.get("annotations"), "spec.template.annotations", causes)
    pod_spec = template.get("spec") or {}
    if not pod_spec:
        default_pod_spec(pod_spec)
    validate_pod_spec(pod_spec, "spec.template.spec", causes)
    policy = pod_spec.get("restartPolicy")
    if policy in ("Always", "OnFailure", "Never") and policy not in restart_policies:
        causes.unsupported("spec.template.spec.restartPolicy", policy, restart_policies)
    if pod_spec.get("activeDeadlineSeconds") is not None and needs_match:
        causes.forbidden(
            "spec.template.spec.activeDeadlineSeconds", "activeDeadlineSeconds in ReplicaSet is not Supported"
        )


def _validate_strategy(strategy: Object, path: str, types: tuple[str, ...], causes: Causes) -> None:
    type_ = strategy.get("type", "")
    if type_ not in types:
        causes.unsupported(f"{path}.type" if type_ else path, type_, types)
    rolling = strategy.get("rollingUpdate")
    if rolling is not None and type_ == "Recreate":
        causes.forbidden(f"{path}.rollingUpdate", "may not be specified when strategy `type` is 'Recreate'")
    elif rolling is not None and type_ == "RollingUpdate":
        values = {}
        for field in ("maxUnavailable", "maxSurge"):
            values[field] = _validate_count(rolling.get(field, 0), f"{path}.rollingUpdate.{field}", causes)
        if values["maxUnavailable"] == 0 and values["maxSurge"] == 0:
            detail = "may not be 0 when `maxSurge` is 0" if "strategy" in path else "cannot be 0 when maxSurge is 0"
            causes.invalid(
                f"{path}.rollingUpdate.maxUnavailable",
                GoText(_go_int_or_string(rolling.get("maxUnavailable", 0))),
                detail,
            )
        if path == "spec.updateStrategy" and values["maxUnavailable"] and values["maxSurge"]:
            causes.invalid(
                f"{path}.rollingUpdate.maxSurge",
                GoText(_go_int_or_string(rolling["maxSurge"])),
                "may not be set when maxUnavailable is non-zero",
            )


def _go_int_or_string(value: int | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _validate_count(value: int | str, path: str, causes: Causes) -> int:
    """Check a number or percentage and return it as a number, -1 for a malformed one."""
    if isinstance(value, int):
        if value < 0:
            causes.invalid(path, value, "must be greater than or equal to 0")
        return value
    if not _PERCENT.fullmatch(value):
        detail = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used "
        detail += "for validation is '[0-9]+%')"
        causes.invalid(path, value, detail)
        return -1
    number = int(value[:-1]) if len(value) < 8 else 101
    if number > 100 and path.endswith("maxUnavailable"):
        causes.invalid(path, value, "must not be greater than 100%")
    return number
