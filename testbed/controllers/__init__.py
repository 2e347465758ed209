"""Controllers: objects in, objects out. Each is a set of pure decisions and a thin reconcile that writes them.

Names are loaded when they are first used: programs of the cluster want `controllers.openelb` without all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from testbed.model.cluster import ClusterConfig

if TYPE_CHECKING:
    from testbed.controllers.driver import Controller, ControllerDriver
    from testbed.controllers.events import record_event
    from testbed.controllers.system import ensure_system_namespaces

__all__ = ["Controller", "ControllerDriver", "default_controllers", "ensure_system_namespaces", "record_event"]

_MODULES = {
    "Controller": "driver",
    "ControllerDriver": "driver",
    "ensure_system_namespaces": "system",
    "record_event": "events",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def default_controllers(config: ClusterConfig, *, pick: Callable[[int], int]) -> list[Controller]:
    """Return the controllers of a cluster, with an index that they share at the head.

    None of them needs chance so far: the registry allocates addresses and makes up names.
    """
    from testbed.controllers.daemonset import DaemonSetController
    from testbed.controllers.definitions import DefinitionFinalizer
    from testbed.controllers.deployment import DeploymentController
    from testbed.controllers.endpoints import EndpointsController
    from testbed.controllers.endpointslice import EndpointSliceController, MirroringController
    from testbed.controllers.garbage import GarbageCollector
    from testbed.controllers.index import ClusterIndex
    from testbed.controllers.job import JobController
    from testbed.controllers.nodes import NodeLifecycleController, TaintEvictionController
    from testbed.controllers.openelb.departure import OpenElbDeparture
    from testbed.controllers.replicaset import ReplicaSetController
    from testbed.controllers.scheduler import Scheduler
    from testbed.controllers.system import NamespaceController, ServiceAccountController

    index = ClusterIndex()
    return [
        index,
        NamespaceController(),
        ServiceAccountController(),
        DefinitionFinalizer(),
        GarbageCollector(index),
        DeploymentController(index),
        ReplicaSetController(index),
        DaemonSetController(index),
        JobController(index),
        NodeLifecycleController(index, config),
        TaintEvictionController(index),
        Scheduler(index),
        EndpointSliceController(index),
        EndpointsController(index),
        MirroringController(index),
        OpenElbDeparture(),
    ]
