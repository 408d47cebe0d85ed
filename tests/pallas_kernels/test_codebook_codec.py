"""Codes of calibrated codebooks: what they keep, and attention over chunks that are stored so."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import (
    NO_CONSTANTS,
    ChunkCodec,
    ChunkContext,
    CodebookCodec,
    CodecError,
    HeadConstants,
)
from pallas_kernels.implementations import AttentionShapes, ImplementationError
from pallas_kernels.plans import DecodeReads, OwnChunks
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import H200, use_target
from tests.pallas_kernels.test_chunk_attention import planner_options
from tests.pallas_kernels.test_codecs import assert_as_exact_as_plain, encoded, mixed_context

SIZE, DIM, TURNING = 32, 24, 16
PARTS = [
    CodebookCodec(bits, along, before_rotation=along == "tokens")
    for bits in (4, 3, 2)
    for along in ("tokens", "channels")
]
PLAIN = CodebookCodec(3, "tokens", outliers=0, first_exact=False)


def entries(bits):
    """Closer together around 0, as fitted ones are."""
    even = np.linspace(-1, 1, 2**bits)
    return (0.4 * even + 0.6 * even**3).astype(np.float32)


def constants_of(codec, *axes, seed=0):
    """Of heads that all differ, with these axes."""
    random = np.random.default_rng(seed)
    low = -1.5 - random.random((*axes, DIM), np.float32)
    made = {
        "codebook": entries(codec.bits) * (0.9 + 0.1 * random.random((*axes, 1), np.float32)),
        "low": low,
        "high": low + 3 + random.random((*axes, DIM), np.float32),
        "frequencies": 3.0 ** -(np.arange(TURNING // 2) + random.random((*axes, 1), np.float32)),
    }
    return {name: jnp.asarray(made[name], jnp.float32) for name in codec.constants(DIM)}


def rotated(chunks, begin, frequencies, sign=1):
    """By the definition, in float64: `chunks [*chunks, C, D]`, all of one head."""
    positions = np.asarray(begin)[..., None] + np.arange(chunks.shape[-2])
    angles = sign * positions[..., None] * np.asarray(frequencies, np.float64)
    half = angles.shape[-1]
    first, second, rest = np.split(np.asarray(chunks, np.float64), [half, 2 * half], axis=-1)
    turned = first * np.cos(angles) - second * np.sin(angles)
    other = second * np.cos(angles) + first * np.sin(angles)
    return np.concatenate([turned, other, rest], axis=-1)


def random_chunks(*axes, seed=1):
    """Normal numbers, a few far out; the first token is another than the rest."""
    random = np.random.default_rng(seed)
    chunks = random.standard_normal((*axes, SIZE, DIM))
    chunks[random.random(chunks.shape) < 0.004] *= 20
    chunks[..., 0, :] += 50
    return chunks.astype(np.float32)


@pytest.mark.parametrize("codec", PARTS, ids=str)
def test_a_number_reads_as_the_nearest_entry_and_outliers_as_they_are(codec):
    plain, begin = random_chunks(3), np.array([0, 64, 6400], np.int32)
    constants = constants_of(codec, 1)
    chunks = plain
    if codec.before_rotation:
        chunks = rotated(plain, begin, constants["frequencies"][0]).astype(np.float32)
    stored = jax.jit(codec.encode)(chunks, ChunkContext(jnp.asarray(begin), constants))
    decoded = np.asarray(jax.jit(codec.decode)(stored, constants), np.float64)
    if codec.before_rotation:
        decoded = rotated(decoded, begin, constants["frequencies"][0], sign=-1)
    error = np.abs(decoded - plain)

    assert (error[:, 0] <= 2**-10 * np.abs(plain[:, 0])).all()
    count = round(0.01 * SIZE * DIM + 0.5)
    chex.assert_shape(stored["outliers"], (3, count))
    places = np.asarray(stored["places"])
    outlying = np.zeros((3, SIZE * DIM), bool)
    np.put_along_axis(outlying, places.astype(int), True, axis=1)
    outlying = outlying.reshape(plain.shape)
    assert (outlying.sum(axis=(1, 2)) == count).all()
    assert not outlying[:, 0].any()
    rounding = 2**-10 * np.abs(plain) + 1e-3 * codec.before_rotation  # float32 at 6,400 radians
    assert (error[outlying] <= rounding[outlying]).all()

    others = ~outlying
    others[:, 0] = False
    if codec.along == "channels":
        within = np.where(others, plain, np.nan)[:, 1:]
        low, high = (f(within, axis=2, keepdims=True) for f in (np.nanmin, np.nanmax))
        low, high = (np.pad(x, ((0, 0), (1, 0), (0, 0))) for x in (low, high))
    else:
        low, high = (np.asarray(constants[name])[:, None] for name in ("low", "high"))
    table = np.asarray(constants["codebook"], np.float64)[0]
    scaled = (plain - (high + low) / 2) / np.where(high > low, (high - low) / 2, 1)
    nearest = np.abs(scaled[..., None] - table).min(axis=-1) * (high - low) / 2
    allowed = nearest + rounding + 2**-10 * (np.abs(low) + np.abs(high))
    assert (error <= allowed)[others].all()
    if codec.along == "tokens":  # outliers are those that are missed by most
        least = np.where(outlying, nearest, np.inf).min(axis=(1, 2))
        assert (least >= np.where(others, nearest, 0).max(axis=(1, 2)) - 1e-3).all()


@pytest.mark.parametrize("codec", [*PARTS, PLAIN], ids=str)
def test_the_arrays_are_as_declared_and_chunks_are_encoded_one_by_one(codec):
    chunks, begin = random_chunks(3, 2), jnp.arange(6, dtype=jnp.int32).reshape(3, 2) * SIZE
    constants = constants_of(codec, 1, 2)
    encode = jax.jit(codec.encode)
    stored = encode(chunks, ChunkContext(begin, constants))
    declared = codec.arrays(SIZE, DIM)
    assert {name: (a.shape[2:], a.dtype) for name, a in stored.items()} == {
        name: (a.shape, a.dtype) for name, a in declared.items()
    }
    of_head = {name: array[:, 1] for name, array in constants.items()}
    alone = encode(chunks[1:2, 1], ChunkContext(begin[1:2, 1], of_head))
    chex.assert_trees_all_equal(alone, {name: array[1:2, 1] for name, array in stored.items()})


@pytest.mark.parametrize("codec", [*PARTS, PLAIN], ids=str)
def test_nothing_but_finite_numbers_comes_out(codec):
    chunks = random_chunks(2)
    chunks[0, 3, 5], chunks[0, 4, 6], chunks[0, 0, 7] = np.nan, np.inf, -np.inf
    chunks[1] = 1e30
    context = ChunkContext(jnp.zeros(2, jnp.int32), constants_of(codec, 1))
    stored = jax.jit(codec.encode)(chunks, context)
    decoded = jax.jit(codec.decode)(stored, context.constants)
    assert np.isfinite(decoded).all()


def test_a_model_without_rotation_has_none():
    codec = CodebookCodec(4, "tokens", before_rotation=True)
    constants = constants_of(codec) | {"frequencies": jnp.zeros(0)}
    chunk, context = random_chunks(), ChunkContext(jnp.int32(6400), constants)
    stored = jax.jit(codec.encode)(chunk, context)
    plain = replace(codec, before_rotation=False)
    expected = jax.jit(plain.encode)(chunk, context)
    chex.assert_trees_all_equal(stored, expected | {"begin": stored["begin"]})
    decoded = jax.jit(codec.decode)(stored, constants)
    np.testing.assert_array_equal(decoded, jax.jit(plain.decode)(expected, constants))


def test_equal_numbers_of_a_token_are_exact():
    codec = CodebookCodec(2, "channels", first_exact=False)
    chunks = np.broadcast_to(np.arange(SIZE, dtype=np.float32)[:, None] / 8, (SIZE, DIM))
    constants = constants_of(codec)
    stored = codec.encode(jnp.asarray(chunks), ChunkContext(jnp.int32(0), constants))
    np.testing.assert_array_equal(codec.decode(stored, constants), chunks)


def test_bytes_of_a_chunk():
    """Of 64 tokens of 64 numbers: codes, outliers, the first token, and the ranges of values."""
    sizes = {
        (bits, along): sum(
            a.size * a.dtype.itemsize
            for a in CodebookCodec(bits, along, before_rotation=along == "tokens")
            .arrays(64, 64)
            .values()
        )
        for bits in (4, 3, 2)
        for along in ("tokens", "channels")
    }
    exact, outliers, ranges, begin = 128, 41 * 4, 64 * 4, 4
    assert sizes == {
        (bits, along): 512 * bits + exact + outliers + (begin if along == "tokens" else ranges)
        for bits in (4, 3, 2)
        for along in ("tokens", "channels")
    }


def chunk_codec(bits, *heads, digest="one"):
    keys = CodebookCodec(bits, "tokens", before_rotation=True)
    values = CodebookCodec(bits, "channels")
    constants = (
        {name: np.asarray(array) for name, array in constants_of(part, *heads, seed=seed).items()}
        for seed, part in enumerate((keys, values))
    )
    return ChunkCodec(f"nuq{bits}", keys, values, HeadConstants(digest, *constants))


def test_sizes_that_cannot_be_stored_are_refused():
    codec = chunk_codec(3, 2, 2)
    codec.check(64, DIM, (2, 2))
    with pytest.raises(CodecError, match=r"another model: of 2 layers of 2 KV heads, .* 30 of 3"):
        codec.check(64, DIM, (30, 3))
    with pytest.raises(CodecError, match="cannot store keys: 12 tokens do not fill bytes of 8"):
        codec.check(12, DIM)
    with pytest.raises(CodecError, match="16 bits do not find outliers among 131,072 numbers"):
        codec.check(512, 256)
    with pytest.raises(CodecError, match="keys: it was not calibrated: there is no 'codebook'"):
        replace(codec, constants=NO_CONSTANTS).check(64, DIM)
    with pytest.raises(CodecError, match=r"another model: 'low' has 24, not 64"):
        codec.check(64, 64)
    with pytest.raises(ValueError, match="4, 3 or 2 bits, not 8"):
        CodebookCodec(8, "tokens")
    with pytest.raises(ValueError, match="share of outliers"):
        CodebookCodec(4, "tokens", outliers=1.0)
    with pytest.raises(ValueError, match="need the context"):
        PLAIN.encode(jnp.zeros((SIZE, DIM)))


def test_codecs_of_other_constants_are_others():
    one, same, other = chunk_codec(3, 2, 2), chunk_codec(3, 2, 2), chunk_codec(3, 2, 2, digest="b")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != replace(one, name="another")


def test_kernels_say_that_they_do_not_read_codebooks():
    shapes = AttentionShapes("bfloat16", 1, 64, 64, chunk_codec(4, 1, 1))
    with use_target(H200):
        assert CHUNK_ATTENTION.resolve(None, shapes) == "xla"
        for kernel in ("pallas_triton", "pallas_mosaic_gpu"):
            with pytest.raises(ImplementationError, match=r"keys .*nuq4"):
                CHUNK_ATTENTION.resolve(kernel, shapes)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_a_row_reads_what_is_encoded_with_the_constants_of_each_head(implementation):
    """Of the second layer of two; each chunk stands where its row has it."""
    heads, kv_heads = 4, 2
    case = AttentionCase("1,4_96,64", heads, kv_heads, DIM, chunk_size=SIZE, ragged=20)
    inputs, codec = case_inputs(case, layers=2), chunk_codec(3, 2, kv_heads)
    rows, num_chunks = len(inputs.tables), inputs.keys.shape[2]
    begin = np.zeros(num_chunks, np.int32)
    for table in inputs.tables:
        begin[table] = np.arange(len(table)) * SIZE
    stored = encoded(codec, inputs.keys, inputs.values, 1, begin)
    plan, summary = plan_decode(
        inputs.tables,
        (inputs.lengths[:rows] - 1).tolist(),
        chunk_size=SIZE,
        num_chunks=num_chunks,
        options=planner_options("share all", case, implementation),
    )
    assert summary.shared
    last = [
        table[(length - 1) // SIZE]
        for table, length in zip(inputs.tables, inputs.lengths, strict=False)
    ]
    keys, values = (jnp.asarray(pool[:, :, last]) for pool in (inputs.keys, inputs.values))
    slots = np.full(len(inputs.lengths), rows, np.int32)
    slots[:rows] = np.arange(rows)
    reads = DecodeReads(plan, inputs.lengths, OwnChunks(keys, values, slots))
    attention = AttentionSpec.of(heads, kv_heads, DIM)
    got = CHUNK_ATTENTION.attend(inputs.q, stored, reads, attention, implementation=implementation)

    exact = inputs.keys[1], inputs.values[1]
    codes = [
        np.stack([decoded_alone(part, pool[head], begin, constants, head) for head in range(2)])
        for part, pool, constants in zip(
            (codec.keys, codec.values),
            exact,
            (codec.constants.keys, codec.constants.values),
            strict=True,
        )
    ]
    contexts = [
        mixed_context(exact, codes, table, length)
        for table, length in zip(inputs.tables, inputs.lengths, strict=False)
    ]
    assert_as_exact_as_plain(got[:rows], inputs.q[:rows], contexts)


def decoded_alone(part, chunks, begin, constants, head):
    """What chunks of one head read as, given the constants of that head alone."""
    of_head = {name: jnp.asarray(array[1, head])[None] for name, array in constants.items()}
    stored = jax.jit(part.encode)(chunks, ChunkContext(jnp.asarray(begin), of_head))
    return np.asarray(jax.jit(part.decode)(stored, of_head))
