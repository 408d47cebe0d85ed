"""Encoded chunks inside a Mosaic GPU kernel (Hopper): how they are copied, and how decoded.

What a codec stores is copied by TMA as it is. A warpgroup then decodes a step's tokens once, for
all query rows of the program, into a tile of the form that the matrix instruction reads.

Decoding moves nothing between threads: each loads 8 neighbouring codes of a token and stores 8
numbers. A byte of 4-bit codes is of two tokens, half a chunk apart. So where a chunk takes several
steps, a step has the tokens of consecutive bytes, which are several runs of tokens. Keys and values
agree on which, and nothing else depends on their order: encoded chunks are read whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Float16, Shaped, UInt8, UInt16

from pallas_kernels.codecs import AffineCodec, ChunkCodec, ScaledFloatCodec, codes_per_byte
from pallas_kernels.coded_kv import CodedKV, Encoded

CHANNELS = 64  # decoded at once: a row of the tile's swizzled blocks
COPY_BYTES = 128  # a copy has a multiple of so many
CODES, FIRST = "codes", "first"
HEAD_DIMS = (64, 128)  # with 256 the kernels need some registers more than there are
FIRST_ROWS = 16  # decoded with the token that has finer codes


def unsupported_codec(codec: ChunkCodec, chunk_size: int, head_dim: int) -> str | None:
    """Why chunks of these sizes cannot be read here, or None."""
    for what, part in (("keys", codec.keys), ("values", codec.values)):
        problem = _unsupported_part(part, chunk_size, head_dim)
        if problem is not None:
            return f"the Mosaic GPU kernels do not read {what} stored as {codec.name}: {problem}"
    if head_dim not in HEAD_DIMS:
        return (
            f"the Mosaic GPU kernels read encoded chunks of a head_dim of 64 or 128, not {head_dim}"
        )
    return None


def _unsupported_part(part: Any, chunk_size: int, head_dim: int) -> str | None:
    if type(part) is ScaledFloatCodec:
        return None
    if type(part) is not AffineCodec:
        return f"they know no {type(part).__name__}"
    if part.bits not in (8, 4):
        return f"they take 8 or 4 bits, not {part.bits}"
    if part.bits == 8 and part.fine_first:
        return "they take a finer first token of codes of 4 bits only"
    size = chunk_size if part.along == "tokens" else head_dim
    allowed, group = math.gcd(size, CHANNELS), part.group_of(size)
    if group != allowed:
        return f"they take groups of {allowed} {part.along}, not of {group}"
    return None


class Place(NamedTuple):
    """Where a step's codes are, inside a kernel."""

    arrays: dict[str, Any]  # of the pool, see `StepCodes.operands`
    ring: dict[str, Any]  # in shared memory, see `StepCodes.ring`
    slot: Any  # of the ring
    step: Any  # of those that a chunk takes


class Block(NamedTuple):
    """Some bytes of codes."""

    run: int
    row: int  # the first, in the run
    rows: int


@dataclass(frozen=True)
class StepCodes:
    """What one step reads of the keys, or of the values, of each of its chunks.

    Letters: C tokens of a chunk, D numbers of a head, T tokens of a chunk in a step.
    """

    codec: AffineCodec | ScaledFloatCodec
    chunk_size: int  # C
    head_dim: int  # D
    tokens: int  # T
    runs: int  # of consecutive tokens, in a step of a chunk that takes several
    kv_heads: int  # Hkv
    num_chunks: int  # N
    interpret: bool

    @classmethod
    def of(cls, stored: CodedKV, key_tile: int, interpret: bool) -> tuple[StepCodes, StepCodes]:
        """Of keys, and of values."""
        codec, chunk_size = stored.codec, stored.chunk_size
        tokens = min(chunk_size, key_tile)
        known = AffineCodec, ScaledFloatCodec
        parts = [part for part in (codec.keys, codec.values) if isinstance(part, known)]
        runs = 1 if tokens == chunk_size else max(map(codes_per_byte, parts))
        sizes = stored.kv_heads, stored.num_chunks
        keys, values = (
            cls(part, chunk_size, stored.head_dim, tokens, runs, *sizes, interpret)
            for part in parts
        )
        return keys, values

    @property
    def whole(self) -> bool:
        """Whether a step has all of a chunk."""
        return self.tokens == self.chunk_size

    @property
    def code_runs(self) -> int:
        """Runs of consecutive bytes of codes."""
        return max(1, self.runs // codes_per_byte(self.codec))

    @property
    def run_rows(self) -> int:
        """Rows of bytes in such a run, R: each has the codes of `per_byte` tokens."""
        return self.tokens // codes_per_byte(self.codec) // self.code_runs

    @property
    def affine(self) -> AffineCodec:
        """The codec, where it has groups."""
        assert isinstance(self.codec, AffineCodec)
        return self.codec

    @property
    def group(self) -> int:
        along_tokens = self.affine.along == "tokens"
        return self.affine.group_of(self.chunk_size if along_tokens else self.head_dim)

    @property
    def fine_first(self) -> bool:
        """Whether the first token has finer codes."""
        return isinstance(self.codec, AffineCodec) and self.codec.fine_first

    @property
    def copies(self) -> int:
        """How many copies a chunk of a step takes."""
        if isinstance(self.codec, ScaledFloatCodec):
            return self.code_runs + 1
        return self.code_runs + 2 * self.runs + self.fine_first

    @property
    def group_run(self) -> int:
        """Scales of one run of tokens, as many as the pool has one after another."""
        tokens = self.chunk_size if self.whole else self.tokens // self.runs
        return self._scales_before(tokens) or self.head_dim

    def _scales_before(self, token):
        """Scales that are stored before a token's group."""
        if self.affine.along == "tokens":
            return token // self.group * self.head_dim
        return token * (self.head_dim // self.group)

    def ring(self, stages: int, chunks: int) -> dict[str, Any]:
        """Shared memory for `stages` steps of so many chunks each."""
        codes = (stages, chunks, self.code_runs * self.run_rows, self.head_dim)
        if isinstance(self.codec, ScaledFloatCodec):
            scale = plgpu.SMEM((stages, chunks, _line(1, 4)), jnp.float32)
            return {CODES: plgpu.SMEM(codes, jnp.uint8), "scale": scale}
        scales = plgpu.SMEM((stages, chunks, self.runs, _line(self.group_run, 2)), jnp.float16)
        ring = {
            CODES: plgpu.SMEM(codes, jnp.uint8),
            "scale": scales,
            "zero": scales,
        }
        if self.fine_first:
            ring[FIRST] = plgpu.SMEM(
                (stages, chunks, COPY_BYTES + _line(self.head_dim // 2, 1)), jnp.uint8
            )
        return ring

    def ring_bytes(self, stages: int, chunks: int) -> int:
        """What such a ring takes: each array begins at a multiple of 1024 bytes."""
        arrays = self.ring(stages, chunks).values()
        sizes = (math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)
        return sum(-(-size // 1024) * 1024 for size in sizes)

    def operands(self, encoded: Encoded) -> dict[str, Shaped[Array, "L Hkv ..."]]:
        """The pool's arrays as the kernel takes them: codes as they are, of the others all numbers
        of a layer's head one after another."""

        def flat(array):
            # One number a chunk is not the 16 bytes that a head's must be a multiple of.
            outer = () if isinstance(self.codec, ScaledFloatCodec) else array.shape[:2]
            flattened = array.reshape(*outer, -1)
            room = _line(1, array.dtype.itemsize) - flattened.shape[-1]
            return jnp.pad(flattened, (*((0, 0) for _ in outer), (0, max(0, room))))

        return {name: array if name == CODES else flat(array) for name, array in encoded.items()}

    def copy(self, place: Place, layer, head, chunk, index: int, barrier) -> None:
        """Starts the copies of one chunk, the `index`-th of the step."""
        arrays, ring, slot, step = place
        rows, tokens = self.run_rows, self.tokens // self.runs
        for run in range(self.code_runs):
            begin = run * (self.chunk_size // self.runs) + step * rows
            source = arrays[CODES].at[layer, head, chunk, pl.ds(begin, rows)]
            target = ring[CODES].at[slot, index, pl.ds(run * rows, rows)]
            plgpu.copy_gmem_to_smem(source, target, barrier)
        if isinstance(self.codec, ScaledFloatCodec):
            target = ring["scale"].at[slot, index]
            begin = (layer * self.kv_heads + head) * self.num_chunks + chunk
            source = arrays["scale"].at[pl.ds(begin, target.shape[-1])]
            plgpu.copy_gmem_to_smem(source, target, barrier)
            return
        of_chunk = self._scales_before(self.chunk_size)
        for name in ("scale", "zero"):
            target = ring[name].at[slot, index]
            for run in range(self.runs):
                token = run * (self.chunk_size // self.runs) + step * tokens
                begin = chunk * of_chunk + self._scales_before(token)
                source = arrays[name].at[layer, head, pl.ds(begin, target.shape[-1])]
                plgpu.copy_gmem_to_smem(source, target.at[run], barrier)
        if self.fine_first:
            target = ring[FIRST].at[slot, index]
            count = target.shape[-1] - COPY_BYTES
            begin = chunk * (self.head_dim // 2)
            source = arrays[FIRST].at[layer, head, pl.ds(begin, count)]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(COPY_BYTES, count)], barrier)

    def decode(self, place: Place, index: int, tile, share, shares: int) -> None:
        """Writes the numbers of the `index`-th chunk's tokens to their rows of tile [key_tile, D],
        in its dtype; of `shares` warpgroups, the calling one writes what is its `share`."""
        blocks, columns = list(self._blocks()), self.head_dim // CHANNELS

        def write(block: Block, column) -> None:
            for token, numbers in self._decoded(place, index, block, column):
                rows = tile.at[pl.ds(index * self.tokens + token, block.rows)]
                target = rows.at[:, pl.ds(column * CHANNELS, CHANNELS)]
                target[...] = _rounded(numbers, tile.dtype)

        if columns % shares:
            for number, block in enumerate(blocks):
                pl.when(share == number % shares)(partial(write, block, 0))
            return

        def write_column(step) -> None:
            for block in blocks:
                write(block, step if shares == 1 else step * shares + share)

        for step in range(columns // shares):
            write_column(step)

    def _blocks(self) -> Iterator[Block]:
        """What is decoded at once, CHANNELS wide."""
        for run in range(self.code_runs):
            row = 0
            while row < self.run_rows:
                rows = self.run_rows - row
                if isinstance(self.codec, AffineCodec) and self.codec.along == "tokens":
                    rows = min(rows, self.group)
                if self.fine_first and run == row == 0:
                    rows = min(rows, FIRST_ROWS)
                yield Block(run, row, rows)
                row += rows

    def _decoded(self, place: Place, index: int, block: Block, column) -> Iterator[tuple[int, Any]]:
        """Of each code in a block's bytes: the row of the first in the chunk's part of the tile,
        and the numbers: float [rows, CHANNELS]."""
        layout = _layout(block.rows)
        rows = pl.ds(block.run * self.run_rows + block.row, block.rows)
        source = place.ring[CODES].at[place.slot, index, rows]
        packed = _load(source.at[:, pl.ds(column * CHANNELS, CHANNELS)], layout)
        if isinstance(self.codec, ScaledFloatCodec):
            scale = place.ring["scale"][place.slot, index, 0]
            floats = lax.bitcast_convert_type(packed, jnp.dtype(self.codec.dtype))
            numbers = floats.astype(jnp.float16).astype(jnp.float32) * scale
            yield block.run * self.run_rows + block.row, numbers
            return
        packed = _or_1024(packed) if self.interpret else _pair_with_1024(packed, layout)
        for part in range(self.affine.per_byte):
            codes = _floats(packed, self.affine.bits, part)
            token_run = part * self.code_runs + block.run
            if self.fine_first and token_run == block.row == 0:
                codes = codes + self._first(place, index, block.rows, column)
            of_run = block._replace(run=token_run)
            scale = self._scales("scale", place, index, of_run, column)
            zero = self._scales("zero", place, index, of_run, column)
            yield token_run * self.run_rows + block.row, codes * scale + zero

    def _scales(self, name: str, place: Place, index: int, block: Block, column):
        """Scales, or zeros, of a run of tokens: float16 [rows, CHANNELS]."""
        run, row, rows = block
        if self.whole:
            run, row = 0, run * self.run_rows + row
        line, layout = place.ring[name].at[place.slot, index, run], _layout(rows)
        begin = self._scales_before(row)
        if self.affine.along == "tokens":
            source = line.at[pl.ds(begin + column * CHANNELS, CHANNELS)]
            return _spread(_load(source, layout.reduce(0)), (rows, CHANNELS), 0)
        columns = self.head_dim // CHANNELS  # each of them a group
        source = line.at[pl.ds(begin, rows * columns)]
        if self.interpret:  # it knows no references of another shape
            scales = lax.dynamic_index_in_dim(source[...].reshape(rows, columns), column, 1, False)
            return _spread(scales, (rows, CHANNELS), 1)
        if columns > 1:
            source = source.reshape(rows, columns).at[:, column]
        return _spread(_load(source, layout.reduce(1)), (rows, CHANNELS), 1)

    def _first(self, place: Place, index: int, rows: int, column):
        """What the first token's finer codes add to a block's codes: float16 [rows, CHANNELS]."""
        layout, half = _layout(rows), self.head_dim // 2
        line = place.ring[FIRST].at[place.slot, index]

        def load(begin):
            packed = line.at[pl.ds(COPY_BYTES + begin, CHANNELS)]
            return _or_1024(_load(packed, layout.reduce(0)))

        first_channel = column * CHANNELS
        if half >= CHANNELS:
            low = high = load(first_channel & (half - 1))
        else:
            # Channel 32 + c has the high bits of byte c. What lies before the bytes is not used.
            low, high = load(0), load(-half)
        channel = plgpu.broadcasted_iota(jnp.int32, (CHANNELS,), 0, layout=layout.reduce(0))
        is_low = channel < half - first_channel
        sixteenths = jnp.where(is_low, _floats(low, 4, 0), _floats(high, 4, 1))
        rest = sixteenths * jnp.float16(1 / 16) - jnp.float16(7.5 / 16)
        token = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout.reduce(1))
        is_first = token == 0 if self.whole else (token == 0) & (place.step == 0)
        # As a factor, because selecting takes an instruction for each number.
        factor = jnp.where(is_first, jnp.float16(1), jnp.float16(0))
        shape = rows, CHANNELS
        return _spread(rest, shape, 0) * _spread(factor, shape, 1)


def _spread(numbers, shape: tuple[int, int], axis: int):
    """A number for each column (axis 0) or row (axis 1), in a block of that shape."""
    block = lax.broadcast_in_dim(numbers, shape, [1 - axis])
    return plgpu.layout_cast(block, _layout(shape[0]))


def _rounded(numbers, dtype):
    """Floats in the dtype; there is no instruction from one to the other 16-bit float."""
    return numbers if numbers.dtype == dtype else numbers.astype(jnp.float32).astype(dtype)


def _or_1024(packed: UInt8[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """Bytes as the last bits of 1024, which is as many units as float16 counts exactly."""
    return packed.astype(jnp.uint16) | jnp.uint16(0x6400)


def _pair_with_1024(
    packed: UInt8[Array, "rows channels"], layout
) -> UInt16[Array, "rows channels"]:
    """`_or_1024` in one instruction for two bytes; the compiler takes four to widen them."""

    def widen(_, array):
        i8, i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 16, 32))
        four, pair = ir.VectorType.get((4,), i8), ir.VectorType.get((2,), i16)
        high = arith.constant(i32, ir.IntegerAttr.get(i32, 0x64646464))
        high = vector.bitcast(four, vector.broadcast(ir.VectorType.get((1,), i32), high))

        def widen_register(register):
            count = ir.VectorType(register.type).shape[0]
            pairs = []
            for first in range(0, count, 4):
                bytes_ = vector.shuffle(register, register, list(range(first, first + 4)))
                for mask in ([0, 4, 1, 5], [2, 6, 3, 7]):
                    pairs.append(vector.bitcast(pair, vector.shuffle(bytes_, high, mask)))
            while len(pairs) > 1:
                wider = list(range(2 * ir.VectorType(pairs[0].type).shape[0]))
                halves = zip(pairs[::2], pairs[1::2], strict=True)
                pairs = [vector.shuffle(low, high, wider) for low, high in halves]
            return pairs[0]

        registers = np.empty(array.registers.shape, object)
        for index, register in np.ndenumerate(array.registers):
            registers[index] = widen_register(register)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=False)

    result = plgpu.ShapeDtypeStruct(packed.shape, jnp.uint16, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    return inline(widen)(packed)


def _floats(packed: UInt16[Array, "*shape"], bits: int, part: int) -> Float16[Array, "*shape"]:
    """Codes as numbers, of bytes behind 1024: all 8 bits, or the low (0) or high (1) 4 bits."""
    if bits < 8:
        packed = packed & jnp.uint16(0x6400 | ((1 << bits) - 1) << (bits * part))
    offset = lax.bitcast_convert_type(packed, jnp.float16)
    if part == 0:
        return offset - jnp.float16(1024)
    return offset * jnp.float16(1 / 16) - jnp.float16(64)


def _line(numbers: int, itemsize: int) -> int:
    """Numbers of so many bytes that a copy has, to have these at least."""
    return -(-numbers * itemsize // COPY_BYTES) * COPY_BYTES // itemsize


def _layout(rows: int):
    """How a block [rows, CHANNELS] lies in registers: a thread has 8 channels of a token, or 4.

    A warp has whole rows, so that neither loading bytes nor storing 16-bit numbers to swizzled
    memory makes its threads wait for one another.
    """
    if rows % 16 == 0:
        tiles, warps = ((16, CHANNELS), (4, CHANNELS), (8,)), 5
    else:
        tiles, warps = ((8, CHANNELS), (2, CHANNELS), (4,)), 5
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(-warps,), lane_dims=(-3, -2), vector_dim=-1
    )


def _load(reference, layout):
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(reference, *index, layout=layout, optimized=False)
