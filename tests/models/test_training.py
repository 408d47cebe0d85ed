"""Training from scratch, and the checkpoint that it is written into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.architectures.opt import OPT
from models.config import DecoderConfig
from models.decoder import Decoder
from models.dense_attention import empty_pool, run_dense
from models.gpt2_checkpoint import byte_gpt2, stored_tensors, write_byte_gpt2
from models.safetensors_file import read_tensors
from models.training import Rates, Training, _decaying, position_waves

CONFIG = byte_gpt2(layers=2, heads=4, hidden=32, positions=24)
TEXT = "Naïve cafés ☃,\n\n  and more<|endoftext|>: "


def sequences(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (2, 17)).astype(np.int32)


def trained(steps: int) -> Training:
    training = Training(CONFIG, steps=4, warmup=1, rate=1e-2)
    for step in range(steps):
        training.step(sequences(step))
    return training


def logits_of(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    pool = empty_pool(model.cache_spec, len(tokens))
    return np.asarray(run_dense(*nnx.split(model), jnp.asarray(tokens), positions, pool)[0])


@pytest.fixture(scope="module")
def training() -> Training:
    """After three steps."""
    return trained(3)


@pytest.fixture(scope="module")
def written(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    write_byte_gpt2(folder, training.model)
    return folder


def test_a_checkpoint_is_the_model_that_was_trained(training: Training, written: Path):
    loaded = models.load(written)
    assert (loaded.config, loaded.name) == (CONFIG, "tiny")
    assert loaded.config.num_kv_heads == loaded.config.num_heads == 4
    tokens = sequences(5)[0]
    expected = logits_of(training.model, tokens)
    np.testing.assert_allclose(logits_of(loaded.model, tokens), expected, atol=1e-5, rtol=0)
    weights, again = (nnx.to_flat_state(nnx.state(one)) for one in (training.model, loaded.model))
    for (path, one), (_, other) in zip(weights, again, strict=True):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


def test_a_token_is_a_byte_and_one_more_ends_a_text(written: Path):
    tokenizer = models.load(written).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode(TEXT, parse_special=False) == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert tokenizer.encode("a<|endoftext|>") == [97, 256]
    assert tokenizer.stop_ids == (256,)
    assert tokenizer.vocab_size == CONFIG.vocab_size == 257
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}])
    assert chat == list(b"Why?\n\n")


@pytest.mark.slow
def test_transformers_makes_the_same_of_it(training: Training, written: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(written).eval()
    tokens = sequences(5)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None], dtype=torch.int64)).logits[0].numpy()
    np.testing.assert_allclose(logits_of(training.model, tokens), expected, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    assert tokenizer("café")["input_ids"] == list("café".encode())


def test_losses_are_of_the_logits(training: Training):
    some = sequences(6)
    found = training.losses(some)
    logits = logits_of(training.model, some[1, :-1]).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(16), some[1, 1:]]
    np.testing.assert_allclose(found[1], expected, atol=1e-5, rtol=0)


def test_the_loss_falls_and_is_that_before_the_step(training: Training):
    again = trained(0)
    before = float(again.losses(sequences(0)).mean())
    assert again.step(sequences(0)) == pytest.approx(before, abs=1e-5)
    assert float(training.losses(sequences(0)).mean()) < before


def test_a_training_that_was_saved_goes_on_the_same(tmp_path: Path):
    whole, broken = trained(2), trained(2)
    broken.save(tmp_path / "state.npz")
    other = trained(1)
    other.restore(tmp_path / "state.npz")
    for step in (2, 3):
        assert whole.step(sequences(step)) == other.step(sequences(step))
    a, b = (nnx.to_flat_state(nnx.state(one.model)) for one in (whole, other))
    for (path, one), (_, same) in zip(a, b, strict=True):
        np.testing.assert_array_equal(one[...], same[...], err_msg=str(path))


def test_what_is_no_state_of_it_is_refused(tmp_path: Path):
    (tmp_path / "cut.npz").write_bytes(b"PK")
    training = trained(0)
    for name in ("none.npz", "cut.npz"):
        with pytest.raises(models.CheckpointError, match=rf"{name} cannot be read"):
            training.restore(tmp_path / name)
    np.savez(tmp_path / "other.npz", np.zeros(3))
    with pytest.raises(models.CheckpointError, match="is not of a training of these sizes"):
        training.restore(tmp_path / "other.npz")


def test_norms_and_biases_do_not_decay():
    """With a gradient of nothing, a step is decay alone."""
    training = Training(CONFIG, steps=1, warmup=0, rate=0.5)
    model = training.model
    training.step(np.zeros((1, 2), np.int32))
    after = training.model
    assert model.position_embedding is not None
    assert after.position_embedding is not None
    unseen = model.position_embedding[...][5:]  # no sequence has so many tokens
    np.testing.assert_allclose(after.position_embedding[...][5:], 0.95 * unseen, rtol=1e-6)
    decaying = _decaying(nnx.state(model))
    kept = {str(path[-1]) for path, one in nnx.to_flat_state(decaying) if not one.get_value()}
    assert kept == {
        *(f"{norm}_norm{bias}" for norm in ("attention", "mlp") for bias in ("", "_bias")),
        *("final_norm", "final_norm_bias"),
        *("qkv_bias", "attention_out_bias", "up_bias", "down_bias"),
    }


def test_positions_begin_as_waves():
    waves = position_waves(9, 7)
    assert waves.shape == (9, 7)
    np.testing.assert_allclose(waves[:, 0], np.sin(np.arange(9)), atol=1e-6)
    np.testing.assert_allclose(waves[:, 4], np.cos(np.arange(9)), atol=1e-6)
    products = waves[:, [0, 1, 2, 4, 5, 6]] @ waves[:, [0, 1, 2, 4, 5, 6]].T
    np.testing.assert_allclose(np.diag(products, 2), products[0, 2], rtol=1e-5)
    model = trained(0).model
    assert model.position_embedding is not None
    expected = position_waves(24, 32) * np.float32(32**-0.5)
    np.testing.assert_array_equal(model.position_embedding[...], expected)


def test_the_rate_rises_and_falls_to_a_tenth():
    rate = Rates(100, 10, 2.0)
    found = [float(rate(step)) for step in (0, 9, 10, 55, 100, 200)]
    np.testing.assert_allclose(found, [0.2, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"layers": 0}, {"hidden": 0}])
def test_sizes_that_no_model_has_are_refused(sizes: dict[str, int]):
    with pytest.raises(ValueError, match="must be"):
        byte_gpt2(**{"layers": 2, "heads": 4, "hidden": 32, "positions": 24, **sizes})


@pytest.mark.parametrize("config", [replace(CONFIG, vocab_size=300), models.preset("tiny")])
def test_another_model_is_not_written(config: DecoderConfig, tmp_path: Path):
    with pytest.raises(ValueError, match="not a GPT-2 over bytes"):
        write_byte_gpt2(tmp_path / "out", Decoder(config, rngs=nnx.Rngs(0)))
    assert not (tmp_path / "out").exists()


def test_a_layout_that_does_more_than_order_is_not_written():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="only layouts that order and transpose"):
        stored_tensors(model, OPT.layout)


def test_tensors_have_the_names_and_shapes_of_transformers(written: Path):
    shapes = {name: one.shape for name, one in read_tensors(written / "model.safetensors").items()}
    assert shapes["transformer.wte.weight"] == (257, 32)
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (32, 96)
    assert shapes["transformer.h.1.mlp.c_proj.weight"] == (128, 32)
    assert len(shapes) == 2 + 2 * 12 + 2
