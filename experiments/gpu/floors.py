"""Part `floors`: how fast the device copies, reads and multiplies.

No attention can be faster than reading each distinct key and value once, or than its products. The
two rates that these limits are taken from are measured, not a data sheet's. A copy counts the bytes
read and the bytes written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side, time_sides
from experiments.gpu.loops import LoopSize, empty_loop_program
from experiments.gpu.record import significant

COPY, READ, MATMUL, LOOP = "copy", "read", "matmul", "empty loop"


def run(bench: Bench) -> None:
    """Measures the rates into `bench.facts`: bytes and operations a second."""
    # Not bit patterns that compress or cost no power: random numbers, some GB of them.
    elements, size = (1 << 14, 64) if bench.small else (1 << 31, 8192)
    work = {
        COPY: (2 * 2 * elements, "GB/s"),
        READ: (2 * elements, "GB/s"),
        MATMUL: (2 * size**3, "TFLOP/s"),
        LOOP: (1, "us"),
    }
    programs = _programs(elements, size, LoopSize.of(bench.small, 0.0))
    bench.compile(programs.values())
    if not bench.runs:
        for name in programs:
            bench.get(programs[name])
            bench.record.measured("device", name, True, "compiled")
        return
    sides = _sides(bench, programs, elements, size)
    timings = time_sides(
        sides,
        seconds=0.02 if bench.small else 0.05,
        repeats=2 if bench.small else 7,
        seed=bench.seed,
        on_error=lambda name, error: bench.record.failed("device", name, error),
    )
    for name, timing in timings.items():
        amount, unit = work[name]
        rate = amount / timing.median
        if name == LOOP:
            bench.record.measured("device", name, **timing.microseconds(), unit="us a call")
            continue
        bench.facts[name] = rate
        scale = 1e12 if unit == "TFLOP/s" else 1e9
        bench.record.measured(
            "device",
            name,
            significant(rate / scale),
            unit,
            least=significant(amount / timing.most / scale),
            most=significant(amount / timing.least / scale),
            amount=amount,
            repeats=timing.repeats,
        )


def ensure(bench: Bench) -> None:
    """Measures the rates, unless they are known."""
    if bench.runs and not {COPY, MATMUL} <= bench.facts.keys():
        part, bench.record.part = bench.record.part, "floors"
        try:
            run(bench)
        finally:
            bench.record.part = part


def floor(bench: Bench, num_bytes: float, flops: float) -> dict[str, Any]:
    """The least microseconds that reading and computing take, and which of the two it is."""
    times = {"bandwidth": num_bytes / bench.facts[COPY], "matrix": flops / bench.facts[MATMUL]}
    bound = max(times, key=lambda name: times[name])
    return {"floor": bound, "floor_us": significant(1e6 * times[bound])}


def _programs(elements: int, size: int, loop: LoopSize) -> dict[str, Program]:
    data = jax.ShapeDtypeStruct((elements,), jnp.bfloat16)
    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return {
        COPY: Program((COPY, elements), jnp.copy, (data,)),
        READ: Program((READ, elements), _maximum, (data,)),
        MATMUL: Program((MATMUL, size), lambda a, b: a @ b, (square, square)),
        LOOP: empty_loop_program(loop),
    }


def _maximum(data):
    return jnp.max(data.reshape(-1, 1 << 14), axis=1)


def _sides(bench: Bench, programs: dict[str, Program], elements: int, size: int) -> dict[str, Side]:
    block = jax.random.normal(jax.random.key(1), (min(elements, 1 << 24),), jnp.float32)
    data = jnp.tile(block.astype(jnp.bfloat16), elements // len(block))
    left, right = (
        jax.random.normal(jax.random.key(seed), (size, size), jnp.float32).astype(jnp.bfloat16)
        for seed in (2, 3)
    )
    zero = jnp.int32(0)
    operands: dict[str, tuple] = {
        COPY: (data,),
        READ: (data,),
        MATMUL: (left, right),
        LOOP: (zero, zero),
    }
    steps = {LOOP: LoopSize.of(bench.small, 0.0).calls}
    sides = {}
    for name, program in programs.items():
        try:
            compiled = bench.get(program)
        except Exception as error:
            bench.record.failed("device", name, error)
            continue
        arguments = operands[name]
        sides[name] = Side(lambda _, run=compiled, a=arguments: run(*a), steps.get(name, 1))
    return sides
