"""Part `correctness`: every case of the specs on the device, against float64.

Each case has one program for each backend, which runs several plans of it: the planner's own choice
of what to share, its other packings, everything shared, nothing shared. Every plan is run twice: a
result that changes is a race.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu import (
    choice_cases,
    clustered_cases,
    coded_cases,
    prefill_cases,
    windowed_cases,
)
from experiments.gpu.bench import Bench, Program
from experiments.gpu.loops import planner_options
from experiments.gpu.oracle import Expected, expected
from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, plan_decode
from jax_chunkattn.planning.workloads import AttentionInputs, case_inputs
from pallas_kernels import chunk_attention, specs
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import codec_of
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.specs import AttentionCase
from pallas_kernels.windows import Window

_LAYER, _LAYERS = 1, 2
_MOST_VALUES = 1 << 28  # that the oracle goes over for a case: pairs x tokens x D
_CASES_AT_ONCE = 12
_FIRST_GUESS = 2.0  # seconds that a case takes
_TINY = (specs.NUMERICS[2], AttentionCase("1,3_64,8", 6, 2, 32, chunk_size=16))


@dataclass
class Check:
    """One program and the plans it runs.

    Attributes:
      arguments: by plan, of the program.
      output: of what the program returns, the queries that count.
      expect: what should come out; computed while programs compile.
    """

    case: str
    backend: str
    program: Program
    arguments: dict[str, tuple]
    queries: int
    expect: Callable[[], Expected]


def run(bench: Bench) -> None:
    makers = list(_makers(bench))
    for first in range(0, len(makers), _CASES_AT_ONCE):
        batch = makers[first : first + _CASES_AT_ONCE]
        reason = bench.budget.lacks(_FIRST_GUESS * len(batch)) if bench.runs else None
        checks: list[Check] = []
        for case, backend, make in batch:
            if reason:
                bench.record.skipped(case, backend, reason)
                continue
            try:
                checks.append(make())
            except Exception as error:
                bench.record.failed(case, backend, error, passed=False)
        bench.compile(check.program for check in checks)
        for check in checks:
            try:
                _check(bench, check)
            except Exception as error:
                bench.record.failed(check.case, check.backend, error, passed=False)


def cases(small: bool) -> list[AttentionCase]:
    """What is checked: the specs as they are, and the small ones in bfloat16 too."""
    if small:
        return list(_TINY)
    halved = [dataclasses.replace(case, dtype="bfloat16") for case in specs.NUMERICS]
    return [*specs.NUMERICS, *specs.GPU_NUMERICS, *halved]


def _makers(bench: Bench) -> Iterator[tuple[str, str, Callable[[], Check]]]:
    for case in cases(bench.small):
        group = case.num_heads // case.num_kv_heads
        shapes = AttentionShapes(case.dtype, group, case.head_dim, case.chunk_size)
        inputs = functools.cache(functools.partial(_inputs, case, bench.seed))
        for backend, missing in bench.backends.items():
            reason = missing or _unsupported(backend, shapes)
            if reason:
                bench.record.skipped(case.name, backend, reason)
                continue
            make = functools.partial(_decode_check, case, backend, inputs, bench)
            yield case.name, backend, make
    for case, codec in coded_cases.cases(bench.small):
        sizes = case.num_heads // case.num_kv_heads, case.head_dim, case.chunk_size
        shapes = AttentionShapes(case.dtype, *sizes, codec_of(codec))
        for backend, missing in bench.backends.items():
            name = f"{case.name} {codec}"
            reason = missing or _unsupported(backend, shapes)
            if reason:
                bench.record.skipped(name, backend, reason)
                continue
            yield name, backend, functools.partial(_coded_check, case, codec, backend, bench)
    for case in windowed_cases.cases(bench.small):
        group = case.num_heads // case.num_kv_heads
        shapes = AttentionShapes(case.dtype, group, case.head_dim, case.chunk_size)
        for backend, missing in bench.backends.items():
            reason = missing or _unsupported(backend, shapes)
            if reason:
                bench.record.skipped(windowed_cases.name(case), backend, reason)
                continue
            make = functools.partial(_windowed_check, case, backend, bench)
            yield windowed_cases.name(case), backend, make
    for case in choice_cases.cases(bench.small):
        sizes = case.num_heads // case.num_kv_heads, case.head_dim, case.chunk_size
        shapes = AttentionShapes(case.dtype, *sizes, chosen=True)
        for backend, missing in bench.backends.items():
            reason = missing or _unsupported(backend, shapes)
            if reason:
                bench.record.skipped(choice_cases.name(case), backend, reason)
                continue
            make = functools.partial(_choice_check, case, backend, bench)
            yield choice_cases.name(case), backend, make
    for case, count in clustered_cases.cases(bench.small):
        shapes = AttentionShapes(case.dtype, 1, case.head_dim, case.chunk_size, clustered=True)
        name = clustered_cases.name(case, count)
        for backend, missing in bench.backends.items():
            reason = missing or _unsupported(backend, shapes)
            if reason:
                bench.record.skipped(name, backend, reason)
                continue
            yield name, backend, functools.partial(_clustered_check, case, count, backend, bench)
    for prefill in prefill_cases.cases(bench.small):
        make = functools.partial(_prefill_check, prefill, bench)
        yield prefill.name, "pallas_triton", make


def _unsupported(backend: str, shapes: AttentionShapes) -> str | None:
    try:
        CHUNK_ATTENTION.resolve(backend, shapes)
    except ValueError as error:
        return str(error)
    return None


def _inputs(case: AttentionCase, seed: int) -> tuple[AttentionInputs, Callable[[], Expected]]:
    inputs = case_inputs(case, layers=_LAYERS, seed=seed)

    @functools.cache
    def expect() -> Expected:
        pool = inputs.keys[_LAYER], inputs.values[_LAYER]
        return _expected(case, inputs, pool, inputs.tables)

    return inputs, expect


def _expected(
    case: AttentionCase,
    inputs: AttentionInputs,
    pool: tuple[np.ndarray, np.ndarray],
    tables: Sequence[Sequence[int]],
    windows: Sequence[Window | None] | None = None,
) -> Expected:
    tokens = int(np.mean(inputs.lengths[: len(tables)])) + 1
    return expected(
        inputs.q,
        *pool,
        tables,
        inputs.lengths.tolist(),
        most=max(16, _MOST_VALUES // (tokens * case.head_dim)),
        scale=case.scale,
        softcap=case.softcap,
        windows=windows,
    )


def _decode_check(
    case: AttentionCase,
    backend: str,
    make_inputs: Callable[[], tuple[AttentionInputs, Callable[[], Expected]]],
    bench: Bench,
) -> Check:
    inputs, expect = make_inputs()
    plans = _plans(case, backend, inputs, inputs.lengths[: len(inputs.tables)].tolist())
    fixed = (inputs.q, inputs.keys, inputs.values)
    layer = np.int32(_LAYER)

    def attend(q, keys, values, plan, lengths, layer):
        how = {"scale": case.scale, "softcap": case.softcap, "implementation": backend}
        return chunk_attention(q, keys, values, plan, lengths, layer=layer, **how)

    arguments = {name: (*fixed, plan, inputs.lengths, layer) for name, plan in plans.items()}
    program = Program(("check", case.name, backend), attend, next(iter(arguments.values())))
    return Check(case.name, backend, program, arguments, len(inputs.tables), expect)


def _windowed_check(case: AttentionCase, backend: str, bench: Bench) -> Check:
    inputs = case_inputs(case, layers=_LAYERS, seed=bench.seed)
    rows = len(inputs.tables)
    windows = windowed_cases.windows_for(int(inputs.lengths[:rows].min()))
    of_heads = windowed_cases.of_heads(case.num_kv_heads, windows)
    plans = _plans(case, backend, inputs, inputs.lengths[:rows].tolist(), windows)

    def attend(q, keys, values, plan, lengths, layer, of_heads):
        how = {"scale": case.scale, "softcap": case.softcap, "implementation": backend}
        where = {"layer": layer, "head_windows": of_heads}
        return chunk_attention(q, keys, values, plan, lengths, **where, **how)

    fixed, layer = (inputs.q, inputs.keys, inputs.values), np.int32(_LAYER)
    arguments = {
        name: (*fixed, plan, inputs.lengths, layer, of_heads) for name, plan in plans.items()
    }
    name = windowed_cases.name(case)
    program = Program(("check", name, backend), attend, next(iter(arguments.values())))

    @functools.cache
    def expect() -> Expected:
        pool = inputs.keys[_LAYER], inputs.values[_LAYER]
        of_head = [windows[int(window)] for window in of_heads]
        return _expected(case, inputs, pool, inputs.tables, of_head)

    return Check(name, backend, program, arguments, rows, expect)


def _choice_check(case: AttentionCase, backend: str, bench: Bench) -> Check:
    inputs = case_inputs(case, layers=_LAYERS, seed=bench.seed)
    lengths = inputs.lengths[: len(inputs.tables)].tolist()
    plans = _plans(case, backend, inputs, lengths)
    choices = choice_cases.Choices.of(inputs, case.chunk_size, bench.seed)
    fixed, layer = (inputs.q, inputs.keys, inputs.values), np.int32(_LAYER)
    chosen = choices.columns, choices.number, choices.chunk, choices.tables
    arguments = {
        name: (*fixed, plan, inputs.lengths, layer, *chosen) for name, plan in plans.items()
    }
    name = choice_cases.name(case)
    function = choice_cases.attend(backend, case)
    program = Program(("check", name, backend), function, next(iter(arguments.values())))
    tables, read = choices.read(lengths, case.chunk_size)

    @functools.cache
    def expect() -> Expected:
        pool = inputs.keys[_LAYER], inputs.values[_LAYER]
        lengths = np.zeros_like(inputs.lengths)
        lengths[: len(read)] = read
        reading = dataclasses.replace(inputs, lengths=lengths)
        return _expected(case, reading, pool, tables)

    return Check(name, backend, program, arguments, len(tables), expect)


def _coded_check(case: AttentionCase, codec: str, backend: str, bench: Bench) -> Check:
    inputs = case_inputs(case, layers=_LAYERS, seed=bench.seed)
    pool = coded_cases.CodedPool.of(codec, inputs.keys, inputs.values)
    plans = _plans(case, backend, inputs, coded_cases.planned_lengths(inputs))
    arguments = {
        name: coded_cases.arguments(inputs, pool.stored, plan) for name, plan in plans.items()
    }
    name = f"{case.name} {codec}"
    function = coded_cases.attend(backend, case)
    program = Program(("check", name, backend), function, next(iter(arguments.values())))
    lengths = inputs.lengths[: len(inputs.tables)].tolist()
    tables = [pool.table(*row) for row in zip(inputs.tables, lengths, strict=True)]

    @functools.cache
    def expect() -> Expected:
        return _expected(case, inputs, (pool.keys, pool.values), tables)

    return Check(name, backend, program, arguments, len(tables), expect)


def _clustered_check(case: AttentionCase, count: int, backend: str, bench: Bench) -> Check:
    inputs = case_inputs(case, layers=_LAYERS, seed=bench.seed)
    chunks = clustered_cases.ClusteredChunks.of_inputs(case, count, inputs, bench.seed)
    attended = clustered_cases.as_attended(case)
    inputs = dataclasses.replace(inputs, keys=chunks.keys, values=chunks.values)
    plans = _plans(attended, backend, inputs, coded_cases.planned_lengths(inputs))
    arguments = {
        name: coded_cases.arguments(inputs, chunks.stored, plan) for name, plan in plans.items()
    }
    name = clustered_cases.name(case, count)
    function = coded_cases.attend(backend, attended)
    program = Program(("check", name, backend), function, next(iter(arguments.values())))

    @functools.cache
    def expect() -> Expected:
        pool = inputs.keys[_LAYER], inputs.values[_LAYER]
        return _expected(attended, inputs, pool, inputs.tables)

    return Check(name, backend, program, arguments, len(inputs.tables), expect)


def _plans(
    case: AttentionCase,
    backend: str,
    inputs: AttentionInputs,
    lengths: list[int],
    windows: Sequence[Window | None] = (),
) -> dict[str, Any]:
    """Plans of one shape, by name."""
    options: dict[str, PlannerOptions] = {
        packing: planner_options(case, backend, packing=packing) for packing in PACKINGS
    }
    options["unshared"] = planner_options(case, backend, sharing=False)
    shared = planner_options(case, backend, min_piece_tokens=1)
    options["all shared"] = dataclasses.replace(shared, worth_sharing=_if_common)

    def plan(options: PlannerOptions, at_least: PlanShape):
        return plan_decode(
            inputs.tables,
            lengths,
            chunk_size=case.chunk_size,
            num_chunks=inputs.keys.shape[2],
            options=options,
            at_least=at_least,
            windows=windows,
        )[0]

    shape = PlanShape()
    for one in options.values():
        shape = PlanShape.of(plan(one, shape))
    return {name: plan(one, shape) for name, one in options.items()}


def _if_common(rows: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    return rows > 1


def _prefill_check(prefill: prefill_cases.PrefillCase, bench: Bench) -> Check:
    made = prefill_cases.make(prefill, bench.seed, most_values=_MOST_VALUES)
    program = Program(("check", prefill.name), made.function, made.arguments)
    arguments = {"prefill": made.arguments}
    return Check(prefill.name, "pallas_triton", program, arguments, made.tokens, made.expect)


def _check(bench: Bench, check: Check) -> None:
    run = bench.get(check.program)
    if not bench.runs:
        bench.record.measured(check.case, check.backend, True, "compiled")
        return
    expect = check.expect()
    for plan, arguments in check.arguments.items():
        on_device = jax.tree.map(jnp.asarray, arguments)
        first, second = (np.asarray(run(*on_device))[: check.queries] for _ in range(2))
        error = expect.error(first)
        steady = bool(np.array_equal(first, second))
        passed = error <= expect.allowed and steady
        fields = {
            "naive_error": float(f"{expect.naive_error:.3g}"),
            "allowed": float(f"{expect.allowed:.3g}"),
            "steady": steady,
            "checked": len(expect.where),
            "passed": passed,
        }
        name = f"{check.backend} {plan}"
        value = float(f"{error:.3g}") if math.isfinite(error) else "not finite"
        bench.record.measured(check.case, name, value, "max error", **fields)
