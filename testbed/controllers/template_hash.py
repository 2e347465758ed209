"""The hash that names a Deployment's ReplicaSets and marks a DaemonSet's pods."""

from __future__ import annotations

import json
from functools import lru_cache

from testbed.model.objects import Object

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels, so no words; no 0, 1, 3 (apimachinery rand.SafeEncodeString)


def template_hash(template: Object) -> str:
    """Return 8 to 10 characters that are the same for the same template."""
    return _encoded_hash(json.dumps(template, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


@lru_cache(maxsize=1024)
def _encoded_hash(text: str) -> str:
    return encode_safely(str(fnv_32a(text.encode())))


def fnv_32a(data: bytes) -> int:
    """Return the FNV-1a hash, 32 bits (draft-eastlake-fnv)."""
    value = 2166136261
    for byte in data:
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def encode_safely(text: str) -> str:
    """Return text with every character mapped into the alphabet of generated names."""
    return "".join(_ALPHABET[ord(character) % len(_ALPHABET)] for character in text)
