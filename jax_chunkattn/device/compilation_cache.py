"""Compiled programs kept on disk, from one process to the next."""

from __future__ import annotations

import os
from pathlib import Path

from pallas_kernels.cache_folder import cache_dir

FOLDER_SETTING = "jax_compilation_cache_dir"
KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Has JAX keep every program that this process compiles from now on, and find it there later.

    Sets JAX's own settings, for all of the process: its cache leaves out, unless told, what
    compiles in less than a second. An engine's first calls then take a fraction of the time.

    Args:
      folder: where; None takes the one that JAX was told of before (`JAX_COMPILATION_CACHE_DIR`),
        or else `cache_dir() / "jax"`.

    Returns the folder.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    chosen = folder or jax.config.values[FOLDER_SETTING] or cache_dir() / "jax"
    path = Path(chosen).expanduser()
    for name, value in {FOLDER_SETTING: str(path), **KEEP_ALL}.items():
        jax.config.update(name, value)
    reset_cache()  # JAX reads the folder once, at the first compilation
    return path
