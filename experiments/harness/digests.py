"""Digests of files: their SHA-256, as `sha256sum` prints it and the Hugging Face hub lists it.

Sizes and modification times do not identify a file: training writes weights of one size again and
again, and `cp -p` and `rsync` set times. A digest takes 1.2 seconds a GiB on the two cores where
loading takes 2 (bfloat16) to 6 (float32). It is computed once in a process, and again when the
file's size, modification time or change time (ctime, which programs cannot set) differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 20
_digests: dict[tuple[int, ...], str] = {}


def digest(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hexadecimal; `on_bytes` gets the size of each block read."""
    with path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if identity not in _digests:
            state, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
            while count := file.readinto(block):
                state.update(block[:count])
                on_bytes(count)
            _digests[identity] = state.hexdigest()
    return _digests[identity]
