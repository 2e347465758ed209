"""The only validated way to write objects: defaulting, validation, allocation, the rules of updating and deleting."""

from testbed.registry.registry import Registry

__all__ = ["Registry"]
