"""The decoder as an engine runs it: products by the compiled kernel."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import Decoder
from models.presets import PRESETS
from pallas_kernels import products
from pallas_kernels.implementations import NATIVE
from pallas_kernels.native import library
from tests.interpreted import skip_unless_there

TINY = PRESETS["tiny"]
CONFIGS = {
    "llama": TINY,
    "untied": replace(TINY, tie_embeddings=not TINY.tie_embeddings),
    "biased layer norms": replace(
        TINY,
        norm="layer",
        gated_mlp=False,
        activation="gelu",
        qkv_bias=True,
        mlp_bias=True,
        attention_out_bias=True,
    ),
    "norms of queries and keys, before and after": replace(
        TINY, query_key_norm="head", norm_after=True
    ),
    "norm of all heads together": replace(TINY, query_key_norm="projection"),
}
FAST = {"llama", "biased layer norms"}
TOKENS = 20


def no_attention(pool, layer, q, k, v):
    """A head gets what its own token has: rows meet nowhere."""
    return q * 0.5 + jnp.repeat(v, q.shape[1] // v.shape[1], axis=1), pool


@pytest.fixture(autouse=True)
def _compiled():
    skip_unless_there(NATIVE)


def logits(model, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        hidden, _ = model(tokens, jnp.arange(len(tokens), dtype=jnp.int32), None, no_attention)
        return model.logits(hidden)

    return np.asarray(run(state))


@pytest.mark.optimised  # jaxlib 0.12 with less effort rounds one row as none else
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CONFIGS],
)
def test_it_computes_the_same_and_each_token_alike_in_any_company(name):
    config = CONFIGS[name]
    model = Decoder(config, rngs=nnx.Rngs(0))
    served = model.for_serving(batch_invariant=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    among_all = logits(served, tokens)
    np.testing.assert_allclose(among_all, logits(model, tokens), rtol=0, atol=2e-5)
    for count in (1, 3, 9):
        some = logits(served, tokens[:count])
        np.testing.assert_array_equal(some.view(np.uint32), among_all[:count].view(np.uint32))


def test_layers_with_arrays_of_their_own():
    model = Decoder(TINY, rngs=nnx.Rngs(0), unroll=True)
    tokens = np.arange(TOKENS)
    served = logits(model.for_serving(), tokens)
    np.testing.assert_allclose(served, logits(model, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_few_bits(dtype):
    model = Decoder(TINY, rngs=nnx.Rngs(0), dtype=dtype)
    wide = Decoder(TINY, rngs=nnx.Rngs(0))
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    tokens = np.arange(TOKENS)
    exact = logits(wide, tokens)
    served, in_xla = (
        np.abs(logits(one, tokens) - exact).max() for one in (model.for_serving(), model)
    )
    assert served < 2 * in_xla  # what activations of few bits round


def test_its_arrays_are_those_of_the_model():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    served = model.for_serving()
    for one, other in zip(*map(jax.tree.leaves, map(nnx.state, (model, served))), strict=True):
        assert one is other
    assert not model.arithmetic.in_place


def test_without_a_compiler_xla_multiplies_and_nothing_is_batch_invariant(monkeypatch):
    monkeypatch.setattr(library, "problem", lambda: "there is no compiler")
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    assert not model.for_serving().arithmetic.in_place
    with pytest.raises(ValueError, match="not batch-invariant without the compiled kernel: there"):
        model.for_serving(batch_invariant=True)


def test_only_the_weights_of_products_must_be_such(monkeypatch):
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    counts = nnx.Param(jnp.zeros(3, jnp.int32))
    model.counts = counts  # pyright: ignore[reportAttributeAccessIssue]
    served = model.for_serving(batch_invariant=True)
    assert served.arithmetic.in_place
    monkeypatch.setattr(library, "problem", lambda: "there is no compiler")
    assert not served.for_serving().arithmetic.in_place


def test_weights_on_several_devices_are_xla_s(monkeypatch):
    class Sharding:
        device_set = frozenset(range(2))

    array = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    monkeypatch.setattr(type(array), "sharding", Sharding(), raising=False)
    assert products.problem([array]) == "the weights are on several devices"
