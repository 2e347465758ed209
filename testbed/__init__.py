"""A Kubernetes cluster's service network on one Linux machine, without containers (docs/architecture.md)."""

__version__ = "0.1.0"
