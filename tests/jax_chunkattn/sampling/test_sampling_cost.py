"""What no row asks for costs nothing: it is in a branch that is not taken."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.compile_report.hlo import Module
from jax_chunkattn.sampling import (
    RowSampling,
    SamplingParams,
    TokenCounts,
    log_probabilities,
    sample,
)
from tests.jax_chunkattn.device.pool_copies import pool_sized_operations

pytestmark = pytest.mark.optimised

ROWS, SLOTS, VOCABULARY = 4, 6, 4096
LOGITS = jax.ShapeDtypeStruct((ROWS, VOCABULARY), jnp.float32)
INTEGERS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
COUNTS = jax.eval_shape(
    lambda: TokenCounts(
        jnp.zeros((SLOTS, VOCABULARY), jnp.bool_), jnp.zeros((SLOTS, VOCABULARY), jnp.int32)
    )
)


def sample_from_table(logits, rows, positions, counts, slots):
    return sample(logits, rows, positions, lambda: counts.take(slots))


SAMPLE = sample_from_table, (LOGITS, RowSampling.stack([], ROWS), INTEGERS, COUNTS, INTEGERS)
REPORT = log_probabilities, (LOGITS, INTEGERS, RowSampling.stack([], ROWS).logprobs)


def unconditional(jaxpr) -> Iterator:
    """Operations of a program outside branches, with those of the functions and loops it calls."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "cond":
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from unconditional(inner)


def branches(jaxpr) -> list:
    """Of the only choice that is always made: first what is run when no row asks."""
    [choice] = [e for e in unconditional(jaxpr) if e.primitive.name == "cond"]
    return [branch.jaxpr for branch in choice.params["branches"]]


def wide(jaxpr) -> list[str]:
    """Unconditional operations that make an array of the vocabulary's size."""
    return [
        equation.primitive.name
        for equation in unconditional(jaxpr)
        if equation.primitive.name != "jit"  # a function's call: what is in it counts
        and any(np.prod(result.aval.shape) >= VOCABULARY for result in equation.outvars)
    ]


@pytest.mark.parametrize(("function", "arguments"), [SAMPLE, REPORT])
def test_a_batch_that_asks_for_nothing_makes_no_array_of_the_vocabularys_size(function, arguments):
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    assert wide(jaxpr) == []
    nothing, something = branches(jaxpr)
    assert wide(nothing) == []
    assert wide(something) != []


def test_a_greedy_batch_runs_an_argmax_and_nothing_more():
    function, arguments = SAMPLE
    greedy, _ = branches(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert {e.primitive.name for e in unconditional(greedy)} <= {"argmax", "convert_element_type"}


def test_each_feature_is_in_a_branch_of_its_own():
    function, arguments = SAMPLE
    _, chosen = branches(jax.make_jaxpr(function)(*arguments).jaxpr)
    names = {e.primitive.name for e in unconditional(chosen)}
    assert not names & {"scatter", "scatter-add", "gather", "while", "scan", "random_bits", "exp"}


def test_the_logits_are_not_copied_before_the_first_branch():
    function, arguments = SAMPLE
    compiled = jax.jit(function).lower(*arguments).compile()
    made = [
        operation
        for computation, operation in Module(compiled.as_text() or "").unfused()
        if computation.startswith("main")
        and operation.kind not in ("parameter", "tuple", "get-tuple-element", "conditional")
    ]
    assert made
    assert all(array.nbytes < 4 * VOCABULARY for one in made for array in one.results)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 0),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, 0),
        ({"logit_bias": {1: 2.0}}, 0),
        ({"repetition_penalty": 1.1}, 1),
        ({"presence_penalty": 0.5}, 1),
        ({"frequency_penalty": -0.5, "temperature": 1.0}, 1),
    ],
)
def test_token_counts_are_looked_up_for_penalties_only(options, calls):
    looked_up = []
    nothing = TokenCounts(jnp.zeros((2, 8), bool), jnp.zeros((2, 8), jnp.int32))

    def counts():
        jax.debug.callback(lambda: looked_up.append(1))
        return nothing

    rows = RowSampling.stack([SamplingParams(), SamplingParams(seed=0, **options)], 2)
    jax.block_until_ready(
        jax.jit(lambda logits, positions: sample(logits, rows, positions, counts))(
            jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32)
        )
    )
    jax.effects_barrier()
    assert len(looked_up) == calls


def test_a_loop_that_counts_tokens_updates_its_table_in_place():
    slots, vocabulary = 4000, 64  # the table then dwarfs a batch's arrays

    def loop(counts, rows, logits, batch):
        def step(carry):
            index, counts, chosen, total = carry
            following = logits + index.astype(jnp.float32)
            chosen = sample(following, rows, chosen + index, lambda: counts.take(batch))
            total += log_probabilities(following, chosen, rows.logprobs).chosen
            generated = counts.generated.at[batch, chosen].add(1, mode="drop")
            return index + 1, TokenCounts(counts.prompt, generated), chosen, total

        start = (jnp.int32(0), counts, jnp.zeros(ROWS, jnp.int32), jnp.zeros(ROWS))
        return lax.while_loop(lambda carry: carry[0] < 8, step, start)

    counts = TokenCounts(
        jnp.zeros((slots, vocabulary), bool), jnp.zeros((slots, vocabulary), jnp.int32)
    )
    arguments = (counts, RowSampling.stack([], ROWS), jnp.zeros((ROWS, vocabulary)))
    compiled = (
        jax.jit(loop, donate_argnums=0)
        .lower(*arguments, jnp.arange(ROWS, dtype=jnp.int32))
        .compile()
    )
    assert pool_sized_operations(compiled.as_text() or "", slots * vocabulary) == []
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < slots * vocabulary
