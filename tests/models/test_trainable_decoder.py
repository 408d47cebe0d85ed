"""Padded batches through `TrainableDecoder` are sequences by themselves, at once and in steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.adapters.tunix import TrainableDecoder, TunixTokenizer
from tests.jax_chunkattn.toy import logits_without_cache, toy_model, windowed_model
from tests.models.tokenizer_styles import read_golden

LENGTHS = 40, 7, 33
WIDTH = max(LENGTHS)


def padded_batch() -> tuple[list[list[int]], jax.Array, jax.Array, jax.Array]:
    """Sequences; padded on the left, tokens and positions `[B, T]`; who sees whom `[B, T, T]`."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 256, length).tolist() for length in LENGTHS]
    real = np.arange(WIDTH) >= WIDTH - np.array(LENGTHS)[:, None]
    tokens = np.zeros((len(rows), WIDTH), np.int32)
    tokens[real] = np.concatenate(rows)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    mask = real[:, None] & np.tri(WIDTH, dtype=bool)
    return rows, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask)


@pytest.mark.parametrize("decoder", [toy_model, windowed_model])
def test_padding_changes_no_number(decoder):
    rows, tokens, positions, mask = padded_batch()
    logits, cache = TrainableDecoder(decoder())(tokens, positions, None, mask)
    assert cache is None
    assert np.isfinite(logits).all()
    for row, found in zip(rows, logits, strict=True):
        expected = logits_without_cache(tuple(row), decoder())
        np.testing.assert_allclose(found[-len(row) :], expected, atol=2e-4)


@pytest.mark.parametrize("decoder", [toy_model, windowed_model])
def test_a_cache_gives_what_all_at_once_gives(decoder):
    _, tokens, positions, mask = padded_batch()
    model = TrainableDecoder(decoder())
    whole, _ = model(tokens, positions, None, mask)
    cache = model.init_cache(len(tokens), WIDTH + 5, "float32")
    room = jnp.zeros((*mask.shape[:2], 5), bool)
    parts = []
    for part in (slice(0, 36), slice(36, 37), slice(37, WIDTH)):
        seen = jnp.concatenate([mask, room], axis=2)[:, part]
        logits, cache = model(tokens[:, part], positions[:, part], cache, seen)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-4)
    assert cache is not None
    assert cache["end_index"].tolist() == [WIDTH] * len(LENGTHS)


def test_gradients_reach_every_weight_through_padding():
    _, tokens, positions, mask = padded_batch()
    model = TrainableDecoder(toy_model())

    def loss(model):
        return jnp.square(model(tokens[1:2], positions[1:2], None, mask[1:2])[0][:, -1]).mean()

    gradients = nnx.state(nnx.grad(loss)(model))
    for leaf in nnx.to_pure_dict(gradients)["decoder"]["blocks"].values():
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_packed_sequences_are_refused():
    _, tokens, positions, _ = padded_batch()
    with pytest.raises(ValueError, match="attention_mask"):
        TrainableDecoder(toy_model())(tokens, positions, None, None)


def test_a_checkpoints_tokenizer_has_the_ids_that_tunix_asks_for(tmp_path):
    tokenizer = read_golden(tmp_path, "llama3")
    ids = TunixTokenizer(tokenizer, pad_id=3)
    assert ids.bos_id() is None
    assert ids.eos_id() == tokenizer.eos_id
    assert ids.eos_id() in tokenizer.stop_ids
    assert ids.pad_id() == 3
    assert ids.encode("he") == tokenizer.encode("he")
    assert ids.decode(ids.encode("he")) == "he"
    chat = [{"role": "user", "content": "he"}]
    if tokenizer.template_names:
        assert ids.apply_chat_template(chat) == tokenizer.render_chat(chat)
        assert ids.apply_chat_template(chat, tokenize=True) == tokenizer.apply_chat_template(chat)
