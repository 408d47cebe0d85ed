"""The compiled kernel, loaded into this process and known to XLA."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.native.build import BuildError, build, sources_digest
from pallas_kernels.plans import HostOrDevice

DECODE, PREFILL, PUT_ROWS = "chunk_attention_decode", "chunk_attention_prefill", "chunk_pool_put"
PRODUCT, ROW_SUMS = "chunk_product", "chunk_row_sums"
EXPONENTIALS = "chunk_row_exponentials"
SHARES, TILES = "chunk_shares", "chunk_tiles"
_HANDLERS = (DECODE, PREFILL, PUT_ROWS, PRODUCT, ROW_SUMS, EXPONENTIALS, SHARES, TILES)
_lock = threading.Lock()


def problem() -> str | None:
    """Why it cannot run in this process, if it cannot. The first call compiles it, in seconds."""
    with _lock:
        return _load()


def prepare() -> None:
    """Begins to compile it on a thread, so that it is there when it is first needed."""
    threading.Thread(target=problem, name="compile-attention", daemon=True).start()


def call(
    name: str,
    operands: Sequence[HostOrDevice],
    output: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    *,
    in_place: bool = False,
    **attributes: object,
) -> Any:
    """What a call of the library makes of its operands, in the first of them if `in_place`: an
    array, or as many as there are outputs."""
    aliases = {0: 0} if in_place else {}
    how = {"input_output_aliases": aliases, "vmap_method": "sequential"}
    made = jax.ffi.ffi_call(_target(name), output, **how)
    return made(*operands, **attributes)


def _target(name: str) -> str:
    # A program that was compiled with other sources, and kept, finds no target: not another one.
    return f"{name}_{sources_digest()}"


@functools.cache
def _load() -> str | None:
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        return str(error)
    for name in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return None
