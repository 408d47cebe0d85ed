"""Our decoder and tokenizer against transformers on the same GGUF file (see make_golden.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.dense_attention import empty_pool, run_dense
from models.gguf_file import read_gguf
from models.gguf_tokenizer import read_gguf_tokenizer
from models.tokenizer import ChatTokenizer

pytestmark = pytest.mark.optimised

HERE = Path(__file__).parent
CAPACITY = 256
LOGIT_TOLERANCE = 1e-3
with np.load(HERE / "golden_smollm2.npz") as archive:
    GOLDEN = dict(archive)
TOKENIZER_GOLDEN = json.loads((HERE / "golden_tokenizer.json").read_text())
PROMPTS = sorted(int(name.removeprefix("prompt_")) for name in GOLDEN if name.startswith("prompt_"))


@pytest.fixture(scope="module")
def split_model(smollm2):
    return nnx.split(smollm2.model)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path) -> ChatTokenizer:
    return read_gguf_tokenizer(read_gguf(smollm2_path))


def prefill(smollm2, split_model, prompt):
    """Logits of every position, the prompt padded so that one compilation serves all prompts."""
    padded = np.zeros(CAPACITY, np.int32)
    padded[: len(prompt)] = prompt
    positions = jnp.arange(CAPACITY, dtype=jnp.int32)
    pool = empty_pool(smollm2.config.cache_spec, CAPACITY)
    logits, pool = run_dense(*split_model, jnp.asarray(padded), positions, pool)
    return np.asarray(logits)[: len(prompt)], pool


@pytest.mark.slow
@pytest.mark.parametrize("index", PROMPTS)
def test_prompt_logits_equal_transformers(smollm2, split_model, index):
    logits, _ = prefill(smollm2, split_model, GOLDEN[f"prompt_{index}"])
    last = logits[-1, GOLDEN["logit_ids"]]
    assert np.abs(last - GOLDEN[f"last_logits_{index}"]).max() < LOGIT_TOLERANCE
    assert np.abs(logits.max(-1) - GOLDEN[f"max_logit_{index}"]).max() < LOGIT_TOLERANCE
    np.testing.assert_array_equal(logits.argmax(-1), GOLDEN[f"argmax_{index}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "index",
    [pytest.param(index, marks=[pytest.mark.thorough] if index > 1 else []) for index in PROMPTS],
)
def test_greedy_tokens_equal_transformers(smollm2, split_model, index):
    prompt, expected = GOLDEN[f"prompt_{index}"], GOLDEN[f"greedy_{index}"]
    logits, pool = prefill(smollm2, split_model, prompt)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < len(expected):
        position = jnp.asarray([len(prompt) + len(tokens) - 1], jnp.int32)
        logits, pool = run_dense(*split_model, jnp.asarray(tokens[-1:], jnp.int32), position, pool)
        tokens.append(int(logits[0].argmax()))
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_config_read_from_file_is_the_preset(smollm2):
    import models

    preset = models.preset("smollm2-135m")
    assert smollm2.config.norm_epsilon == pytest.approx(1e-5)
    assert replace(smollm2.config, norm_epsilon=preset.norm_epsilon) == preset


@pytest.mark.parametrize("case", TOKENIZER_GOLDEN["strings"], ids=lambda case: repr(case["text"]))
def test_tokenizer_equals_transformers(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]
    assert tokenizer.decode(case["ids"]) == case["decoded_without_special"]


@pytest.mark.parametrize("case", TOKENIZER_GOLDEN["chats"], ids=lambda case: str(len(case["ids"])))
def test_chat_template_equals_transformers(tokenizer, case):
    prompt = case["add_generation_prompt"]
    rendered = tokenizer.render_chat(case["messages"], add_generation_prompt=prompt)
    assert rendered == case["rendered"]
    ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=prompt)
    assert ids == case["ids"]


def test_special_tokens_can_be_read_as_plain_text(tokenizer):
    text = "<|im_start|>system"
    plain = tokenizer.encode(text, parse_special=False)
    assert not set(plain) & tokenizer.special_ids
    assert tokenizer.encode(text)[0] in tokenizer.special_ids
    assert tokenizer.decode(plain) == text


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    assert tokenizer.encode("<|im_end|>")[0] in tokenizer.stop_ids
    assert tokenizer.encode("<|endoftext|>")[0] in tokenizer.stop_ids
