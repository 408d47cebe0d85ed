"""The presets are the published models."""

from __future__ import annotations

import dataclasses

import pytest

import models
from models.weights import num_parameters

# The weights of each model on the hub. Of OPT's embedding of positions, two rows are never used,
# and are not kept here.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "gpt2": 124_439_808,
    "opt-6.7b": 6_658_473_984 - 2 * 4096,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-8b": 8_190_735_360,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "phi-3-mini-4k": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
}
KV_KIB_PER_TOKEN = {  # in half precision
    "gpt2": 36,
    "llama-2-7b": 512,
    "llama-3.1-8b": 128,
    "llama-3.1-70b": 320,
    "mistral-7b-v0.3": 128,
    "qwen2.5-7b": 56,
    "qwen3-8b": 144,
    "gemma-2-2b": 104,
}


def test_every_preset_of_a_published_model_is_here():
    assert set(PUBLISHED) == set(models.PRESETS) - {"tiny", "small"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    assert num_parameters(models.preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", KV_KIB_PER_TOKEN)
def test_kv_cache_of_a_token(name):
    spec = models.preset(name).cache_spec
    assert 2 * spec.values_per_token == KV_KIB_PER_TOKEN[name] * 1024


def test_only_positions_and_rotation_tell_llama_3_from_3_1():
    old, new = (dataclasses.asdict(models.preset(f"llama-{x}-8b")) for x in ("3", "3.1"))
    assert {key for key in old if old[key] != new[key]} == {"rope", "max_positions"}
