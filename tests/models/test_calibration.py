"""Calibrated codecs: what is sampled, what is fitted to it, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from jax_chunkattn import CacheConfig
from models.calibration import (
    Samples,
    fit,
    key_frequencies,
    ladder,
    load_codec,
    read_codec,
    recipe_of,
    sample,
    write_codec,
)
from models.calibration.fitting import codebook
from models.decoder import Decoder
from models.rope import Rope
from models.safetensors_file import read_metadata, read_tensors, write_tensors
from pallas_kernels.codecs import ChunkContext, CodecError
from tests.jax_chunkattn.toy import toy_model

TOKENS = np.random.default_rng(3).integers(1, 128, 96).astype(np.int32)


@functools.cache
def samples():
    return sample(toy_model(), TOKENS, 1)


@functools.cache
def fitted(name="nuq3"):
    return fit(recipe_of(name), samples(), key_frequencies(toy_model().config))


def test_keys_are_sampled_as_they_are_before_rotation():
    """As a model has them whose keys are not rotated, in its first layer: below, its attention is
    another."""
    config = toy_model().config
    graphdef, state = nnx.split(toy_model())
    still = nnx.merge(graphdef, state)
    still.config = dataclasses.replace(config, rope=None)
    found, plain = sample(toy_model(), TOKENS, 3), sample(still, TOKENS, 3)
    assert found.keys.shape == (2, 32, 2, 16)
    np.testing.assert_allclose(found.keys[0], plain.keys[0], atol=4e-3)  # float16 of up to 4
    assert np.abs(found.keys[1].astype(float) - plain.keys[1]).max() > 0.05
    np.testing.assert_array_equal(found.positions, np.arange(0, 96, 3))
    assert key_frequencies(still.config).shape == (2, 0)


def test_samples_join():
    both = Samples.join([samples(), samples()])
    assert both.keys.shape[1] == both.values.shape[1] == len(both.positions) == 192
    assert np.flatnonzero(both.positions == 0).tolist() == [0, 96]


def test_a_codebook_is_where_the_numbers_are():
    random = np.random.default_rng(0)
    uniform = codebook(random.uniform(-1, 1, 200_000), 2)
    np.testing.assert_allclose(uniform, [-0.75, -0.25, 0.25, 0.75], atol=0.01)
    heaps = [centre + random.uniform(-0.01, 0.01, 99) for centre in (-0.9, 0, 0.1, 0.99)]
    fitted_to_heaps = codebook(np.concatenate(heaps), 2)
    np.testing.assert_allclose(fitted_to_heaps, [-0.9, 0, 0.1, 0.99], atol=5e-3)
    bell = np.clip(random.standard_normal(200_000) / 3, -1, 1)
    entries, evenly = codebook(bell, 3), np.linspace(-1, 1, 8, dtype=np.float32)
    assert np.diff(entries)[0] > 1.5 * np.diff(entries)[3]

    def missed(table):
        return (np.abs(bell[:, None] - table).min(axis=1) ** 2).mean()

    assert missed(entries) < 0.6 * missed(evenly)
    np.testing.assert_array_equal(codebook(np.array([]), 3), evenly)


def made_up(tokens=4000):
    """Keys as models have them: channels of different sizes, a few numbers far out, and a first
    token like no other."""
    random = np.random.default_rng(0)
    numbers = random.standard_normal((2, tokens, 2, 16)) + 4 * random.standard_normal(16)
    numbers[random.random(numbers.shape) < 0.005] *= 6
    numbers[:, 0] = 60 * random.standard_normal((2, 2, 16))
    numbers = numbers.astype(np.float16)
    return Samples(numbers, numbers, np.arange(tokens, dtype=np.int32))


def test_ranges_leave_out_first_tokens_and_outliers():
    samples, frequencies = made_up(), np.zeros((2, 0), np.float32)
    others = samples.keys[:, 1:].astype(np.float32)
    for outliers in (0.01, 0.0):
        constants = fit(recipe_of("nuq4", outliers), samples, frequencies).constants
        for name, share in (("low", outliers / 2), ("high", 1 - outliers / 2)):
            expected = np.quantile(others, share, axis=1)
            np.testing.assert_allclose(constants.keys[name], expected, rtol=1e-5)
        assert constants.values.keys() == {"codebook"}


def test_each_step_of_the_ladder_misses_by_less():
    """Keys that rotate, from 64 on; what KVQuant adds to rounding token by token, one by one."""
    frequencies = np.tile(0.5 ** np.arange(8, dtype=np.float32), (2, 1))
    samples = made_up()
    keys = samples.rotated_keys(frequencies)[1, 64:128].astype(np.float32).transpose(1, 0, 2)
    missed = {}
    for recipe in ladder(3):
        codec = fit(recipe, samples, frequencies)
        constants = {name: jnp.asarray(array[1]) for name, array in codec.constants.keys.items()}
        context = ChunkContext(jnp.full(2, 64, jnp.int32), constants)
        stored = jax.jit(codec.keys.encode)(keys, context)
        decoded = jax.jit(codec.keys.decode)(stored, constants)
        missed[recipe.name] = float(((np.asarray(decoded) - keys) ** 2).mean())
    errors = list(missed.values())
    assert len(errors) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(errors[1:]))
    assert errors[-1] < 0.5 * errors[0]  # the ranges of all but the last hold outliers too


def test_a_file_gives_the_codec_back(tmp_path):
    path, codec = tmp_path / "nuq3.safetensors", fitted()
    write_codec(path, codec, toy_model())
    loaded = load_codec(path, toy_model())
    assert loaded == codec
    assert loaded.name == "nuq3-1%"
    for mine, theirs in ((codec.constants, loaded.constants),):
        for part in ("keys", "values"):
            ours, read = getattr(mine, part), getattr(theirs, part)
            assert ours.keys() == read.keys()
            for name, array in ours.items():
                np.testing.assert_array_equal(read[name], array)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    half = models.load("random:tiny", dtype="bfloat16").model
    assert load_codec(path, half) == codec
    cache = CacheConfig(4, 16, codec=loaded)
    assert cache.codec_name == "nuq3-1%"
    with pytest.raises(CodecError, match="another model: of 2 layers of 2 KV heads"):
        cache.bytes_per_chunk(dataclasses.replace(toy_model().cache_spec, num_layers=3))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: models.load("random:small").model, "its layers, KV heads and head_dim are"),
        (lambda: models.load("random:tiny", seed=1).model, "its embedding is another"),
        (lambda: stretched(), "keys are rotated otherwise"),
    ],
    ids=["other sizes", "other weights", "other rotation"],
)
def test_another_model_is_refused(tmp_path, make, why):
    path = tmp_path / "nuq3.safetensors"
    write_codec(path, fitted(), toy_model())
    with pytest.raises(CodecError, match=f"{path} was calibrated for another model.*{why}"):
        load_codec(path, make())


def stretched() -> Decoder:
    graphdef, state = nnx.split(toy_model())
    model = nnx.merge(graphdef, state)
    model.config = dataclasses.replace(model.config, rope=Rope(5e5))
    return model


def test_files_that_are_not_whole_are_refused(tmp_path):
    path = tmp_path / "nuq3.safetensors"
    write_codec(path, fitted(), toy_model())
    whole = path.read_bytes()
    for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(CodecError, match=f"{path}"):
            read_codec(path)
    with pytest.raises(CodecError, match="no such file"):
        read_codec(tmp_path / "missing.safetensors")
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)}, {})
    with pytest.raises(CodecError, match=r"a\.safetensors is no codec: its format"):
        read_codec(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors, _: tensors.pop("keys.low"), "constants of keys have shapes"),
        (lambda tensors, _: tensors.pop("signature"), "signature"),
        (lambda tensors, _: tensors.update({"keys.low": tensors["keys.low"][:1]}), "too many"),
        (lambda tensors, _: tensors["values.codebook"].fill(np.nan), "of values are not finite"),
        (lambda _, metadata: metadata.update(codec="{}"), "keys"),
        (lambda _, metadata: metadata.update(head_dim="32"), "constants of keys have shapes"),
        (lambda _, metadata: metadata.update(head_dim="many"), "many"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, why):
    path = tmp_path / "nuq3.safetensors"
    write_codec(path, fitted(), toy_model())
    metadata, tensors = dict(read_metadata(path)), {}
    for name, tensor in read_tensors(path).items():
        with tensor.values() as values:
            tensors[name] = np.array(values)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(CodecError, match=f"{path} is no codec that was written whole: .*{why}"):
        read_codec(path)


def test_what_needs_no_calibration_is_not_written(tmp_path):
    codec = CacheConfig(1, codec="int4").chunk_codec
    assert codec is not None
    with pytest.raises(CodecError, match="'int4' is not calibrated"):
        write_codec(tmp_path / "int4.safetensors", codec, toy_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["int4", "nuq5", "nuq4/", "nuq4/int4", "nuq4/nuq3/nuq2", ""])
def test_names_that_cannot_be_calibrated_are_refused(name):
    with pytest.raises(CodecError, match=r"unknown codec .* to be calibrated: nuq4, nuq3, nuq2"):
        recipe_of(name)


def test_names_of_recipes():
    mixed = recipe_of("nuq4/nuq3", 0.02)
    assert (mixed.name, mixed.keys.bits, mixed.values.bits) == ("nuq4/nuq3-2%", 4, 3)
    assert recipe_of("nuq2", 0).name == "nuq2"
    assert json.loads(json.dumps(dataclasses.asdict(mixed.keys)))["outliers"] == 0.02
