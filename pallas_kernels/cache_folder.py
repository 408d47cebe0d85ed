"""Where what a machine has compiled is kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "JAX_CHUNKATTN_CACHE"


def cache_dir() -> Path:
    """`$JAX_CHUNKATTN_CACHE`, else `$XDG_CACHE_HOME/jax_chunkattn`, else `~/.cache/jax_chunkattn`.

    The folder may not exist yet.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jax_chunkattn"
