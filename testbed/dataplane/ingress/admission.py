"""What ``validate.nginx.ingress.kubernetes.io`` denies, and why. Pure.

It renders and parses; it never runs ``nginx -t`` on what has not been admitted: nginx loads what a configuration names, and
doing that for anybody who can write an Ingress was CVE-2025-1974.

Source: kubernetes/ingress-nginx internal/ingress/controller/controller.go CheckIngress, internal/ingress/inspector (v1.10).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from testbed.dataplane.ingress.annotations import PREFIX, Annotations, parse_annotations
from testbed.dataplane.ingress.render import render
from testbed.dataplane.ingress.settings import Options, Settings, parse_options
from testbed.dataplane.ingress.tokens import SyntaxProblem, parse
from testbed.dataplane.ingress.translate import host_problem, path_problem, translate
from testbed.dataplane.ingress.world import World, is_ours, key_of, our_ingresses
from testbed.errors import InputError
from testbed.model.objects import Object, name_of, namespace_of
from testbed.registry.admission import AdmissionRequest, Denial
from testbed.store import Store

WEBHOOK: Final = "validate.nginx.ingress.kubernetes.io"
IMAGE: Final = "ingress-nginx/controller"
MAX_BYTES: Final = 1 << 20
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
#: Source: internal/ingress/inspector/rules.go (v1.10).
_SUSPICIOUS: Final = tuple(
    re.compile(expression)
    for expression in (
        r"(?:^|[\s;{])alias\s*.*;", r"(?:^|[\s;{])root\s*.*;", r"/etc/(passwd|shadow|group|nginx|ingress-controller)",
        r"/var/run/secrets", r"_by_lua",
    )
)  # fmt: skip


def deny_reason(ingress: Object, world: World, options: Options) -> str:
    """Return why an Ingress is denied, or ''.

    Args:
        world: the objects that there are; an earlier state of the Ingress may be among them.
    """
    if not is_ours(ingress, world.classes, options):
        return ""
    settings, _ = world.settings(options)
    size = len(json.dumps(ingress))
    if size > MAX_BYTES:
        return f"the ingress is too large: {size} bytes, at most {MAX_BYTES} are accepted"
    annotations, problems = parse_annotations(
        ingress["metadata"].get("annotations") or {},
        most_risk=settings.annotations_risk_level,
        blocked_words=settings.annotation_value_word_blocklist,
    )
    return (
        _inspect(ingress)
        or _catch_all(ingress, options)
        or _uid(ingress)
        or _paths(ingress, annotations, settings)
        or (problems[0].message if problems else "")
        or _overlap(ingress, world, options)
        or _unreadable(ingress, world, options)
    )


def _rules(ingress: Object) -> Iterator[tuple[str, Object]]:
    for index, rule in enumerate((ingress.get("spec") or {}).get("rules") or ()):
        yield f"spec.rules[{index}]", rule


def _path_fields(ingress: Object) -> Iterator[tuple[str, str, Object]]:
    """Give field, host and path of each path."""
    for field, rule in _rules(ingress):
        for index, path in enumerate((rule.get("http") or {}).get("paths") or ()):
            yield f"{field}.http.paths[{index}].path", str(rule.get("host") or ""), path


def _inspect(ingress: Object) -> str:
    fields = [(f"{field}.host", str(rule.get("host") or "")) for field, rule in _rules(ingress)]
    fields += [(field, str(path.get("path") or "")) for field, _, path in _path_fields(ingress)]
    for index, section in enumerate((ingress.get("spec") or {}).get("tls") or ()):
        fields.append((f"spec.tls[{index}].secretName", str(section.get("secretName") or "")))
        fields += [
            (f"spec.tls[{index}].hosts[{number}]", str(host)) for number, host in enumerate(section.get("hosts") or ())
        ]
    for field, text in fields:
        for suspicious in _SUSPICIOUS:
            if suspicious.search(text):
                return f"ingress contains invalid {field}: {text[:200]!r} matches {suspicious.pattern}"
        if field.endswith(".host") and text and host_problem(text):
            return f"ingress contains invalid {field}: {text[:200]!r} {host_problem(text)}"
    return ""


def _catch_all(ingress: Object, options: Options) -> str:
    if options.disable_catch_all and (ingress.get("spec") or {}).get("defaultBackend") is not None:
        return (
            "This deployment is trying to create a catch-all ingress while DisableCatchAll flag is set to true. Remove "
            "'.spec.defaultBackend' or set DisableCatchAll flag to false."
        )
    return ""


def _uid(ingress: Object) -> str:
    uid = str(ingress["metadata"].get("uid") or "")
    return (
        f"ingress contains invalid metadata.uid: {uid[:100]!r} is no UUID" if uid and not _UUID.fullmatch(uid) else ""
    )


def _paths(ingress: Object, annotations: Annotations, settings: Settings) -> str:
    for field, _, path in _path_fields(ingress):
        text, kind = str(path.get("path") or "/"), str(path.get("pathType") or "ImplementationSpecific")
        problem = path_problem(text, kind, annotations, settings)
        if problem:
            return f"ingress contains invalid paths: {field}: {text[:200]!r}: {problem}"
    return ""


def _overlap(ingress: Object, world: World, options: Options) -> str:
    own = {(host, str(path.get("path") or "/")) for _, host, path in _path_fields(ingress)}
    canary = f"{PREFIX}canary"

    def is_canary(one: Object) -> bool:
        return canary in (one["metadata"].get("annotations") or {})

    for other in our_ingresses(world, options):
        if key_of(other) == key_of(ingress) or is_canary(other) != is_canary(ingress):
            continue
        for _, host, path in _path_fields(other):
            text = str(path.get("path") or "/")
            if (host, text) in own:
                return f'host "{host or "_"}" and path "{text}" is already defined in ingress {key_of(other)}'
    return ""


def _unreadable(ingress: Object, world: World, options: Options) -> str:
    """Render this Ingress alone, and read the result back."""
    alone = World(
        ingresses={(namespace_of(ingress), name_of(ingress)): ingress},
        classes=world.classes, services=world.services, secrets=world.secrets, configmaps=world.configmaps,
    )  # fmt: skip
    try:
        parse(render(translate(alone, options, resolvers=("127.0.0.1",))))
    except SyntaxProblem as error:
        return f"the configuration that the ingress makes cannot be read: {error}"
    return ""


# --- beside the API -----------------------------------------------------------------------------------------------------


class IngressWebhook:
    """The webhook as the API asks it; reads the controllers' flags from their pods, as the controllers did."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, request: AdmissionRequest) -> Denial | None:
        if request.resource.key != "ingresses.networking.k8s.io" or request.object is None or request.subresource:
            return None
        world = World.of(
            obj
            for resource in (
                "ingresses.networking.k8s.io", "ingressclasses.networking.k8s.io", "services", "secrets", "configmaps",
            )
            for obj in self._store.list(resource)
        )  # fmt: skip
        for options in self._controllers():
            reason = deny_reason(request.object, world, options)
            if reason:
                return Denial(reason)
        return None

    def _controllers(self) -> list[Options]:
        """Return the options of each controller that there is, each kind once."""
        found = []
        for pod in self._store.list("pods"):
            for container in pod["spec"].get("containers") or ():
                image = str(container.get("image", "")).partition("@")[0].rpartition(":")[0] or container.get(
                    "image", ""
                )
                if not str(image).endswith(IMAGE):
                    continue
                values = {"POD_NAMESPACE": namespace_of(pod), "POD_NAME": name_of(pod)}
                words = [_expanded(str(word), values) for word in container.get("args") or ()]
                try:
                    options = parse_options([word for word in words if word.startswith("-")])
                except InputError:
                    continue  # such a pod does not run
                if options.validating_webhook and options not in found:
                    found.append(options)
        return found


def _expanded(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"$({name})", value)
    return word
