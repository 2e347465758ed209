"""The nodes of a lab as the API sees them: each has a kubelet, which may be down."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.errors import ApiError
from testbed.kubelet.agent import Kubelet
from testbed.kubelet.server import KubeletServer


class LabNodes:
    """Implements `api.streams.Nodes`."""

    def __init__(self) -> None:
        self._kubelets: dict[str, Kubelet] = {}

    def add(self, kubelets: Iterable[Kubelet]) -> None:
        self._kubelets.update({kubelet.node_name: kubelet for kubelet in kubelets})

    def server_of(self, node: str) -> KubeletServer:
        kubelet = self._kubelets.get(node)
        if kubelet is None:
            raise ApiError(500, "InternalError", f'Get "https://{node}:10250/": dial tcp: lookup {node}: no such host')
        return KubeletServer(kubelet)
