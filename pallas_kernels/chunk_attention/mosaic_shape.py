"""What a Mosaic GPU kernel of chunk attention is compiled for (Hopper): tiles, buffers, stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_codes import StepCodes
from pallas_kernels.coded_kv import CodedKV, LayerKV
from pallas_kernels.stored_kv import StoredKV

LOG2_E = math.log2(math.e)
WARPGROUP_ROWS = 64  # query rows of one warpgroup: what its matrix instruction takes
WARPGROUP_AXIS = "warpgroup"
SM_SHARED_MEMORY = 233472  # bytes; each program on the SM takes 1024 of them for itself
BARRIER_MEMORY = 256  # bytes, more than three barriers a stage need


@dataclass(frozen=True)
class TileShape:
    """The sizes a kernel is compiled for."""

    attention: AttentionSpec
    head_dim: int  # D
    chunk_size: int  # C
    num_chunks: int  # N
    dtype: Any
    warpgroups: int
    key_tile: int  # tokens of one step
    stages: int
    interpret: Any
    codes: tuple[StepCodes, StepCodes] | None = None  # of keys and values, where they are encoded

    @classmethod
    def of(
        cls,
        stored: LayerKV,
        attention: AttentionSpec,
        dtype: Any,
        *,
        query_tile: int = WARPGROUP_ROWS,
        stages: int | None = None,
        other_memory: int = 0,
        interpret: Any = False,
    ) -> TileShape:
        """`dtype` is what is multiplied; `stages` None chooses; `other_memory` is shared memory
        beside `Buffers`, in bytes."""
        head_dim, chunk_size = stored.head_dim, stored.chunk_size
        # The matrix instruction takes no fewer than 64 tokens. 128 cost less per token, but should
        # not be several chunks: of a short run, most would be padding.
        key_tile = 128 if head_dim == 64 and chunk_size % 128 == 0 else 64
        warpgroups = query_tile // WARPGROUP_ROWS
        tiles_bytes = key_tile * head_dim * 4  # of keys and values
        codes = None
        if isinstance(stored, CodedKV):
            codes = StepCodes.of(stored, key_tile, bool(interpret))
            other_memory = max(other_memory, tiles_bytes)  # in one place, see `kernel`

        def ring_bytes(stages: int) -> int:
            if codes is None:
                return stages * tiles_bytes
            chunks = max(1, key_tile // chunk_size)
            return sum(part.ring_bytes(stages, chunks) for part in codes)

        return cls(
            attention=attention,
            head_dim=head_dim,
            chunk_size=chunk_size,
            num_chunks=stored.num_chunks,
            dtype=dtype,
            warpgroups=warpgroups,
            key_tile=key_tile,
            stages=stages or _default_stages(head_dim, ring_bytes, warpgroups, other_memory),
            interpret=interpreter() if interpret is True else interpret,
            codes=codes,
        )

    @property
    def group(self) -> int:
        """Query heads that read one KV head, G."""
        return self.attention.heads.group

    @property
    def scale(self) -> float:
        """Of the scores, in units of log2."""
        return self.attention.scale * LOG2_E

    @property
    def query_tile(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def chunks_per_step(self) -> int:
        return max(1, self.key_tile // self.chunk_size)

    @property
    def steps_per_chunk(self) -> int:
        return max(1, self.chunk_size // self.key_tile)

    def chunk_operands(self, stored: LayerKV) -> tuple[Any, Any]:
        """The pool's keys and values, as the kernel takes them."""
        if isinstance(stored, StoredKV):
            return stored.keys, stored.values
        assert isinstance(stored, CodedKV), "others are refused"
        assert self.codes is not None
        keys, values = self.codes
        return keys.operands(stored.keys), values.operands(stored.values)

    def kernel(self, body: Callable, out_type, scratch: tuple, grid: dict[str, int]) -> Callable:
        """`plgpu.kernel` with the program's buffers for `attend` after the other scratch.

        Where chunks are encoded, what they are decoded to has its place in the other scratch, which
        must not be used before `attend` has ended.
        """
        buffers = self._buffers()
        if self.codes is not None:
            buffers = buffers._replace(tiles=plgpu.RefUnion(buffers.tiles, scratch))
            body, scratch = _with_tiles(body), ()
        # This lowering puts a barrier of the warpgroup before each copy into shared memory. The
        # ring relies on it: one thread starts the copy, when all four warps have read the buffer.
        # Encoded chunks take several copies each, and many small stores, which have such barriers
        # too: there the program has all that it needs itself, see `await_warps`.
        params = plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=self.codes is not None,
            reduction_scratch_bytes=0,  # for reductions across warps, and there are none
        )
        options = {"interpret": self.interpret} if self.interpret else {}
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=(*scratch, buffers),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=self.warpgroups,
            thread_name=WARPGROUP_AXIS,
            compiler_params=params,
            **options,
        )

    def _buffers(self) -> Buffers:
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        buffer = partial(plgpu.SMEM, dtype=self.dtype, transforms=swizzled)
        tile = self.key_tile, self.head_dim
        rings, copies = [buffer((self.stages, *tile))] * 2, (1, 1)
        tiles = decoded = own_copied = None
        if self.codes is not None:
            rings = [codes.ring(self.stages, self.chunks_per_step) for codes in self.codes]
            copies = [codes.copies for codes in self.codes]
            tiles = buffer(tile), buffer(tile)
            own_copied = plgpu.Barrier(num_arrivals=2 * self.chunks_per_step)
            if self.warpgroups > 1:
                decoded = plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=2)
        copied = [
            plgpu.Barrier(num_arrivals=self.chunks_per_step * each, num_barriers=self.stages)
            for each in copies
        ]
        return Buffers(
            buffer((self.warpgroups, WARPGROUP_ROWS, self.head_dim)),
            rings[0],
            rings[1],
            copied[0],
            copied[1],
            plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.stages),
            buffer((self.warpgroups, WARPGROUP_ROWS, self.key_tile)) if self.interpret else None,
            tiles,
            decoded,
            own_copied,
        )


def _with_tiles(body: Callable) -> Callable:
    """A body that has tiles and scratch apart, of one that has them in one place."""

    @wraps(body)
    def kernel_body(*refs):
        *operands, buffers = refs
        tiles, scratch = buffers.tiles
        return body(*operands, *scratch, buffers._replace(tiles=tiles))

    return kernel_body


def interpreter(**options):
    """Parameters of the interpreter; there is none before jax 0.11."""
    return plgpu.InterpretGPUParams(**options)  # pyright: ignore[reportAttributeAccessIssue]


def _default_stages(
    head_dim: int, ring_bytes: Callable[[int], int], warpgroups: int, other_memory: int
) -> int:
    """As many as let two programs of one warpgroup share an SM, or one program of two fill it.

    Either way the SM has two warpgroups, of which one multiplies while the other exponentiates,
    and four steps or more on their way from memory: 128 KiB. H200's 4.3 TB/s asks for about 50.
    """
    programs = 1 if head_dim == 256 else 2 // warpgroups
    queries = warpgroups * WARPGROUP_ROWS * head_dim * 2
    left = SM_SHARED_MEMORY // programs - 1024 - BARRIER_MEMORY - queries - other_memory
    return max(stages for stages in range(1, 7) if ring_bytes(stages) <= left)


class Buffers(NamedTuple):
    """Shared memory and barriers of one program."""

    queries: Any  # [warpgroups, 64, D]
    keys: Any  # [stages, key_tile, D], or what is stored of encoded chunks
    values: Any
    keys_copied: Any  # [stages]
    values_copied: Any
    read: Any  # [stages]; every warpgroup has read the keys and the values
    weights: Any  # [warpgroups, 64, key_tile]; only when interpreting
    tiles: Any  # two of [key_tile, D]: decoded keys and values; only where chunks are encoded
    decoded: Any  # [2]; every warpgroup has decoded its share; only where there are several
    own_copied: Any  # the tiles have tokens of the row's own chunk
