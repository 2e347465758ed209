"""What `testbed proxy` works on: manifests and a KubeProxyConfiguration, read and checked, as one node sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from testbed.controllers.endpointslice import mirrored_endpoints
from testbed.controllers.slices import plan_slices
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.state import ProxyState
from testbed.errors import InputError, ManifestError, Problem
from testbed.manifests.decode import Decoded
from testbed.manifests.kinds import default_object
from testbed.manifests.kubeproxy import KubeProxyWire
from testbed.manifests.objects import WORKLOADS, SourceObject, read_objects
from testbed.manifests.source import Document, find_line, parse_documents, read_text
from testbed.model.objects import Object
from testbed.model.proxyconfig import KubeProxyConfig, parse_proxy_config
from testbed.model.service import (
    SERVICE_NAME_LABEL,
    NodeName,
    NodeView,
    parse_address,
    parse_node,
    parse_service,
    parse_service_cidr,
    service_of_slice,
)

_LOOPBACK = IPv4Address("127.0.0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyInput:
    """A node's kube-proxy configuration and everything it would have heard of from the API."""

    config: KubeProxyConfig
    node: NodeView
    addresses: tuple[IPv4Address, ...]  # of the node, as its Node object tells; the loopback among them
    services: tuple[Object, ...]
    slices: tuple[Object, ...]
    service_cidrs: tuple[IPv4Network, ...]
    warnings: tuple[Problem, ...]

    @property
    def state(self) -> ProxyState:
        """Services and endpoints, as the node's kube-proxy sees them."""
        tracker = ChangeTracker(self.config.hostname_override or self.node.name)
        tracker.replace_services(self.services)
        tracker.replace_slices(self.slices)
        return tracker.take()[0]


def read_proxy_input(
    files: Sequence[Path], *, node: str, mode: str | None = None, config: Path | None = None
) -> ProxyInput:
    """Read manifests for the kube-proxy of one node.

    Args:
        files: Services, EndpointSlices or Endpoints, Nodes, ServiceCIDRs; a KubeProxyConfiguration, too, when
            ``config`` is None. Other objects are of no concern to kube-proxy; workloads are warned about.
        node: Name of the node.
        mode: Overrides the configuration's.
        config: A KubeProxyConfiguration.

    Raises:
        ManifestError: every problem of every file, each with its line.
        InputError: the node is not among the Nodes of the files.
    """
    problems: list[Problem] = []
    configs: list[Document] = []
    objects: list[SourceObject] = []
    for path in [*files, *([config] if config is not None else [])]:
        text, unreadable = read_text(path)
        documents, syntax = parse_documents(text, str(path))
        problems += [*unreadable, *syntax]
        if not (documents or unreadable or syntax):
            problems.append(Problem(str(path), 0, "is empty"))
        for document in documents:
            is_config = isinstance(document.value, dict) and document.value.get("kind") == "KubeProxyConfiguration"
            if path is config and not is_config:
                problems.append(Problem(document.file, document.line, "wants a KubeProxyConfiguration (kind: …) here"))
            elif is_config:
                configs.append(document)
            else:
                found, wrong = read_objects([document])
                objects += found
                problems += wrong
    parsed, wrong = _read_config([c for c in configs if config is None or c.file == str(config)])
    problems += wrong
    if any(not problem.warning for problem in problems):
        raise ManifestError(problems)
    view, addresses = _find_node(objects, node)
    return ProxyInput(
        config=replace(parsed, mode=mode or parsed.mode),
        node=view,
        addresses=addresses,
        services=tuple(_defaulted(o) for o in objects if o.kind == "Service"),
        slices=tuple(_slices(objects)),
        service_cidrs=tuple(n for o in objects if o.kind == "ServiceCIDR" for n in parse_service_cidr(o.object)),
        warnings=tuple(sorted([*problems, *_warnings(objects, node)])),
    )


def _read_config(documents: Sequence[Document]) -> tuple[KubeProxyConfig, list[Problem]]:
    if not documents:
        return KubeProxyConfig(), []
    document = documents[0]
    problems = [
        Problem(
            other.file, other.line, f"a second KubeProxyConfiguration; the first is {document.file}:{document.line}"
        )
        for other in documents[1:]
    ]
    decoded = Decoded(document)
    decoded.decode(KubeProxyWire)
    if decoded.problems:
        return KubeProxyConfig(), [*problems, *decoded.problems]
    config, causes = parse_proxy_config(document.value)
    problems += [Problem(document.file, find_line(document.lines, cause.field), str(cause)) for cause in causes]
    return config, problems


def _find_node(objects: Sequence[SourceObject], name: str) -> tuple[NodeView, tuple[IPv4Address, ...]]:
    nodes = {o.name: o.object for o in objects if o.kind == "Node"}
    if name not in nodes:
        if nodes:
            raise InputError(f"there is no Node {name!r} in these files; their Nodes are {', '.join(sorted(nodes))}")
        return NodeView(name=NodeName(name)), (_LOOPBACK,)
    entries = (nodes[name].get("status") or {}).get("addresses") or ()
    found = {address for address in (parse_address(entry.get("address")) for entry in entries) if address is not None}
    return parse_node(nodes[name]), (_LOOPBACK, *sorted(found))


def _defaulted(source: SourceObject) -> Object:
    """Return an object as the API would store it, as far as that goes without a cluster."""
    new = default_object(source.object)
    if source.namespace:
        new["metadata"]["namespace"] = source.namespace
    return new


def _slices(objects: Sequence[SourceObject]) -> list[Object]:
    """Return the EndpointSlices, and those that Endpoints of Services without slices stand for."""
    slices = [_defaulted(o) for o in objects if o.kind == "EndpointSlice"]
    sliced = {service_of_slice(s) for s in slices}
    for source in objects:
        if source.kind == "Endpoints" and (source.namespace, source.name) not in sliced:
            slices += _mirrored(_defaulted(source))
    return slices


def _mirrored(endpoints: Object) -> list[Object]:
    """Return the slices that the mirroring controller makes of Endpoints."""
    owner = endpoints["metadata"]
    labels = {**(owner.get("labels") or {}), SERVICE_NAME_LABEL: owner["name"]}
    made = plan_slices([], mirrored_endpoints(endpoints)).create
    return [
        {**one, "metadata": {"name": f"{owner['name']}-{number}", "namespace": owner["namespace"], "labels": labels}}
        for number, one in enumerate(made)
    ]


def _warnings(objects: Sequence[SourceObject], node: str) -> list[Problem]:
    """Return what a user may have expected to count, and does not."""
    found = []
    if not any(o.kind == "Node" for o in objects):
        first = objects[0] if objects else None
        message = f"no Node object {node!r} in these files: its address and labels are unknown, NodePorts may have none"
        found.append(Problem(first.file if first else "", 0, message, True))
    behind = {service_of_slice(s) for s in _slices(objects)}
    for source in objects:
        if source.kind in WORKLOADS or source.kind == "Pod":
            message = (
                f"{source.kind} {source.namespace}/{source.name} counts for nothing here: kube-proxy reads Services and "
                "EndpointSlices, and nothing makes slices of pods without a cluster (`testbed up -f FILE` does)"
            )
            found.append(Problem(source.file, source.line, message, True))
        elif source.kind == "Service":
            found += _service_warnings(source, behind)
    return found


def _service_warnings(source: SourceObject, behind: set[tuple[str, str] | None]) -> list[Problem]:
    service = _defaulted(source)
    spec = service.get("spec") or {}
    where = f"Service {source.namespace}/{source.name}"
    if spec.get("type") == "ExternalName" or spec.get("clusterIP") == "None":
        return []
    if not parse_service(service):
        message = f"{where} has no IPv4 clusterIP: kube-proxy ignores it until the API has allocated one"
        return [Problem(source.file, source.line_of("spec"), message, True)]
    if (source.namespace, source.name) not in behind:
        message = f"{where} has no EndpointSlice in these files: it will refuse"
        return [Problem(source.file, source.line, message, True)]
    return []
