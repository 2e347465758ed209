"""What a scenario needs of a lab; `testbed.lab.handle.Lab` has it, and tests have a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from testbed.kernel.processes import Completed
from testbed.model.objects import Object, Resource
from testbed.model.topology import Topology

T = TypeVar("T")


class ObjectApi(Protocol):
    """The part of `api.client.ApiClient` that steps use."""

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]: ...

    def get(self, resource: str, namespace: str, name: str) -> Object: ...

    def apply(self, obj: Object) -> tuple[Object, Any]: ...

    def resource_of(self, obj: Object) -> Resource: ...

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object: ...

    def delete(self, resource: str, namespace: str, name: str, grace_s: int | None = None) -> Any: ...


class LabLike(Protocol):
    """A running lab."""

    @property
    def api(self) -> ObjectApi: ...

    @property
    def kubeconfig(self) -> Path: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def iptables_backend(self) -> str: ...

    def why_ended(self, *, within_s: float = 0.0) -> str: ...

    def call(self, where: str, function: Callable[..., T], *args: Any, timeout_s: float) -> T: ...

    def run(self, where: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed: ...

    def set_link(self, where: str, up: bool) -> None: ...

    def set_power(self, node: str, on: bool) -> None: ...

    def signal_pod(self, namespace: str, name: str, signal_number: int) -> None: ...
