"""Attention within a packed tree, and its gradients, against sums over pairs in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import TokenTree
from pallas_kernels.tree_attention import (
    IMPLEMENTATIONS,
    HeadWindows,
    TreePlan,
    tree_attention,
)
from tests.variants import VariantsTestCase, every_way

KV_HEADS, DIM = 2, 16
RANDOM = np.random.default_rng(0)
SEQUENCES = [
    [0] * 70,
    [0] * 40 + [1] * 90,  # ends in another tile than its branch begins in
    [0] * 40 + [1] * 20 + [2] * 3,
    [3] * 5,  # another root
    [0] * 40 + [1] * 20 + [2] * 3,  # the same again
]
TREE = TokenTree.of(SEQUENCES)
TOKENS = len(TREE.tokens)
WINDOWS = HeadWindows(np.array([30, 1], np.int32), np.array([0, 3], np.int32))


def operands(group, dtype="float32"):
    shapes = [(TOKENS, KV_HEADS * group, DIM), *[(TOKENS, KV_HEADS, DIM)] * 2]
    shapes.append(shapes[0])
    return [jnp.asarray(RANDOM.standard_normal(shape), dtype) for shape in shapes]


def paths():
    """For each packed token, those above it and itself, from the sequences alone."""
    found, packed = {}, {}
    for sequence in sorted(SEQUENCES):
        for end in range(1, len(sequence) + 1):
            packed.setdefault(tuple(sequence[:end]), len(packed))
            prefixes = [tuple(sequence[:length]) for length in range(1, end + 1)]
            found[packed[tuple(sequence[:end])]] = [packed[prefix] for prefix in prefixes]
    return found


def exact(q, keys, values, of_output, *, softcap=None, windows=None):
    """Output and gradients in float64, a query at a time: `[T, Hq, D]`, and of q, keys, values."""
    q, keys, values, of_output = (np.asarray(x, np.float64) for x in (q, keys, values, of_output))
    output, of_q, of_k, of_v = (np.zeros(x.shape) for x in (q, q, keys, values))
    group, scale = q.shape[1] // keys.shape[1], DIM**-0.5
    for query, path in paths().items():
        for head in range(q.shape[1]):
            kv = head // group
            places, seen = np.arange(len(path)), np.array(path)
            if windows is not None:
                visible = (places < windows.sinks[kv]) | (
                    places > len(path) - 1 - windows.sizes[kv]
                )
                seen = seen[visible]
            raw = keys[seen, kv] @ q[query, head] * scale
            scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            output[query, head] = weights @ values[seen, kv]
            of_v[seen, kv] += np.outer(weights, of_output[query, head])
            of_weights = values[seen, kv] @ of_output[query, head]
            of_scores = weights * (of_weights - weights @ of_weights)
            if softcap is not None:
                of_scores = of_scores / np.cosh(raw / softcap) ** 2
            of_q[query, head] += of_scores @ keys[seen, kv] * scale
            of_k[seen, kv] += np.outer(of_scores, q[query, head]) * scale
    return output, of_q, of_k, of_v


@functools.partial(jax.jit, static_argnames=("softcap", "implementation"))
def computed(q, keys, values, of_output, windows=None, **how):
    attend = functools.partial(tree_attention, plan=TREE.plan, windows=windows, **how)
    output, backward = jax.vjp(attend, q, keys, values)
    return output, *backward(of_output)


def errors(found, truth):
    return [
        np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
        for one, other in zip(found, truth, strict=True)
    ]


CASES = {
    "one query head each": (1, {}),
    "grouped": (3, {}),
    "capped": (2, {"softcap": 0.8}),
    "windows": (2, {"windows": WINDOWS}),
}
FAST = {"grouped", "windows"}


@pytest.mark.optimised
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_plain_attention(case):
    group, options = CASES[case]
    given = operands(group)
    truth = exact(*given, **options)
    windows = options.pop("windows", None)
    plain = errors(computed(*given, windows, implementation="reference", **options), truth)
    tiled = errors(computed(*given, windows, implementation="xla", **options), truth)
    assert max(plain) < 1e-6
    for one, other in zip(tiled, plain, strict=True):
        assert one <= 2 * other


@pytest.mark.optimised
def test_half_precision_errs_at_most_twice_as_much_as_plain_attention():
    given = operands(2, "bfloat16")
    truth = exact(*given)
    plain = errors(computed(*given, implementation="reference"), truth)
    tiled = errors(computed(*given, implementation="xla"), truth)
    assert 1e-4 < max(plain) < 1e-2
    for one, other in zip(tiled, plain, strict=True):
        assert one <= 2 * other


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_gets_zeros_and_has_no_gradient(implementation):
    given = operands(2)
    output, of_q, of_keys, of_values = computed(*given, implementation=implementation)
    padding = np.arange(TOKENS) >= TREE.num_tokens
    assert 0 < padding.sum()
    for array in (output, of_q, of_keys, of_values):
        assert not np.any(np.asarray(array)[padding])
    for array in (output, of_values):
        assert np.all(np.any(np.asarray(array)[~padding], axis=(1, 2)))


def test_a_sequence_gets_the_same_whatever_else_is_in_the_tree():
    """A token in another branch changes no bit, as it is in the place of another token."""
    q, keys, values, of_output = operands(1)
    others = np.ones(TOKENS, bool)
    others[[place for place, path in paths().items() if len(path) <= 70 and path[-1] < 70]] = False
    noise = jnp.where(jnp.asarray(others)[:, None, None], 1e3, 0).astype(jnp.float32)
    before = computed(q, keys, values, of_output, implementation="xla")[0]
    after = computed(q, keys + noise, values - noise, of_output, implementation="xla")[0]
    np.testing.assert_array_equal(before[:70], after[:70])
    assert np.any(np.asarray(before[70:]) != after[70:])


def test_pairs_of_tiles_are_those_with_a_token_that_sees_another():
    plan = TREE.plan
    seen = np.zeros((TOKENS, TOKENS), bool)
    for query, path in paths().items():
        seen[query, path] = True
    np.testing.assert_array_equal(plan.sees(0, 0, TOKENS), seen)
    number = TOKENS // plan.tile
    tiles = np.any(seen.reshape(number, plan.tile, number, plan.tile), axis=(1, 3))
    for tile in range(number):
        listed = plan.key_tiles[plan.pair_begin[tile] : plan.pair_begin[tile + 1]]
        assert listed.tolist() == np.nonzero(tiles[tile])[0].tolist()
        below = np.nonzero(tiles[:, tile])[0].tolist()
        assert list(range(tile, plan.last_query_tile[tile] + 1)) == below
    assert not tiles.all()


class CalledInEveryWay(VariantsTestCase):
    @every_way
    def test_arguments_of_host_and_device(self):
        q, keys, values, _ = (np.asarray(x) for x in operands(2))
        attend = self.variant(functools.partial(tree_attention, softcap=2.0))
        truth = exact(q, keys, values, q, softcap=2.0)[0]
        np.testing.assert_allclose(attend(q, keys, values, TREE.plan), truth, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "unknown implementation 'fast'; known: reference, xla"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"q": np.zeros((TOKENS, 3, DIM), np.float32)}, "3"),
        (
            dict.fromkeys(("q", "keys", "values"), np.zeros((64, 2, DIM), np.float32)),
            f"there are 64 queries, 64 keys and 64 values, and the plan is of {TOKENS} tokens",
        ),
    ],
)
def test_wrong_operands_are_refused(change, message):
    q, keys, values, _ = operands(1)
    given = {"q": q, "keys": keys, "values": values, "plan": TREE.plan} | change
    with pytest.raises(ValueError, match=message):
        tree_attention(**given)


def test_wrong_plans_are_refused():
    ends = np.arange(1, 33, dtype=np.int32)
    with pytest.raises(ValueError, match="32 tokens are no multiple of a tile of 24"):
        TreePlan.of(ends, ends, tile=24)
