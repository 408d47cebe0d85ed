"""`load`: a decoder from a GGUF file, or one with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
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

if TYPE_CHECKING:
    from models.tokenizer import ChatTokenizer

RANDOM_PREFIX = "random:"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns. `tokenizer` is None for random weights, which have no language."""

    model: Decoder
    config: DecoderConfig
    tokenizer: ChatTokenizer | None
    name: str


def load(spec: str | Path, *, dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Load the model that `spec` names, with weights and activations in `dtype`.

    `spec` is the path of a Llama-architecture GGUF file, or `random:<preset>` (`seed` then chooses
    the weights, the same on every platform). Raises ValueError for an unknown dtype or preset,
    FileNotFoundError when there is no such file, CheckpointError when it cannot be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    if isinstance(spec, str) and spec.startswith(RANDOM_PREFIX):
        config = preset(spec.removeprefix(RANDOM_PREFIX))
        model = assemble(config, dtype, random_weights(config, seed, dtype))
        return LoadedModel(model, config, None, spec)
    return _load_gguf(Path(spec), dtype)


def _load_gguf(path: Path, dtype: str) -> LoadedModel:
    from models.tokenizer import read_tokenizer

    if not path.is_file():
        raise FileNotFoundError(
            f"no model file at {path}; give the path of a .gguf file (models.fetch_smollm2() "
            f"returns one) or {RANDOM_PREFIX}<preset>"
        )
    file = read_gguf(path)
    config = read_config(file)
    model = assemble(config, dtype, read_weights(file, config, jnp.dtype(dtype)))
    return LoadedModel(model, config, read_tokenizer(file), path.stem)


def assemble(
    config: DecoderConfig, dtype: str, weights: Iterable[tuple[str, np.ndarray]]
) -> Decoder:
    """A `Decoder` holding `weights`, pairs of state path ("blocks/qkv") and array.

    Raises ValueError when the paths, shapes or dtypes are not exactly the decoder's.
    """
    graphdef, expected = _skeleton(config, dtype)
    filled = {}
    for name, array in weights:
        leaf = expected.pop(name, None)
        if leaf is None:
            raise ValueError(f"{name}: no such weight, or given twice")
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{name}: {array.dtype}{array.shape}, expected {leaf.dtype}{leaf.shape}"
            )
        filled[tuple(name.split("/"))] = leaf.replace(jax.device_put(array))
    if expected:
        raise ValueError(f"weights not given: {', '.join(sorted(expected))}")
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def random_weights(
    config: DecoderConfig, seed: int, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Normal weights of variance 1 / fan-in, from NumPy: quicker than jax.random on a CPU."""
    random = np.random.default_rng(seed)
    for name, leaf in _skeleton(config, dtype)[1].items():
        if name.endswith("norm"):
            yield name, np.ones(leaf.shape, leaf.dtype)
            continue
        fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2]
        values = random.standard_normal(leaf.shape, np.float32)
        values *= fan_in**-0.5
        yield name, values.astype(leaf.dtype, copy=False)


def _skeleton(config: DecoderConfig, dtype: str) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """The decoder's structure, and its weights by path with shapes but no values."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(abstract)
    return graphdef, {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
