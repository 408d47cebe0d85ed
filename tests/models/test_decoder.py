"""The decoder against a plain NumPy one in float64, and the properties the engine relies on."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.config import DecoderConfig
from models.decoder import Block, Decoder
from models.dense_attention import dense_attend, empty_pool, run_dense
from models.presets import PRESETS, preset
from models.rope import Rope
from models.weights import num_parameters
from tests.models.weights import decoder_of, random_weights

GROUPED = DecoderConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(300.0),
    norm_epsilon=1e-3,
    max_positions=64,
)
CONFIGS = {
    "grouped": GROUPED,
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True),
    "multi_head": dataclasses.replace(GROUPED, num_kv_heads=6),
    "multi_query": dataclasses.replace(GROUPED, num_kv_heads=1, num_layers=1),
}
TOKENS = np.array([3, 41, 7, 7, 0, 49, 12, 30, 7], np.int32)


def make_weights(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Random weights whose norms are not all one."""
    weights = random_weights(config, 5)
    random = np.random.default_rng(6)
    for name, weight in weights.items():
        if name.endswith("norm"):
            weights[name] = random.uniform(0.5, 1.5, weight.shape).astype(weight.dtype)
    return weights


def numpy_logits(config: DecoderConfig, weights: dict[str, np.ndarray], tokens: np.ndarray):
    """Logits `[T, V]` in float64, one head and one layer at a time, rotating complex numbers."""
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    assert isinstance(config.rope, Rope)
    frequencies = config.rope.theta ** (-2.0 * np.arange(dim // 2) / dim)
    turn = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotated(x):
        turned = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    x = weights["embedding"][tokens]
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(config.num_layers):
        block = {n.removeprefix("blocks/"): w[layer] for n, w in weights.items() if "blocks/" in n}
        h = norm(x, block["attention_norm"])
        heads = []
        for index in range(config.num_heads):
            heads_of_group = h @ block["qkv"][:, index // group].swapaxes(0, 1)  # [G + 2, T, D]
            q, k = rotated(heads_of_group[index % group]), rotated(heads_of_group[-2])
            v = heads_of_group[-1]
            scores = np.exp(q @ k.T / np.sqrt(dim) + future)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        x = x + np.einsum("htd,hde->te", np.stack(heads), block["attention_out"])
        gate, up = norm(x, block["mlp_norm"]) @ block["gate_up"].swapaxes(0, 1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["down"]
    unembedding = weights["embedding"].T if config.tie_embeddings else weights["unembedding"]
    return norm(x, weights["final_norm"]) @ unembedding


def decoder_logits(model: Decoder, tokens: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """Logits `[T, V]`, the tokens fed in pieces that end at `cuts`."""
    pool = empty_pool(model.cache_spec, model.max_positions, model.embedding[...].dtype)
    positions = np.arange(len(tokens), dtype=np.int32)
    pieces = []
    for piece in np.split(positions, cuts):
        logits, pool = run_dense(*nnx.split(model), tokens[piece], piece, pool)
        pieces.append(np.asarray(logits))
    return np.concatenate(pieces)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_a_plain_numpy_decoder(name):
    config = CONFIGS[name]
    weights = make_weights(config)
    actual = decoder_logits(decoder_of(config, weights), TOKENS)
    chex.assert_type(actual, np.float32)
    expected = numpy_logits(config, weights, TOKENS)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=2e-5)


def test_feeding_tokens_in_pieces_changes_nothing():
    model = decoder_of(GROUPED, make_weights(GROUPED))
    whole = decoder_logits(model, TOKENS)
    in_pieces = decoder_logits(model, TOKENS, (4, 8))
    chex.assert_trees_all_close(in_pieces, whole, rtol=0, atol=1e-5)


def test_bfloat16_keeps_weights_and_activations_narrow_and_logits_wide():
    weights = make_weights(GROUPED)
    model = decoder_of(GROUPED, weights, "bfloat16")

    def attend(pool, layer, q, k, v):
        chex.assert_type([q, k, v], jnp.bfloat16)
        return dense_attend(jnp.asarray(positions), model.cache_spec)(pool, layer, q, k, v)

    positions = np.arange(len(TOKENS), dtype=np.int32)
    pool = empty_pool(model.cache_spec, model.max_positions, "bfloat16")
    hidden, _ = model(jnp.asarray(TOKENS), jnp.asarray(positions), pool, attend)
    logits = model.logits(hidden)
    chex.assert_type([hidden, logits], [jnp.bfloat16, jnp.float32])
    exact = numpy_logits(GROUPED, weights, TOKENS)
    assert np.abs(np.asarray(logits) - exact).max() < 0.05 * np.abs(exact).max()


def test_attend_sees_each_layer_once_and_the_pool_comes_back():
    """The engine's pool may be any pytree; here it counts."""
    model = decoder_of(GROUPED, make_weights(GROUPED))

    def attend(pool, layer, q, k, v):
        chex.assert_shape([q, k, v], [(2, 6, 8), (2, 2, 8), (2, 2, 8)])
        visits = pool["visits"].at[layer].add(1)
        return q, {"visits": visits, "order": pool["order"] * 10 + layer}

    pool = {"visits": jnp.zeros(3, jnp.int32), "order": jnp.int32(0)}
    tokens = jnp.array([1, 2], jnp.int32)
    _, pool = jax.jit(lambda: model(tokens, tokens, pool, attend))()
    assert pool["visits"].tolist() == [1, 1, 1]
    assert int(pool["order"]) == 12


def test_layers_are_traced_once_however_many_there_are():
    traces = []

    def attend(pool, layer, q, k, v):
        traces.append(layer)
        return q, pool

    model = decoder_of(GROUPED, make_weights(GROUPED))
    tokens = jnp.array([1, 2], jnp.int32)
    jax.jit(lambda: model(tokens, tokens, None, attend)[0])()
    assert len(traces) == 1


def test_float32_products_ask_for_full_precision():
    """Otherwise a GPU rounds the operands to TF32."""
    model = decoder_of(GROUPED, make_weights(GROUPED))
    tokens = jnp.array([1, 2], jnp.int32)

    def run(tokens):
        return model.logits(model(tokens, tokens, None, lambda p, i, q, k, v: (q, p))[0])

    text = str(jax.make_jaxpr(run)(tokens))
    products = text.count("dot_general[")
    assert products == 5
    assert text.count("precision=(Precision.HIGHEST") + text.count("precision=HIGHEST") == products


def test_nnx_initialises_a_decoder_of_unit_scale():
    model = Decoder(GROUPED, rngs=nnx.Rngs(0))
    assert isinstance(model.blocks, Block)
    chex.assert_shape(model.blocks.qkv[...], (3, 24, 2, 3 + 2, 8))
    first, second = model.blocks.qkv[...][:2]
    assert not np.array_equal(first, second)
    assert 0.3 < decoder_logits(model, TOKENS).std() < 3


def test_layers_compute_the_same_unrolled():
    scanned, unrolled = (models.load("random:tiny", unroll=u).model for u in (False, True))
    assert isinstance(unrolled.blocks, nnx.List)
    assert len(unrolled.blocks) == unrolled.config.num_layers
    together, apart = (decoder_logits(model, TOKENS) for model in (scanned, unrolled))
    chex.assert_trees_all_close(apart, together, rtol=0, atol=1e-5)
    drawn = Decoder(GROUPED, rngs=nnx.Rngs(0), unroll=True)
    assert isinstance(drawn.blocks, nnx.List)
    first, second = (block.qkv[...] for block in drawn.blocks[:2])
    assert not np.array_equal(first, second)
    assert 0.3 < decoder_logits(drawn, TOKENS).std() < 3


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_that_of_the_weights(name):
    config = PRESETS[name]
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == num_parameters(config)


def test_smollm2_preset_has_its_published_size():
    assert num_parameters(preset("smollm2-135m")) == 134_515_008


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "cannot rotate"),
        ({"rope": Rope(dims=16)}, "of a head_dim of 8, 16 cannot rotate"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false, got 1"),
        ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ({"rope": (Rope(), None)}, "2 ropes for 3 layers"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"norm_epsilon": -1.0}, "norm_epsilon must be a positive number, got -1.0"),
        ({"attention_softcap": float("nan")}, "attention_softcap must be a positive number"),
    ],
)
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(GROUPED, **change)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"did you mean 'smollm2-135m'.*smollm2-135m, .*tiny"):
        preset("smolm2-135m")
