"""Builds a decoder array by array, each in its final dtype, on its final device and sharding.

Besides the arrays that are already placed, host memory holds only a few at a time. On a CPU a
placed array is not copied: its buffer begins at an address that JAX can take over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from models.config import DecoderConfig
from models.decoder import Decoder
from models.weights import BLOCKS, Weight, decoder_weights

Fill = Callable[[str, int | None, np.ndarray], None]
"""`fill(name, layer, out)` writes one weight, of one layer or (None) outside the layers.

It is called from several threads at once, for different layers.
"""

Place = Callable[[str, Weight], Sharding | None]
"""The sharding of a weight; None is the default device."""

OnProgress = Callable[[int, int], None]
"""Called with the bytes of weights made so far, and of all."""

THREADS = min(4, os.cpu_count() or 1)
ALIGNMENT = 64  # bytes; XLA copies a buffer with less


def build(
    config: DecoderConfig,
    dtype: str,
    fill: Fill,
    *,
    unroll: bool = False,
    place: Place = lambda name, weight: None,
    on_progress: OnProgress = lambda done, total: None,
) -> Decoder:
    """A `Decoder` whose weights `fill` has written."""
    graphdef, state = nnx.split(abstract_decoder(config, dtype, unroll=unroll))
    leaves = dict(nnx.to_flat_state(state))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    done = 0
    telling = Lock()

    def fill_and_tell(name: str, layer: int | None, out: np.ndarray) -> None:
        nonlocal done
        fill(name, layer, out)
        with telling:
            done += out.nbytes
            on_progress(done, total)

    filled = {
        path: leaves[path].replace(array)
        for path, array in _arrays(config, dtype, fill_and_tell, unroll, place)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def abstract_decoder(
    config: DecoderConfig,
    dtype: str,
    *,
    unroll: bool = False,
    place: Place = lambda name, weight: None,
) -> Decoder:
    """A decoder of shapes and dtypes, for tracing and compiling: its weights have no values, but
    their places."""
    shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, unroll=unroll))
    graphdef, state = nnx.split(shapes)
    weights = decoder_weights(config).by_name()

    def placed(path: tuple, leaf: Any) -> Any:
        name = path[0] if len(path) == 1 else BLOCKS + path[-1]
        weight = weights[name].unstacked() if len(path) == 3 else weights[name]
        shape, kind = weight.shape, weight.dtype(dtype)
        return leaf.replace(jax.ShapeDtypeStruct(shape, kind, sharding=place(name, weight)))

    flat = {path: placed(path, leaf) for path, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _arrays(
    config: DecoderConfig, dtype: str, fill: Fill, unroll: bool, place: Place
) -> Iterator[tuple[tuple, jax.Array]]:
    """Each array of the decoder, with its path in the decoder's state."""
    layers = range(config.num_layers)
    with ThreadPoolExecutor(THREADS) as pool:
        for name, weight in decoder_weights(config).by_name().items():
            short = name.removeprefix(BLOCKS)
            if name == short:
                array = aligned_empty(weight.shape, weight.dtype(dtype))
                fill(name, None, array)
                yield (name,), jax.device_put(array, place(name, weight))
            elif not unroll:
                array = aligned_empty(weight.shape, weight.dtype(dtype))
                _wait(pool.map(partial(fill, short), layers, array))
                yield ("blocks", short), jax.device_put(array, place(name, weight))
            else:
                one = weight.unstacked()
                for some in (layers[begin : begin + THREADS] for begin in layers[::THREADS]):
                    arrays = [aligned_empty(one.shape, one.dtype(dtype)) for _ in some]
                    _wait(pool.map(partial(fill, short), some, arrays))
                    for layer, array in zip(some, arrays, strict=True):
                        yield ("blocks", layer, short), jax.device_put(array, place(name, one))


def _wait(results: Iterable[None]) -> None:
    """Waits until all are done; raises what one of them has raised."""
    for _ in results:
        pass


def aligned_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """`np.empty` at an address where XLA can use it without a copy."""
    kind = np.dtype(jax.numpy.dtype(dtype))
    size = math.prod(shape) * kind.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % ALIGNMENT
    return buffer[begin : begin + size].view(kind).reshape(shape)
