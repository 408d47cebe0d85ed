"""How many more memory maps the process may have: on Linux they are limited, and XLA aborts the
process where it stands when there are too few."""

from __future__ import annotations

import math
from pathlib import Path

_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPS = Path("/proc/self/maps")


def room() -> float:
    """Maps until the limit; infinite where there is none to be read."""
    try:
        limit = int(_LIMIT.read_text())
        return limit - _MAPS.read_bytes().count(b"\n")
    except OSError:
        return math.inf
