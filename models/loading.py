"""`load`: a decoder from a GGUF file, or one with random weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig, preset
from models.decoder import Decoder
from models.gguf_checkpoint import read_config, read_weights
from models.gguf_file import read_gguf
from pallas_kernels.targets import current_target

if TYPE_CHECKING:
    from models.tokenizer import ChatTokenizer

RANDOM_PREFIX = "random:"
BLOCKS = "blocks/"
MOST_PARTS = 64  # in which a random weight is drawn
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns. `tokenizer` is None for random weights, which have no language."""

    model: Decoder
    config: DecoderConfig
    tokenizer: ChatTokenizer | None
    name: str


def load(
    spec: str | Path, *, dtype: str = "float32", seed: int = 0, unroll: bool | None = None
) -> LoadedModel:
    """Load the model that `spec` names, with weights and activations in `dtype`.

    `spec` is the path of a Llama-architecture GGUF file, or `random:<preset>` (`seed` then chooses
    the weights, the same on every platform). `unroll` runs the layers one after another instead of
    in a scan, which on a GPU saves copies of the weights and takes longer to compile; None does
    what suits the device. Raises ValueError for an unknown dtype or preset,
    FileNotFoundError when there is no such file, CheckpointError when it cannot be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    if unroll is None:
        unroll = current_target().platform == "gpu"
    if isinstance(spec, str) and spec.startswith(RANDOM_PREFIX):
        config = preset(spec.removeprefix(RANDOM_PREFIX))
        model = assemble(config, dtype, random_weights(config, seed, dtype), unroll)
        return LoadedModel(model, config, None, spec)
    return _load_gguf(Path(spec), dtype, unroll)


def _load_gguf(path: Path, dtype: str, unroll: bool) -> LoadedModel:
    from models.tokenizer import read_tokenizer

    if not path.is_file():
        raise FileNotFoundError(
            f"no model file at {path}; give the path of a .gguf file (models.fetch_smollm2() "
            f"returns one) or {RANDOM_PREFIX}<preset>"
        )
    file = read_gguf(path)
    config = read_config(file)
    model = assemble(config, dtype, read_weights(file, config, jnp.dtype(dtype)), unroll)
    return LoadedModel(model, config, read_tokenizer(file), path.stem)


def assemble(
    config: DecoderConfig,
    dtype: str,
    weights: Iterable[tuple[str, np.ndarray]],
    unroll: bool = False,
) -> Decoder:
    """A `Decoder` holding `weights`, pairs of name ("blocks/qkv", stacked) and array.

    Raises ValueError when the names, shapes or dtypes are not exactly the decoder's.
    """
    expected = _stacked_weights(config, dtype)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, unroll=unroll))
    graphdef, state = nnx.split(abstract)
    leaves = dict(nnx.to_flat_state(state))
    filled = {}
    for name, array in weights:
        known = expected.pop(name, None)
        if known is None:
            raise ValueError(f"{name}: no such weight, or given twice")
        if (array.shape, array.dtype) != (known.shape, known.dtype):
            raise ValueError(
                f"{name}: {array.dtype}{array.shape}, expected {known.dtype}{known.shape}"
            )
        for path, values in _placed(name, array, unroll):
            filled[path] = leaves[path].replace(jax.device_put(values))
    if expected:
        raise ValueError(f"weights not given: {', '.join(sorted(expected))}")
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _placed(name: str, array: np.ndarray, unroll: bool) -> Iterator[tuple[tuple, np.ndarray]]:
    """Where a weight goes in the decoder's state: whole, or layer by layer."""
    if unroll and name.startswith(BLOCKS):
        for layer, values in enumerate(array):
            yield ("blocks", layer, name.removeprefix(BLOCKS)), values
    else:
        yield tuple(name.split("/")), array


def random_weights(
    config: DecoderConfig, seed: int, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Normal weights of variance 1 / fan-in, from NumPy: quicker than jax.random on a CPU.

    Drawn in parts, each from a generator of its own, so that the numbers do not depend on how many
    threads draw them.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, (name, leaf) in enumerate(_stacked_weights(config, dtype).items()):
            if name.endswith("norm"):
                yield name, np.ones(leaf.shape, leaf.dtype)
                continue
            fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2]
            weight = np.empty(leaf.shape, leaf.dtype)

            def draw(part: tuple[int, np.ndarray], index=index, fan_in=fan_in) -> None:
                number, values = part
                random = np.random.default_rng([seed, index, number])
                values[...] = random.standard_normal(values.shape, np.float32) * fan_in**-0.5

            list(pool.map(draw, enumerate(np.array_split(weight, MOST_PARTS))))
            yield name, weight


def _stacked_weights(config: DecoderConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every weight by name, those of all layers stacked."""
    state = nnx.state(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)), nnx.Param
    )
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
