"""Part `decode`: tokens per second of a model as large as Llama 3 8B, with random weights.

Every row has the same prefix and a few tokens of its own. The pool is filled with random keys and
values instead of computing the prefix: a step takes as long whatever they are. `shared` plans read
the prefix once; `unshared` ones have a copy of it for every row and read that, as far as the pool
has room. A step cannot be faster than reading the weights once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu import floors
from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side, Timing, time_sides
from experiments.gpu.pools import random_buffer
from experiments.gpu.record import significant
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.pool import ChunkPool
from jax_chunkattn.device.programs import SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from jax_chunkattn.planning.planner import plan_decode
from models.building import abstract_decoder
from models.config import DecoderConfig
from models.presets import preset
from models.weights import num_parameters
from pallas_kernels.targets import current_target


@dataclass(frozen=True)
class DecodeSize:
    """What is decoded.

    Attributes:
      batches: rows, the most important first.
      shared, private: tokens of every row.
      steps: tokens chosen for each row in one call.
      num_chunks: of the pool.
    """

    model: str = "llama-3-8b"
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = (32, 64, 256, 1, 128, 8)
    xla_batch: int = 32
    shared: int = 4096
    private: int = 16
    steps: int = 32
    chunk_size: int = 64
    num_chunks: int = 4224  # 35 GB

    @classmethod
    def of(cls, small: bool) -> DecodeSize:
        if not small:
            return cls()
        return cls("tiny", "float32", (2,), 2, 32, 4, 2, chunk_size=16, num_chunks=8)


@dataclass(frozen=True)
class DecodeCase:
    """One program of the part, with its arguments but for the weights and the pool."""

    rows: int
    side: str
    program: Program
    state: RowState
    rest: tuple
    kv_bytes: int

    @property
    def name(self) -> str:
        return f"{self.rows} rows"


def run(bench: Bench) -> None:
    size = DecodeSize.of(bench.small)
    config = preset(size.model)
    unroll = current_target().platform == "gpu" and not bench.small
    split = SplitModel.of(abstract_decoder(config, size.dtype, unroll=unroll))
    with ThreadPoolExecutor(1) as background:
        # Drawing the weights takes the host as long as compiling the programs.
        weights = background.submit(_weights, size, bench.seed, unroll) if bench.runs else None
        found = list(_cases(bench, size, config, split))
        bench.compile(case.program for case in found)
        leaves = weights.result() if weights else []
    if not bench.runs:
        for case in found:
            _report_compiled(bench, case)
        return
    floors.ensure(bench)
    shape = pool_shape(config, size)
    pools = [random_buffer(jax.random.key(index), shape, size.dtype) for index in range(2)]
    holder = _Holder(leaves, ChunkPool(*pools), config.vocab_size)
    weight_bytes = (num_parameters(config) - config.vocab_size * config.hidden_size) * (
        jnp.dtype(size.dtype).itemsize
    )
    for rows in size.batches:
        of_rows = [case for case in found if case.rows == rows]
        _measure(bench, of_rows, holder, size, weight_bytes)


def pool_shape(config: DecoderConfig, size: DecodeSize) -> tuple[int, ...]:
    chunk = (size.num_chunks, size.chunk_size, config.head_dim)
    return (config.num_layers, config.num_kv_heads, *chunk)


class _Holder:
    """The weights, and the pool that goes through every call."""

    def __init__(self, leaves: list, pool: ChunkPool, vocab_size: int) -> None:
        self.leaves = leaves
        self.pool = pool
        self.vocab_size = vocab_size

    def side(self, bench: Bench, case: DecodeCase, steps: int) -> Side:
        run = bench.get(case.program)
        rows, rest = jax.device_put((case.state, case.rest))
        table = RequestTable.of(rows, [], self.vocab_size)

        def call(_: int):
            nonlocal table
            # Every call begins with the same rows, so that none ever comes to its end.
            table = dataclasses.replace(table, rows=jax.tree.map(jnp.copy, rows))
            state, chosen = run(self.leaves, DeviceState(self.pool, table), *rest)
            self.pool, table = state.pool, state.table
            return chosen.tokens

        return Side(call, steps)


def _weights(size: DecodeSize, seed: int, unroll: bool) -> list:
    from models import load

    loaded = load(f"random:{size.model}", dtype=size.dtype, seed=seed, unroll=unroll)
    return SplitModel.of(loaded.model).leaves


def _cases(
    bench: Bench, size: DecodeSize, config: DecoderConfig, split: SplitModel
) -> Iterator[DecodeCase]:
    cache = CacheConfig(size.num_chunks, size.chunk_size, size.dtype)
    best = "pallas_triton" if bench.small else None
    for rows in size.batches:
        sides: dict[str, tuple[str | None, bool]] = {"shared": (best, True)}
        if rows > 1:
            sides["unshared"] = (best, False)
        if rows == size.xla_batch:
            sides["xla shared"] = ("xla", True)
        for side, (implementation, sharing) in sides.items():
            backend = choose_backend(config.cache_spec, cache, implementation=implementation)
            name = side if implementation == "xla" else f"{backend.decode} {side}"
            tables = _tables(rows, size, copies=not sharing, seed=bench.seed)
            if tables is None:
                reason = f"its copies of the prefix do not fit a pool of {size.num_chunks} chunks"
                bench.record.skipped(f"{rows} rows", name, reason)
                continue
            options = dataclasses.replace(backend.planner, sharing=sharing)
            yield _case(rows, name, size, config, split, backend.decode, options, tables)


def _tables(rows: int, size: DecodeSize, *, copies: bool, seed: int) -> list[list[int]] | None:
    """The chunks of every row; None when there are too few."""
    prefix = size.shared // size.chunk_size
    own = -(-(size.private + size.steps) // size.chunk_size)
    needed = rows * (prefix + own) if copies else prefix + rows * own
    if needed > size.num_chunks:
        return None
    ids = np.random.default_rng(seed).permutation(size.num_chunks).tolist()
    common = ids[:prefix]
    if copies:
        each = prefix + own
        return [ids[row * each : (row + 1) * each] for row in range(rows)]
    ends = ids[prefix:]
    return [common + ends[row * own : (row + 1) * own] for row in range(rows)]


def _case(
    rows, name, size: DecodeSize, config: DecoderConfig, split: SplitModel, decode, options, tables
) -> DecodeCase:
    length = size.shared + size.private
    plan, _ = plan_decode(
        tables,
        [length] * rows,
        chunk_size=size.chunk_size,
        num_chunks=size.num_chunks,
        options=options,
    )
    padded = plan.num_rows
    real = np.arange(padded) < rows
    random = np.random.default_rng(rows)
    state = RowState(
        tokens=random.integers(0, config.vocab_size, padded).astype(np.int32),
        lengths=np.where(real, length, 0).astype(np.int32),
        remaining=np.where(real, size.steps + 1, 0).astype(np.int32),
    )
    table = jax.eval_shape(lambda: RequestTable.of(state, [], config.vocab_size))
    rest = (np.arange(padded, dtype=np.int32), plan)
    merge: Callable[[list], Any] = split.merge

    def step(leaves, *arguments):
        return decode_steps(merge(leaves), *arguments, num_steps=size.steps, implementation=decode)

    keys = jax.ShapeDtypeStruct(pool_shape(config, size), jnp.dtype(size.dtype))
    abstract = jax.eval_shape(DeviceState, jax.eval_shape(ChunkPool, keys, keys), table)
    arguments = (split.leaves, abstract, *rest)
    distinct = len({chunk for table in tables for chunk in table})
    per_token = (
        2
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * jnp.dtype(size.dtype).itemsize
    )
    program = Program(("decode", rows, name), step, arguments, (1,))
    kv_bytes = distinct * size.chunk_size * per_token
    return DecodeCase(rows, name, program, state, rest, kv_bytes)


def _measure(
    bench: Bench, cases: list[DecodeCase], holder: _Holder, size: DecodeSize, weight_bytes: int
) -> None:
    sides: dict[str, Side] = {}
    by_side = {case.side: case for case in cases}
    for case in cases:
        reason = bench.budget.lacks(3)
        if reason:
            bench.record.skipped(case.name, case.side, reason)
            continue
        try:
            sides[case.side] = holder.side(bench, case, size.steps)
        except Exception as error:
            bench.record.failed(case.name, case.side, error)
    timings = time_sides(
        sides,
        seconds=0,
        repeats=1 if bench.small else 5,
        seed=bench.seed,
        on_error=lambda name, error: bench.record.failed(f"{cases[0].name}", name, error),
    )
    for name, timing in timings.items():
        _report(bench, by_side[name], timing, weight_bytes)


def _report(bench: Bench, case: DecodeCase, timing: Timing, weight_bytes: int) -> None:
    memory: Any = bench.get(case.program).memory_analysis()
    rate = bench.facts[floors.COPY]
    weights, all_bytes = weight_bytes / rate, (weight_bytes + case.kv_bytes) / rate
    bench.record.measured(
        case.name,
        case.side,
        significant(case.rows / timing.median),
        "tokens/s",
        ms_per_step=significant(1e3 * timing.median),
        least_ms=significant(1e3 * timing.least),
        most_ms=significant(1e3 * timing.most),
        weights_floor_ms=significant(1e3 * weights),
        floor="weights and KV read once",
        floor_ms=significant(1e3 * all_bytes),
        fraction_of_floor=significant(all_bytes / timing.median, 3),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        repeats=timing.repeats,
    )


def _report_compiled(bench: Bench, case: DecodeCase) -> None:
    try:
        memory: Any = bench.get(case.program).memory_analysis()
        bench.record.measured(
            case.name, case.side, True, "compiled", temporary_bytes=memory.temp_size_in_bytes
        )
    except Exception as error:
        bench.record.failed(case.name, case.side, error)
