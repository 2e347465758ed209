"""Faults of Ingresses that no controller can make good."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.dataplane.doctor.finding import Finding, listed
from testbed.dataplane.doctor.observations import ClusterSeen
from testbed.model.objects import Object, is_terminating, name_of, namespace_of

_OLD_CLASS = "kubernetes.io/ingress.class"
_IS_DEFAULT = "ingressclass.kubernetes.io/is-default-class"


def find_ingress_faults(seen: ClusterSeen) -> Iterator[Finding]:
    classes = seen.list("ingressclasses.networking.k8s.io")
    names = sorted(map(name_of, classes))
    has_default = any((one["metadata"].get("annotations") or {}).get(_IS_DEFAULT) == "true" for one in classes)
    services = {(namespace_of(one), name_of(one)) for one in seen.list("services")}
    for ingress in seen.list("ingresses.networking.k8s.io"):
        if is_terminating(ingress):
            continue
        where = f"ingress {namespace_of(ingress)}/{name_of(ingress)}"
        missing = [name for name in _backends(ingress) if (namespace_of(ingress), name) not in services]
        about = tuple(f"{namespace_of(ingress)}/{name}" for name in _backends(ingress))
        wanted = (ingress.get("spec") or {}).get("ingressClassName") or ""
        old = (ingress["metadata"].get("annotations") or {}).get(_OLD_CLASS) or ""
        edit = f"kubectl -n {namespace_of(ingress)} patch ingress {name_of(ingress)} --type merge -p"
        if not (wanted or old) and not has_default:
            yield Finding(
                cause="ingress-without-class", where=where, about=about,
                what="names no class, and no IngressClass is the default: no controller serves it, its hosts are 404 and "
                "ADDRESS stays blank",
                do=f"{edit} '{{\"spec\":{{\"ingressClassName\":\"{names[0] if names else 'nginx'}\"}}}}', or annotate an "
                f"IngressClass with {_IS_DEFAULT}=true",
            )  # fmt: skip
        elif wanted and wanted not in names:
            yield Finding(
                cause="ingress-class-unknown", where=where, about=about,
                what=f"names the class {wanted}, and there is no such IngressClass ({listed(names) or 'there is none'})",
                do="kubectl get ingressclass; correct spec.ingressClassName, or install the controller",
            )  # fmt: skip
        if missing:
            yield Finding(
                cause="ingress-backend-missing", where=where, about=about,
                what=f"its backends name Services that are not there: {listed(missing)}; who asks gets 503",
                do=f"kubectl -n {namespace_of(ingress)} get svc; correct the backend's name",
            )  # fmt: skip


def _backends(ingress: Object) -> list[str]:
    spec = ingress.get("spec") or {}
    found = [spec.get("defaultBackend") or {}]
    found += [
        path.get("backend") or {}
        for rule in spec.get("rules") or ()
        for path in (rule.get("http") or {}).get("paths") or ()
    ]
    return list(dict.fromkeys(name for backend in found if (name := (backend.get("service") or {}).get("name"))))
