"""Part `tokens`: the decode loop's greedy tokens on the GPU against a CPU's.

In float32, products in full float32, every token must be the same. In bfloat16 the two round in
different places and a near-tie may fall either way, after which texts part: the fraction of equal
tokens is told and nothing is claimed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax
import numpy as np

from experiments.gpu import small_model
from experiments.gpu.bench import Bench, Program
from jax_chunkattn import CacheConfig, Engine, SamplingParams
from pallas_kernels.targets import Target, use_target

_CHUNK = 64
_CASE = "greedy tokens"
_CPU = Target("cpu", "cpu")


def run(bench: Bench) -> None:
    if not bench.runs:
        _compile(bench)
        return
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        bench.record.skipped(_CASE, "all", f"JAX has no CPU to compare with: {error}")
        return
    prompts, count = prompts_of(bench.small, bench.seed)
    for dtype, sides in _sides(bench).items():
        reason = bench.budget.lacks(10)
        if reason:
            bench.record.skipped(_CASE, f"all in {dtype}", reason)
            continue
        with jax.default_device(cpu), use_target(_CPU):
            right = generate(bench, dtype, "xla", prompts, count)
        for backend in sides:
            try:
                got = generate(bench, dtype, backend, prompts, count)
            except Exception as error:
                bench.record.failed(_CASE, f"{backend} {dtype}", error, passed=False)
                continue
            equal = float(np.mean(np.asarray(got) == np.asarray(right)))
            claim = {"passed": equal == 1.0} if dtype == "float32" else {}
            bench.record.measured(
                _CASE, f"{backend} {dtype}", equal, "equal tokens", tokens=np.size(got), **claim
            )


def _sides(bench: Bench) -> dict[str, list[str]]:
    """The backends that run a pool of each dtype."""
    sides: dict[str, list[str]] = {"float32": ["pallas_triton"], "bfloat16": []}
    for backend, missing in bench.backends.items():
        if missing:
            bench.record.skipped(_CASE, backend, missing)
        elif not bench.small:
            sides["bfloat16"].append(backend)
    return {dtype: backends for dtype, backends in sides.items() if backends}


def prompts_of(small: bool, seed: int) -> tuple[list[list[int]], int]:
    """Prompts that share a beginning, and how many tokens to generate after each."""
    random = np.random.default_rng(seed)
    rows, common, most, count = (3, 20, 6, 3) if small else (16, 700, 90, 64)
    vocabulary = small_model.config(small).vocab_size
    start = random.integers(0, vocabulary, common).tolist()
    ends = [random.integers(0, vocabulary, 1 + random.integers(most)) for _ in range(rows)]
    return [start + end.tolist() for end in ends], count


def generate(
    bench: Bench, dtype: str, backend: str, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    chunk_size = 16 if bench.small else _CHUNK
    longest = max(map(len, prompts)) + count
    cache = CacheConfig(len(prompts) * (longest // chunk_size + 2), chunk_size, dtype)
    full = jax.default_matmul_precision("highest")
    with full if dtype == "float32" else contextlib.nullcontext():
        model = small_model.make(bench.small, dtype, bench.seed)
        with Engine(model, cache, implementation=backend, steps_per_call=8) as engine:
            outputs = list(engine.generate(prompts, SamplingParams(max_tokens=count)))
    return [list(output.samples[0].tokens) for output in outputs]


def _compile(bench: Bench) -> None:
    """Decode and prefill programs of the same model."""
    from experiments.compile_report.program_sizes import ProgramSize
    from experiments.compile_report.programs import decode_case, prefill_case
    from experiments.compile_report.target import target_named

    target = target_named("h200")
    for dtype, backends in _sides(bench).items():
        for backend in backends:
            size = ProgramSize(small_model.MEASURED, rows=16, num_chunks=256, dtype=dtype)
            cases = {"decode": decode_case(size, backend, target)}
            if backend == "pallas_triton":
                cases["prefill"] = prefill_case(size, backend, target)
            for name, case in cases.items():
                side = f"{backend} {dtype} {name}"
                program = Program(("tokens", side), case.function, case.arguments, case.donated)
                try:
                    bench.get(program)
                    bench.record.measured(_CASE, side, True, "compiled")
                except Exception as error:
                    bench.record.failed(_CASE, side, error)
