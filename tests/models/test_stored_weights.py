"""New weights for a running engine from files, read one after another."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

import models
from jax_chunkattn import CacheConfig, Engine, InvalidWeights, SamplingParams
from models import CheckpointError
from models.building import aligned_empty
from models.safetensors_file import read_tensors
from tests.models.safetensors_writer import write_safetensors
from tests.models.tiny_checkpoint import write_checkpoint

PROMPT = [1, 2, 3, 4, 5]


def answer(engine: Engine) -> tuple[int, ...]:
    return engine.submit(PROMPT, SamplingParams(12)).result().tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stored") / "tiny.gguf")


@pytest.fixture
def engine(checkpoint: Path):
    """Of the same sizes, with all weights at 0.01."""
    model = models.load(checkpoint).model
    state = nnx.state(model)
    nnx.update(model, nnx.map_state(lambda path, leaf: leaf[...] * 0 + 0.01, state))
    with Engine(model, CacheConfig(16, 16)) as engine:
        yield engine


@pytest.mark.slow
def test_a_checkpoint_replaces_the_weights_one_array_at_a_time(
    checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    before = answer(engine)
    alive: list[weakref.ref] = []
    most = 0

    def counted(shape, dtype):
        nonlocal most
        array = aligned_empty(shape, dtype)
        gc.collect()
        alive.append(weakref.ref(array))
        most = max(most, sum(one() is not None for one in alive))
        return array

    monkeypatch.setattr("models.weight_reading.aligned_empty", counted)
    stored = models.stored_weights(checkpoint)
    assert not alive
    engine.update_weights(stored)
    assert len(alive) == len(nnx.to_flat_state(nnx.state(models.load(checkpoint).model)))
    assert most <= 2
    with Engine(models.load(checkpoint).model, CacheConfig(16, 16)) as other:
        assert answer(engine) == answer(other) != before


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_weights_are_those_that_load_makes(checkpoint: Path, unroll: bool, dtype: str):
    model = models.load(checkpoint, unroll=unroll, dtype=dtype).model
    stored = models.stored_weights(checkpoint, unroll=unroll, dtype=dtype)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        found: Any = stored
        for key in path:
            found = found[str(key)]
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(np.asarray(found), leaf[...])


def test_weights_of_another_model_are_refused_before_one_is_read(engine: Engine, tmp_path: Path):
    other = models.stored_weights(write_checkpoint(tmp_path / "other.gguf"))
    before = answer(engine)
    other["embedding"] = models.stored_weights(tmp_path / "other.gguf")["final_norm"]
    with pytest.raises(InvalidWeights, match="embedding has the shape"):
        engine.update_weights(other)
    assert answer(engine) == before
    assert engine.stats.weights_version == 0


def test_what_cannot_be_opened_is_told(tmp_path: Path, checkpoint: Path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        models.stored_weights(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        models.stored_weights(checkpoint, dtype="int3")
    array = models.stored_weights(checkpoint)["final_norm"]
    with pytest.raises(ValueError, match="cannot be shared"):
        np.array(array, copy=False)


def test_what_orbax_restores_fits(checkpoint: Path, engine: Engine, tmp_path: Path):
    """A checkpoint of the state that Orbax wrote, and gives back as plain dictionaries."""
    saved = nnx.to_pure_dict(nnx.state(models.load(checkpoint).model))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax")
    engine.update_weights(restored)
    stored = engine.submit(PROMPT, SamplingParams(12)).result()
    assert stored.weights == (1,)
    engine.update_weights(models.stored_weights(checkpoint))
    assert answer(engine) == stored.tokens


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path):
    """Its tensors may be elsewhere; those read before are of another checkpoint."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": np.zeros(8, "<f4")})
    tensor = read_tensors(path)["weight"]
    with tensor.values() as values:
        assert not values.any()
    write_safetensors(tmp_path / "new", {"weight": np.ones(8, "<f4")})
    (tmp_path / "new").replace(path)
    changed = "the file has changed since it was opened"
    with pytest.raises(CheckpointError, match=changed), tensor.values():
        pass
