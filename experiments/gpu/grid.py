"""Parts `paper`, `trees`, `hydragen` and `tune`: attention calls, timed side by side.

All programs of some cases are compiled at once, several at a time, and only then are those cases
timed: compilation would disturb the clock.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from experiments.gpu import floors, peer_paged, peer_torch
from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side, Timing, time_sides
from experiments.gpu.coded_loops import CodedLoop
from experiments.gpu.jobs import (
    XLA,
    Job,
    OwnSide,
    hydragen_jobs,
    paper_jobs,
    rehearsed,
    tree_jobs,
    tune_jobs,
)
from experiments.gpu.loops import (
    LoopSize,
    PlannedCase,
    loop_program,
    loop_side,
    plan_case,
    planner_options,
)
from experiments.gpu.pools import Buffers
from experiments.gpu.record import significant
from experiments.gpu.tables import CaseTables, case_tables
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import codec_of
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.plans import DecodeReads
from pallas_kernels.specs import AttentionCase
from pallas_kernels.stored_kv import StoredKV

JOBS: dict[str, Callable[[], list[Job]]] = {
    "paper": paper_jobs,
    "trees": tree_jobs,
    "hydragen": hydragen_jobs,
    "tune": tune_jobs,
}
_JOBS_AT_ONCE = 10
_FIRST_GUESS = 2.5  # seconds that a case takes
_MEASURE_SECONDS = 0.02
_MakeSide = Callable[[], Side]


def run(bench: Bench, part: str) -> None:
    """Times a part's cases, as many as there is time for."""
    floors.ensure(bench)
    jobs = JOBS[part]()
    if bench.small:
        jobs = rehearsed(jobs)
    buffers = Buffers(bench.small, bench.seed)
    started, done = time.perf_counter(), 0
    try:
        for first in range(0, len(jobs), _JOBS_AT_ONCE):
            batch = jobs[first : first + _JOBS_AT_ONCE]
            each = (time.perf_counter() - started) / done if done else _FIRST_GUESS
            reason = bench.budget.lacks(each * len(batch)) if bench.runs else None
            if reason:
                for job in jobs[first:]:
                    bench.record.skipped(job.case.name, "all", reason)
                return
            _run_batch(bench, batch, buffers, first)
            done += len(batch)
    finally:
        buffers.free()


def _run_batch(bench: Bench, jobs: list[Job], buffers: Buffers, first: int) -> None:
    prepared = [_prepare(bench, job, buffers) for job in jobs]
    bench.compile(program for case in prepared for program, _ in case.sides.values() if program)
    for index, case in enumerate(prepared):
        # Rare sides come last, and repeats are fewer when time is short.
        left = bench.budget.left / max(1, len(jobs) - index)
        _measure(bench, case, repeats=7 if left > 4 else 5, seed=bench.seed + first + index)


class _Prepared:
    """A case with the program, if it has one, and the maker of each side."""

    def __init__(self, case: AttentionCase, tables: CaseTables) -> None:
        self.case = case
        self.tables = tables
        self.sides: dict[str, tuple[Program | None, _MakeSide]] = {}
        self.plans: dict[str, PlannedCase] = {}
        self.coded: dict[str, CodedLoop] = {}


def _prepare(bench: Bench, job: Job, buffers: Buffers) -> _Prepared:
    prepared = _Prepared(job.case, case_tables(job.case))
    for own in job.own:
        try:
            _add_own(bench, prepared, own, buffers)
        except Exception as error:
            bench.record.failed(job.case.name, own.name, error)
    for name in job.peers:
        try:
            _add_peer(bench, prepared, name, buffers)
        except Exception as error:
            bench.record.failed(job.case.name, name, error)
    return prepared


def _add_own(bench: Bench, prepared: _Prepared, own: OwnSide, buffers: Buffers) -> None:
    case = prepared.case
    reason = _unsupported(bench, own, case)
    if reason:
        bench.record.skipped(case.name, own.name, reason)
        return
    options = planner_options(case, own.implementation, sharing=own.sharing, **dict(own.work))
    planned = plan_case(
        case,
        prepared.tables,
        options,
        small=bench.small,
        seed=bench.seed,
        encoded=own.codec is not None,
    )
    size = LoopSize.of(bench.small, planned.summary.seconds)
    prepared.plans[own.name] = planned
    if own.codec is not None:
        loop = prepared.coded[own.name] = CodedLoop.of(planned, own.codec)
        program = loop.program(own.implementation, size)
        prepared.sides[own.name] = (program, lambda: loop.side(bench, program, size))
        return
    attend = None
    if own.query_tile is not None:
        attend = functools.partial(_with_query_tile, case, own.query_tile)
    program = loop_program(
        planned, own.name if attend else own.implementation, buffers, size, attend
    )
    prepared.sides[own.name] = (
        program,
        lambda: loop_side(bench, program, planned, buffers, size),
    )


def _add_peer(bench: Bench, prepared: _Prepared, name: str, buffers: Buffers) -> None:
    case, tables = prepared.case, prepared.tables
    if not case.has_plain_scores:
        reason = "here it is given neither a softcap nor a scale of its own"
        bench.record.skipped(case.name, name, reason)
        return
    if name != peer_paged.NAME:
        missing = peer_torch.missing(name) if bench.runs else "JAX compiles nothing of it"
        if missing:
            if not bench.record.has(name, missing):
                bench.record.skipped("all", name, missing)
            return
        reason = peer_torch.unsupported(name, case)
        if reason:
            bench.record.skipped(case.name, name, reason)
            return
        prepared.sides[name] = (None, lambda: peer_torch.side(name, case, bench.seed))
        return
    planned = next(iter(prepared.plans.values()))
    reason = peer_paged.unsupported(planned)
    if reason:
        bench.record.skipped(case.name, name, reason)
        return
    size = LoopSize.of(bench.small, None)
    program = peer_paged.program(planned, tables, buffers, size, bench.small)
    prepared.sides[name] = (
        program,
        lambda: peer_paged.side(bench, program, planned, tables, buffers, size),
    )


def _unsupported(bench: Bench, own: OwnSide, case: AttentionCase) -> str | None:
    if own.implementation == XLA:
        return None
    if bench.backends[own.implementation]:
        return bench.backends[own.implementation]
    group = case.num_heads // case.num_kv_heads
    codec = None if own.codec is None else codec_of(own.codec)
    shapes = AttentionShapes(case.dtype, group, case.head_dim, case.chunk_size, codec)
    try:
        CHUNK_ATTENTION.resolve(own.implementation, shapes)
    except ValueError as error:
        return str(error)
    return None


def _with_query_tile(case: AttentionCase, query_tile: int, q, keys, values, plan, lengths, layer):
    from pallas_kernels.chunk_attention import pallas_mosaic_gpu

    sizes = case.num_heads, case.num_kv_heads, case.head_dim
    attention = AttentionSpec.of(*sizes, scale=case.scale, softcap=case.softcap)
    operands = q, StoredKV(keys, values, layer), DecodeReads(plan, lengths), attention
    return pallas_mosaic_gpu.chunk_attention(*operands, query_tile=query_tile)


def _measure(bench: Bench, prepared: _Prepared, *, repeats: int, seed: int) -> None:
    case, record = prepared.case, bench.record
    sides: dict[str, Side] = {}
    for name, (program, make) in prepared.sides.items():
        try:
            if program is not None and not bench.runs:
                bench.get(program)
                record.measured(case.name, name, True, "compiled")
                continue
            sides[name] = make()
        except Exception as error:
            record.failed(case.name, name, error)
    if not bench.runs:
        return
    timings = time_sides(
        sides,
        seconds=0 if bench.small else _MEASURE_SECONDS,
        repeats=1 if bench.small else repeats,
        seed=seed,
        on_error=lambda name, error: record.failed(case.name, name, error),
    )
    for name, timing in timings.items():
        record.measured(case.name, name, **_numbers(bench, prepared, name, timing))


def _numbers(bench: Bench, prepared: _Prepared, name: str, timing: Timing) -> dict[str, Any]:
    case, tables = prepared.case, prepared.tables
    per_token = 2 * case.num_kv_heads * case.head_dim * jnp.dtype(case.dtype).itemsize
    coded = prepared.coded.get(name)
    if coded is not None:
        per_token = coded.bytes_per_token
    num_bytes = round(tables.distinct_tokens * per_token)
    flops = 4 * case.num_heads * case.head_dim * tables.rows * tables.length
    floor = floors.floor(bench, num_bytes, flops)
    numbers: dict[str, Any] = {
        **timing.microseconds(),
        "unit": "us",
        "repeats": timing.repeats,
        "calls": timing.steps,
        **floor,
        "fraction_of_floor": significant(1e-6 * floor["floor_us"] / timing.median, 3),
        "batch": tables.rows,
        "heads": [case.num_heads, case.num_kv_heads],
        "dtype": case.dtype,
        "distinct_kv_bytes": num_bytes,
        "flops": flops,
    }
    planned = prepared.plans.get(name)
    if planned is not None:
        numbers["shared"] = planned.summary.shared
        numbers["packing"] = planned.summary.packing
        numbers["items"] = int(planned.plan.items.count)
        numbers["layers"] = planned.pool.layers if coded is None else coded.layers
        if planned.summary.seconds is not None:
            numbers["planned_us"] = significant(1e6 * planned.summary.seconds)
    return numbers
