"""An engine on the Mosaic GPU kernels, in their interpreter: small, for it takes seconds a call."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import pytest

from jax_chunkattn import CacheConfig, Engine, PlannerOptions, SamplingParams
from models import preset
from models.building import build
from models.random_weights import random_fill
from pallas_kernels.targets import H200, use_target
from tests.jax_chunkattn.toy import token_tree

SIZES: dict[str, Any] = {"head_dim": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic's interpreter does not run here before jax 0.11"
)
def test_decoding_on_hopper_chooses_the_tokens_of_plain_jax():
    config = dataclasses.replace(preset("tiny"), num_layers=2, **SIZES)
    model = build(config, "bfloat16", random_fill(config, 0))
    share = PlannerOptions.for_gpu(
        worth_sharing=lambda rows, chunks: rows > 1, chunk_size=16, **SIZES
    )
    hopper = use_target(dataclasses.replace(H200, interpret=True))
    tokens = []
    for context, implementation in (
        (hopper, "pallas_mosaic_gpu"),
        (contextlib.nullcontext(), "xla"),
    ):
        with context:
            engine = Engine(model, CacheConfig(20, 16, "bfloat16"), planner=share, steps_per_call=2)
            prompts = token_tree((1, 70), (3, 5))
            outputs = list(engine.generate(prompts, SamplingParams(max_tokens=3)))
        assert engine.backend.decode == implementation
        assert engine.stats.plan is not None
        assert engine.stats.plan.shared
        tokens.append([output.samples[0].tokens for output in outputs])
    assert tokens[0] == tokens[1]
