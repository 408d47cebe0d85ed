"""Files known by their SHA-256, which `sha256sum` and the Hugging Face hub tell as well.

Sizes and times would not do: training writes weights of one size again and again, and `cp -p` and
`rsync` set times. It takes 1.2 seconds a GiB on the two cores where loading takes 2 (bfloat16) to 6
(float32), and is done once in a process, until the file system says that a file was written to: of
that it keeps a time of its own (ctime), which nobody can set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 20
_digests: dict[tuple[int, ...], str] = {}


def digest(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hexadecimal; `on_bytes` hears of each block that is read."""
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
