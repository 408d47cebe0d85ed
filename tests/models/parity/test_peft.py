"""Learned prefixes against peft, on tiny checkpoints that transformers and peft write.

Needs the extra `parity`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import models
from jax_chunkattn import CacheConfig, Engine, SamplingParams
from models.prefixes import load_prefix, save_prefix
from tests.models.parity.cases import CASES, CHUNK_SIZE, GREEDY_TOKENS, PROMPTS

for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package, reason="needs torch, transformers and peft: the extra `parity`")

import peft  # noqa: E402
import torch  # noqa: E402

from tests.models.parity import theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

VIRTUAL = 2 * CHUNK_SIZE
NAMES = [
    "llama",
    "gpt2",
    "gemma2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "opt")),
]


def train(model: Any, **options: Any) -> Any:
    """A prefix with numbers that count, as if it had been trained."""
    torch.manual_seed(3)
    config = options.pop("config", peft.PrefixTuningConfig)(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options
    )
    return peft.get_peft_model(model, config).eval()


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=True).logits[0].numpy()


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """The tokens, each by a pass over the whole sequence, and the smallest gap to the next best."""
    tokens, gap = list(prompt), float("inf")
    for _ in range(GREEDY_TOKENS):
        second, best = np.sort(logits_of(model, tokens)[-1])[-2:]
        gap = min(gap, float(best - second))
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :], gap


def decode(loaded: models.LoadedModel, folder: Any) -> list[list[int]]:
    """By an engine, all prompts in one batch."""
    arrays = load_prefix(folder, loaded.model.cache_spec)
    cache = CacheConfig(64, CHUNK_SIZE)
    with Engine(loaded.model, cache, max_running=4) as engine:
        engine.add_prefix("learned", arrays.keys, arrays.values)
        outputs = engine.generate(PROMPTS, SamplingParams(GREEDY_TOKENS), prefix="learned")
        return [list(output.samples[0].tokens) for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_behind_a_prefix_are_those_of_transformers_with_peft(name, tmp_path):
    case = CASES[name]
    model = theirs.make_model(case)
    theirs.write_checkpoint(case, model, tmp_path / "model")
    without = logits_of(model, PROMPTS[0])
    tuned = train(model)
    tuned.save_pretrained(tmp_path / "prefix")
    assert np.abs(logits_of(tuned, PROMPTS[0])[-1] - without[-1]).max() > 0.05, "it does nothing"
    expected, gaps = zip(*(greedy(tuned, prompt) for prompt in PROMPTS), strict=True)
    assert min(gaps) > 1e-4, "a tie: the case proves nothing"
    loaded = models.load(tmp_path / "model", max_positions=case.max_positions)
    assert decode(loaded, tmp_path / "prefix") == list(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_projection": True, "encoder_hidden_size": 32},
        {"config": getattr(peft, "CartridgeConfig", None), "num_frozen_tokens": 2},
    ],
    ids=["projection", "cartridge"],
)
def test_what_an_mlp_made_and_cartridges_are_read_too(options, tmp_path):
    if options.get("config", peft) is None:
        pytest.skip("this peft has no cartridges")
    case = CASES["llama"]
    model = theirs.make_model(case)
    theirs.write_checkpoint(case, model, tmp_path / "model")
    tuned = train(model, **options)
    tuned.save_pretrained(tmp_path / "prefix")
    loaded = models.load(tmp_path / "model")
    assert decode(loaded, tmp_path / "prefix") == [greedy(tuned, prompt)[0] for prompt in PROMPTS]


def test_peft_reads_what_is_written_here(tmp_path):
    case = CASES["llama"]
    model = theirs.make_model(case)
    theirs.write_checkpoint(case, model, tmp_path / "model")
    tuned = train(model)
    tuned.save_pretrained(tmp_path / "prefix")
    expected = logits_of(tuned, PROMPTS[0])
    spec = models.load(tmp_path / "model").model.cache_spec
    save_prefix(tmp_path / "ours", load_prefix(tmp_path / "prefix", spec))
    again = peft.PeftModel.from_pretrained(theirs.make_model(case), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(again, PROMPTS[0]), expected, rtol=0, atol=1e-6)
