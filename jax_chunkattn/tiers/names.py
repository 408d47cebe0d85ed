"""What names a chunk outside the pool: all that its keys and values depend on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

NAME_BYTES = 16


def namespace_of(parts: Mapping[str, Any]) -> bytes:
    """The hash of what chunks depend on beside their tokens: model, codec, layout, and so on.

    Raises:
      TypeError: for parts that JSON does not know.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return _hash(b"namespace", text.encode())


def root_name(namespace: bytes, salt: bytes) -> bytes:
    """The name of the empty prefix of a salt."""
    return _hash(b"root", namespace, salt)


def chunk_name(above: bytes, chunk: bytes) -> bytes:
    """The name of a chunk of these tokens, as int32 bytes, behind what `above` names."""
    return _hash(b"chunk", above, chunk)


def _hash(kind: bytes, *parts: bytes) -> bytes:
    """128 bits of BLAKE2b, of parts whose lengths are fixed or last."""
    return hashlib.blake2b(b"".join(parts), digest_size=NAME_BYTES, person=kind).digest()
