"""Codecs: what a chunk is stored as, and attention over chunks that are stored so."""

from __future__ import annotations

import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import QUERY_TILE
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import AffineCodec, ChunkCodec, ScaledFloatCodec, TensorCodec, codec_of
from pallas_kernels.codecs.scaled_float import widen
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.implementations import AttentionShapes, ImplementationError
from pallas_kernels.plans import DecodeReads, NewTokens, OwnChunks, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import H200, use_target
from tests import oracle
from tests.interpreted import implementations
from tests.pallas_kernels import test_prefill_attention
from tests.pallas_kernels.test_chunk_attention import plain_attention, planner_options
from tests.pallas_kernels.test_prefill_attention import pack

LOSSY = ["int8", "int4", "int2", "int4/int2", "fp8", "fp8_e5m2"]
ALONG: tuple[Literal["tokens", "channels"], ...] = ("tokens", "channels")
AFFINE = [
    *(AffineCodec(bits, along) for bits in (8, 4, 2) for along in ALONG),
    AffineCodec(4, "tokens", 16),
    AffineCodec(2, "channels", 8),
    *(AffineCodec(4, along, fine_first=True) for along in ALONG),
]


CASE = AttentionCase("1,4_96,16", 4, 2, 64)
SWAPPED = ChunkCodec(
    "swapped, in small groups",
    keys=AffineCodec(4, "channels", 8, fine_first=True),
    values=AffineCodec(2, "tokens", 16),
)


def lossy(name, **how) -> ChunkCodec:
    codec = codec_of(name, **how)
    assert codec is not None
    return codec


def random_chunks(shape, *, seed=0, channels=1.0):
    """Normal numbers around an offset of each channel, as keys are."""
    random = np.random.default_rng(seed)
    offsets = channels * random.standard_normal(shape[-1])
    return (random.standard_normal(shape) + offsets).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec: TensorCodec, chunks):
    """One program where op by op there are a dozen."""
    return codec.encode(chunks)


@functools.partial(jax.jit, static_argnums=0)
def decode(codec: TensorCodec, stored):
    return codec.decode(stored)


def scale_of_each_number(codec, stored, shape):
    """The step of each number's group."""
    scale = np.asarray(stored["scale"], np.float64)
    axis = -2 if codec.along == "tokens" else -1
    return np.repeat(scale, shape[axis] // scale.shape[axis], axis=axis)


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 3e3])
def test_no_number_is_further_from_its_code_than_half_a_step(codec, magnitude):
    chunks = magnitude * random_chunks((3, 32, 48), channels=3.0)
    stored = encode(codec, jnp.asarray(chunks))
    error = np.abs(np.asarray(decode(codec, stored), np.float64) - chunks)
    step = scale_of_each_number(codec, stored, chunks.shape)
    # Decoding rounds twice in float32: to 2^-24 of the zero, which may be much more than a step.
    allowed = step / 2
    if codec.fine_first:
        allowed[:, 0] /= 16
    assert (error <= allowed + 2**-23 * np.abs(chunks)).all()
    # No wider steps than needed: the range, and what float16 rounds its two numbers by.
    axis = -2 if codec.along == "tokens" else -1
    levels = 2**codec.bits - 1
    widest = np.ptp(chunks, axis=axis).max()
    assert step.max() <= 1.01 * widest / levels + 0.01 * magnitude + 2**-23  # its smallest is 2^-24


@pytest.mark.parametrize("codec", AFFINE, ids=str)
def test_equal_numbers_are_exact_and_nothing_but_finite_numbers_comes_out(codec):
    for number in (0.0, 1.0, -0.375, 5000.0):
        chunk = jnp.full((32, 48), number)
        np.testing.assert_array_equal(decode(codec, encode(codec, chunk)), chunk)
    third = jnp.full((32, 48), 1 / 3)  # no float16, but two of them say it
    np.testing.assert_allclose(decode(codec, encode(codec, third)), third, rtol=1e-5)
    bad = random_chunks((32, 48))
    bad[3, 5], bad[4, 6], bad[5, 7] = np.nan, np.inf, -np.inf
    decoded = np.asarray(decode(codec, encode(codec, jnp.asarray(bad))))
    assert np.isfinite(decoded).all()
    untouched = (0, 40) if codec.along == "tokens" else (20, 0)  # by what shares a group with them
    assert abs(decoded[untouched] - bad[untouched]) < 2


@pytest.mark.parametrize(("dtype", "relative"), [("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_small_floats_keep_the_bits_that_they_have(dtype, relative):
    codec = ScaledFloatCodec(dtype)
    for magnitude in (1e-30, 1.0, 1e30):
        chunks = magnitude * random_chunks((3, 32, 48))
        decoded = np.asarray(decode(codec, encode(codec, jnp.asarray(chunks))), np.float64)
        smallest = np.abs(chunks).max() * 1e-4  # below, they are subnormal
        assert (np.abs(decoded - chunks) <= relative * np.abs(chunks) + smallest).all()
    zeros = jnp.zeros((32, 48))
    np.testing.assert_array_equal(decode(codec, encode(codec, zeros)), zeros)
    bad = jnp.full((32, 48), jnp.inf).at[0, 0].set(jnp.nan)
    assert np.isfinite(decode(codec, encode(codec, bad))).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_small_floats_are_widened_exactly(dtype):
    codes = jnp.arange(256, dtype=jnp.uint8)
    right = np.asarray(codes.view(dtype)).astype(np.float32)
    finite = np.isfinite(right)
    assert finite.sum() > 240
    widened = np.asarray(jax.jit(widen, static_argnums=1)(codes, dtype))
    np.testing.assert_array_equal(widened[finite], right[finite])
    np.testing.assert_array_equal(np.signbit(widened[finite]), np.signbit(right[finite]))


@pytest.mark.parametrize("name", LOSSY)
def test_the_arrays_are_as_declared_and_chunks_are_encoded_one_by_one(name):
    codec = lossy(name)
    chunks = jnp.asarray(random_chunks((3, 2, 64, 128)))
    for part in (codec.keys, codec.values):
        stored = encode(part, chunks)
        declared = part.arrays(64, 128)
        assert {name: (a.shape[2:], a.dtype) for name, a in stored.items()} == {
            name: (a.shape, a.dtype) for name, a in declared.items()
        }
        alone = encode(part, chunks[1:2, 1])
        among = {name: array[1:2, 1] for name, array in stored.items()}
        chex.assert_trees_all_equal(alone, among)


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("int8", 8.5, 8.5),
        ("int4", 4.5 + 1 / 16, 4.5),  # with 4 bits more for one token of 64
        ("int4/int2", 4.5 + 1 / 16, 2.5 + 1 / 16),
        ("int2", 2.5, 2.5),
    ],
)
def test_bits_of_a_number_with_its_share_of_scale_and_zero(name, keys, values):
    codec = lossy(name)
    for part, bits in ((codec.keys, keys), (codec.values, values)):
        arrays = part.arrays(64, 64).values()
        assert sum(a.size * a.dtype.itemsize for a in arrays) * 8 / (64 * 64) == bits


@pytest.mark.parametrize(
    "name", ["int5", "int4/", "int4/fp8", "fp16", "", "INT4", "int4/int2/int2"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown codec .* known: identity, int8"):
        codec_of(name)


def test_sizes_that_cannot_be_stored_are_refused():
    with pytest.raises(ValueError, match="'int4 groups of 48' cannot store keys: groups of 48"):
        lossy("int4", group=48).check(64, 48)
    with pytest.raises(ValueError, match="'int2' cannot store keys: 6 tokens do not fill bytes"):
        lossy("int2").check(6, 64)
    with pytest.raises(ValueError, match="8, 4 or 2 bits, not 3"):
        AffineCodec(3, "tokens")
    with pytest.raises(ValueError, match="cannot store keys: 33 numbers of 4 bits"):
        lossy("int4").check(16, 33)
    with pytest.raises(ValueError, match="2 numbers at least"):
        codec_of("int4", group=1)
    with pytest.raises(ValueError, match="float8_e4m3fn or"):
        ScaledFloatCodec("float16")
    lossy("int4").check(16, 80)  # groups of 16, which divide 80


class Halves:
    """A codec that no kernel knows: what a user may write."""

    def problem(self, chunk_size, head_dim):
        return None

    def arrays(self, chunk_size, head_dim):
        return {"halves": jax.ShapeDtypeStruct((chunk_size, head_dim), jnp.float16)}

    def encode(self, numbers, context=None):
        return {"halves": numbers.astype(jnp.float16)}

    def decode(self, stored, constants=None):
        return stored["halves"].astype(jnp.float32)


def test_kernels_that_cannot_read_a_codec_say_so():
    int8 = AffineCodec(8, "channels")
    by_48 = AffineCodec(8, "channels", 48)

    def shapes(keys, values):
        return AttentionShapes("float32", 1, 96, 64, ChunkCodec("mine", keys, values))

    with use_target(H200):
        for operation in (CHUNK_ATTENTION, PREFILL_ATTENTION):
            assert operation.resolve("pallas_triton", shapes(int8, int8)) == "pallas_triton"
            assert operation.resolve(None, shapes(Halves(), int8)) == "xla"
            with pytest.raises(ImplementationError, match="not the keys of 'mine'"):
                operation.resolve("pallas_triton", shapes(Halves(), int8))
            with pytest.raises(ImplementationError, match=r"groups of 2, 4, 8.* channels, not 48"):
                operation.resolve("pallas_triton", shapes(int8, by_48))


@pytest.mark.parametrize(("num_chunks", "refused"), [(2**15, False), (2**17, True), (2**18, False)])
def test_codes_that_32_bits_would_not_find_are_refused(num_chunks, refused):
    """An array of 1 GiB, of 4 and of more; nothing is allocated."""
    codec, outer = lossy("int8"), (4, 2, num_chunks)

    def arrays(part):
        return {
            name: jax.ShapeDtypeStruct((*outer, *a.shape), a.dtype)
            for name, a in part.arrays(64, 64).items()
        }

    def attend(keys, values):
        stored = CodedKV(keys, values, 0, codec, 64, 64)
        inputs = case_inputs(CASE, options=planner_options("auto", CASE, "pallas_triton"))
        reads = DecodeReads(inputs.plan, inputs.lengths)
        spec = AttentionSpec.of(4, 2, 64)
        return CHUNK_ATTENTION.function("pallas_triton")(jnp.asarray(inputs.q), stored, reads, spec)

    operands = arrays(codec.keys), arrays(codec.values)
    if not refused:
        assert jax.eval_shape(attend, *operands).dtype == jnp.float32
        return
    with pytest.raises(ValueError, match=r"cannot address 'codes' .* 4294967296 bytes"):
        jax.eval_shape(attend, *operands)


def encoded(codec, keys, values, layer, begin=None):
    """A pool with every chunk of a layer encoded, made by writing it; they stand at `begin`, or one
    after another."""
    layers, kv_heads, num_chunks, size, head_dim = keys.shape

    def empty(part):
        return {
            name: jnp.zeros((layers, kv_heads, num_chunks, *a.shape), a.dtype)
            for name, a in part.arrays(size, head_dim).items()
        }

    parts = empty(codec.keys), empty(codec.values)
    constants = (
        {name: jnp.asarray(array) for name, array in part.items()}
        for part in (codec.constants.keys, codec.constants.values)
    )
    stored = CodedKV(*parts, layer, codec, size, head_dim, *constants)
    k, v = (jnp.asarray(np.moveaxis(pool[layer], 0, 2)) for pool in (keys, values))
    chunks = np.arange(num_chunks, dtype=np.int32)
    return jax.jit(CodedKV.write)(stored, k, v, chunks, chunks * size if begin is None else begin)


def decoded(codec, keys, values):
    """What every chunk reads as."""
    parts = (codec.keys, keys), (codec.values, values)
    return [np.asarray(jax.jit(round_trip, static_argnums=0)(*one)) for one in parts]


def round_trip(part, chunks):
    return part.decode(part.encode(chunks))


def mixed_context(exact, decoded, table, length):
    """What the rule has a query at position `length - 1` read: decoded chunks, and its own."""
    before = (length - 1) // exact[0].shape[2] * exact[0].shape[2]
    return [
        np.concatenate(
            [oracle.context(codes, table, before), oracle.context(pool, table, length)[:, before:]],
            axis=1,
        )
        for codes, pool in zip(decoded, exact, strict=True)
    ]


def assert_as_exact_as_plain(got, q, contexts, softcap=None):
    """flash-attention's rule: plain attention is in the queries' dtype, over decoded chunks."""
    width = max(k.shape[1] for k, _ in contexts)
    lengths = np.array([k.shape[1] for k, _ in contexts], np.int32)

    def padded(tokens):
        return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1]), (0, 0))).astype(q.dtype)

    dense = (np.stack([padded(one) for one in of_rows]) for of_rows in zip(*contexts, strict=True))
    plain = np.asarray(plain_attention(q, *dense, lengths, None, softcap), np.float64)
    exact = np.stack(
        [oracle.attend(row, k, v, softcap=softcap) for row, (k, v) in zip(q, contexts, strict=True)]
    )
    allowed = np.abs(plain - exact).max()
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 2 * allowed + 2e-7


THOROUGH = [pytest.mark.slow, pytest.mark.thorough]  # between others
DECODE = [
    pytest.param("1,5_100,40", 6, 2, 32, 16, 30, "int4", "float32", marks=pytest.mark.slow),
    pytest.param("1,5_100,40", 6, 2, 32, 16, 30, "int8", "float32", marks=THOROUGH),
    pytest.param("1,5_100,40", 6, 2, 32, 16, 30, "int4", "bfloat16", marks=THOROUGH),
    pytest.param("1,3_200,90", 4, 2, 128, 64, 60, "int4", "bfloat16", marks=pytest.mark.slow),
    pytest.param("1,3_200,90", 4, 2, 64, 64, 60, "int8", "float16", marks=THOROUGH),
    ("1,3,12_80,48,16", 4, 4, 16, 16, 0, "int4/int2", "float32"),
    pytest.param("1,4_256,64", 4, 2, 24, 64, 60, SWAPPED, "float32", marks=pytest.mark.slow),
    pytest.param("1,4_256,64", 4, 2, 64, 64, 60, "fp8", "float32", marks=THOROUGH),
    pytest.param("1,4_256,64", 4, 2, 64, 64, 60, "fp8_e5m2", "bfloat16", marks=pytest.mark.slow),
]


@implementations
@pytest.mark.parametrize(
    ("tree", "heads", "kv_heads", "dim", "size", "ragged", "name", "dtype"), DECODE
)
def test_a_row_reads_what_is_encoded_and_its_own_chunk(
    tree, heads, kv_heads, dim, size, ragged, name, dtype, implementation
):
    sizes = {"chunk_size": size, "dtype": dtype, "ragged": ragged}
    case = AttentionCase(tree, heads, kv_heads, dim, softcap=5.0, **sizes)
    inputs, codec = case_inputs(case, layers=2), name if name is SWAPPED else lossy(name)
    rows = len(inputs.tables)
    num_chunks = inputs.keys.shape[2]
    plan, summary = plan_decode(  # as the loop has it: without the token that the step writes
        inputs.tables,
        (inputs.lengths[:rows] - 1).tolist(),
        chunk_size=size,
        num_chunks=num_chunks,
        options=planner_options("share all", case, implementation),
    )
    assert summary.shared
    stored = encoded(codec, inputs.keys, inputs.values, 1)
    slots = np.full(len(inputs.lengths), rows + 3, np.int32)  # nowhere, where a row is padding
    slots[:rows] = np.random.default_rng(0).permutation(rows + 3)[:rows]
    last = [
        table[(length - 1) // size]
        for table, length in zip(inputs.tables, inputs.lengths, strict=False)
    ]
    tails = np.full((2, 2, kv_heads, rows + 3, size, dim), 1e3, inputs.q.dtype)
    for tail, pool in zip(tails, (inputs.keys, inputs.values), strict=True):
        tail[:, :, slots[:rows]] = pool[:, :, last]
    tails[:, 0] = np.nan  # another layer's
    own = OwnChunks(jnp.asarray(tails[0]), jnp.asarray(tails[1]), slots)
    reads = DecodeReads(plan, inputs.lengths, own)
    attention = AttentionSpec.of(heads, kv_heads, dim, softcap=5.0)
    got = CHUNK_ATTENTION.attend(inputs.q, stored, reads, attention, implementation=implementation)
    exact = inputs.keys[1], inputs.values[1]
    codes = decoded(codec, *exact)
    contexts = [
        mixed_context(exact, codes, table, length)
        for table, length in zip(inputs.tables, inputs.lengths, strict=False)
    ]
    assert_as_exact_as_plain(got[:rows], inputs.q[:rows], contexts, softcap=5.0)
    np.testing.assert_array_equal(np.asarray(got)[rows:], 0)


# Segments begin where chunks do; tiles of 64 tokens lie in one chunk, in several, or across calls'
# ends; some have chunks before them, some complete chunks and some none.
PREFILL = [
    pytest.param(
        [(64, 129), (0, 3), (640, 699), (16, 20)], 16, 144, "int4",
        marks=pytest.mark.slow_to_compile,
    ),
    ([(0, 20), (64, 84)], 64, 40, "int8"),
    pytest.param([(0, 300), (128, 257)], 128, 512, "int4/int2", marks=pytest.mark.slow),
    pytest.param([(32, 100)], 32, 100, "fp8", marks=pytest.mark.slow),
]  # fmt: skip


@implementations
@pytest.mark.parametrize(("ranges", "size", "num_tokens", "name"), PREFILL)
def test_a_token_reads_chunks_before_its_own_encoded(
    ranges, size, num_tokens, name, implementation
):
    heads, kv_heads, dim = 4, 2, 24
    options = test_prefill_attention.planner_options(implementation, heads, kv_heads, size)
    segments, batch, num_chunks = pack(ranges, size, num_tokens, options=options)
    codec = lossy(name)
    random = np.random.default_rng(1)
    q = random.standard_normal((num_tokens, heads, dim), np.float32)
    keys, values = random.standard_normal((2, 2, kv_heads, num_chunks, size, dim), np.float32)
    new = np.full((2, num_tokens, kv_heads, dim), np.nan, np.float32)
    new[1] = 1e3  # values of padding are finite, as those of the model are made
    exact = keys[1], values[1]
    codes = decoded(codec, *exact)
    contexts, token = [], 0
    for segment in segments:
        for position in range(segment.begin, segment.end):
            place = segment.chunk_ids[position // size], position % size
            new[:, token] = keys[1][:, *place], values[1][:, *place]
            contexts.append(mixed_context(exact, codes, segment.chunk_ids, position + 1))
            token += 1
    stored = encoded(codec, keys, values, 1)
    tokens = NewTokens(jnp.asarray(new[0]), jnp.asarray(new[1]))
    reads = PrefillReads(batch.plan, QUERY_TILE, tokens)
    attention = AttentionSpec.of(heads, kv_heads, dim)
    got = PREFILL_ATTENTION.attend(q, stored, reads, attention, implementation=implementation)
    assert_as_exact_as_plain(got[:token], q[:token], contexts)
    np.testing.assert_array_equal(np.asarray(got)[token:], 0)
