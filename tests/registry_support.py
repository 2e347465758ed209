"""A registry with a clock that stands still and chance that repeats, for tests."""

from __future__ import annotations

import itertools
import random
from ipaddress import IPv4Network
from typing import Any

from testbed.errors import ApiError
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object
from testbed.registry import Registry
from testbed.store import Store

NOW = "2024-01-01T00:00:00Z"
CONFIG = ClusterConfig(service_cidr=IPv4Network("10.96.0.0/22"))


def make_store(history: int = 4096) -> Store:
    """Return an empty store whose uids are uid-1, uid-2, …"""
    numbers = itertools.count(1)
    return Store(now=lambda: NOW, new_uid=lambda: f"uid-{next(numbers)}", history=history)


def make_registry(config: ClusterConfig = CONFIG, *, history: int = 4096, seed: int = 1) -> Registry:
    """Return a registry with the namespaces default and dev."""
    store = make_store(history)
    registry = Registry(store, config, now=lambda: NOW, new_uid=lambda: "dry", pick=random.Random(seed).randrange)
    for name in ("default", "dev"):
        registry.create("namespaces", {"metadata": {"name": name}})
    return registry


def service(name: str = "web", /, *, ports: Any = None, namespace: str = "dev", **spec: Any) -> Object:
    """Return a Service manifest; ``ports=[]`` means none."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"ports": [{"port": 80}] if ports is None else ports, **spec},
    }


def pod(name: str = "a", /, **spec: Any) -> Object:
    """Return a Pod manifest with one container."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "dev"},
        "spec": {"containers": [{"name": "main", "image": "nginx:1.25"}], **spec},
    }


def deployment(name: str = "web", /, *, labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """Return a Deployment manifest that selects ``app=web``; ``labels`` are its template's."""
    template = {
        "metadata": {"labels": labels or {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "nginx"}]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "dev"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": template, **spec},
    }


def refusal(call: Any, *arguments: Any, **keywords: Any) -> ApiError:
    """Return the ApiError that a call ends with."""
    try:
        call(*arguments, **keywords)
    except ApiError as error:
        return error
    raise AssertionError("nothing was refused")
