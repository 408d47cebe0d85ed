"""config.json of published checkpoints, in the words they are published in, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from models.errors import CheckpointError
from models.hf_config import find_architecture, read_config
from models.rope import FactorScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling
from models.sizes import MOST_PARAMETERS
from models.weights import num_parameters
from pallas_kernels.windows import Window

WHERE = Path("folder/config.json")
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
QWEN_2_5_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PHI_3_MINI_128K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.5] * 48,
        "short_factor": [1.0 + index / 48 for index in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
MISTRAL_V1: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_V3 = MISTRAL_V1 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
OPT_6_7B: dict[str, Any] = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "do_layer_norm_before": True,
    "ffn_dim": 16384,
    "hidden_size": 4096,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 50272,
    "word_embed_proj_dim": 4096,
}
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def read(config: dict[str, Any], max_positions: int | None = None) -> models.DecoderConfig:
    return read_config(config, find_architecture(config, WHERE), WHERE, max_positions)


@pytest.mark.parametrize(
    ("config", "max_positions", "preset"),
    [
        (LLAMA_3_1_8B, None, "llama-3.1-8b"),
        (LLAMA_2_7B, None, "llama-2-7b"),
        (QWEN_2_5_05B, None, "qwen2.5-0.5b"),
        (GEMMA_2_2B, None, "gemma-2-2b"),
        (SMOLLM3_3B, None, "smollm3-3b"),
        (MISTRAL_V3, None, "mistral-7b-v0.3"),
        (OPT_6_7B, None, "opt-6.7b"),
        (GPT2, None, "gpt2"),
    ],
)
def test_published_configs_are_the_presets(config, max_positions, preset):
    assert read(config, max_positions) == models.preset(preset)


def test_words_of_transformers_5_mean_the_same():
    words = dict(LLAMA_3_1_8B)
    params = words.pop("rope_scaling") | {"rope_theta": words.pop("rope_theta")}
    assert read(words | {"rope_parameters": params}) == read(LLAMA_3_1_8B)
    words = dict(GEMMA_3_1B)
    del words["rope_theta"], words["rope_local_base_freq"], words["sliding_window_pattern"]
    words["layer_types"] = [
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)
    ]
    words["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    assert read(words, 512) == read(GEMMA_3_1B, 512)


def test_gemma_3_turns_local_layers_faster():
    ropes = read(GEMMA_3_1B, 512).layer_ropes
    local, everything = Rope(10_000.0), Rope(1_000_000.0)
    assert ropes == (*((local,) * 5 + (everything,)) * 4, local, local)


def test_scalings_are_read_with_their_parameters():
    def rope(**scaling):
        return read(LLAMA_2_7B | {"rope_scaling": scaling}).rope

    assert rope(type="linear", factor=2.0) == Rope(scaling=LinearScaling(2.0))
    assert rope(type="dynamic", factor=2.0) == Rope()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert rope(**yarn) == Rope(scaling=YarnScaling(4.0, 1024))
    assert rope(**yarn, beta_fast=16, mscale=1.0, mscale_all_dim=0.5) == Rope(
        scaling=YarnScaling(
            4.0, 1024, 16, 1.0, (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1), True
        )
    )
    unsaid = rope(rope_type="yarn", factor=None, original_max_position_embeddings=512)
    assert unsaid == Rope(scaling=YarnScaling(8.0, 512))
    assert read(LLAMA_3_1_8B).rope == Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_longrope_is_for_sequences_of_the_original_context():
    scaling = read(PHI_3_MINI_128K, 4096).layer_ropes[0]
    assert scaling is not None
    assert isinstance(scaling.scaling, FactorScaling)
    assert scaling.scaling.factors == tuple(PHI_3_MINI_128K["rope_scaling"]["short_factor"])
    assert scaling.scaling.attention_factor == pytest.approx(1.190238, abs=1e-6)
    with pytest.raises(CheckpointError, match=r"longrope.*max_positions=4096"):
        read(PHI_3_MINI_128K)


def test_layers_with_windows():
    assert read(MISTRAL_V1).sliding_window == (4096,) * 32
    assert read(MISTRAL_V3).sliding_window is None
    assert read(GEMMA_2_2B).sliding_window == (4096, None) * 13
    assert read(GEMMA_3_1B).sliding_window == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert read(PHI_3_MINI_128K, 4096).sliding_window is None  # longer than any sequence
    assert read(LLAMA_2_7B | {"sliding_window": 100}).sliding_window is None  # it has none
    without = {key: value for key, value in MISTRAL_V1.items() if key != "sliding_window"}
    assert read(without).sliding_window == (4096,) * 32


@pytest.mark.parametrize("positions", [4096, 1000])
def test_a_window_that_holds_every_sequence_is_none(positions):
    assert read(MISTRAL_V1, positions).sliding_window is None
    assert read(GEMMA_2_2B, positions).cache_spec.windows is None


def test_a_window_that_is_not_used_is_no_window():
    assert read(QWEN_2_5_05B | {"sliding_window": 1024}).sliding_window is None
    unused = {"layer_types": ["sliding_attention"] * 24, "sliding_window": 1024}
    assert read(QWEN_2_5_05B | unused).sliding_window is None
    used = QWEN_2_5_05B | {"use_sliding_window": True, "sliding_window": 1024}
    assert read(used).sliding_window == (None,) * 21 + (1024,) * 3
    del used["max_window_layers"]  # 28, more than it has
    assert read(used).sliding_window is None
    smollm = SMOLLM3_3B | {"use_sliding_window": True, "sliding_window": 1024}
    assert read(smollm).sliding_window == (None, None, None, 1024) * 9


def test_layers_of_one_window_are_planned_together():
    windows = read(GEMMA_3_1B).cache_spec.windows
    assert windows is not None
    assert windows.windows == (Window(512), None)
    assert windows.of_heads == (*(((0,),) * 5 + ((1,),)) * 4, (0,), (0,))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"'MixtralForCausalLM' is not.*LlamaForCausal"),
        ({"architectures": "LlamaForCausalLM"}, "'LlamaForCausalLM', expected a list of names"),
        ({"architectures": 5}, "architectures is 5, expected a list of names"),
        ({"model_type": "t5"}, "model_type 't5'"),
        (
            LLAMA_2_7B | {"quantization_config": {"quant_method": "awq"}},
            r"quantised \(awq\), which is not supported",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "'vocab_size' is missing"),
        (LLAMA_2_7B | {"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported"),
        (LLAMA_2_7B | {"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        (LLAMA_2_7B | {"num_hidden_layers": "many"}, "num_hidden_layers is 'many'; expected an"),
        (LLAMA_2_7B | {"num_hidden_layers": 10_001}, "is 10001; expected .* from 1 to 10,000"),
        (LLAMA_2_7B | {"vocab_size": 2**31}, "vocab_size is 2147483648.* to 2,147,483,647"),
        (LLAMA_2_7B | {"hidden_size": 10**400}, r"hidden_size is 10+\.\.\.; expected an integer"),
        (LLAMA_2_7B | {"hidden_size": 2**30, "head_dim": 2**16}, "parameters; at most"),
        (LLAMA_2_7B | {"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39, no number over 0"),
        (LLAMA_2_7B | {"mlp_bias": 7}, "mlp_bias is 7, expected true or false"),
        (LLAMA_2_7B | {"rope_theta": float("inf")}, "rope_theta is inf, no number over 0"),
        (MISTRAL_V1 | {"layer_types": 32}, "layer_types is 32, expected a list"),
        (GEMMA_2_2B | {"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar is 10+"),
        (GEMMA_2_2B | {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, no number"),
        (GEMMA_2_2B | {"sliding_window": float("nan")}, "sliding_window is nan; expected an"),
        (GEMMA_3_1B | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0; expected"),
        (
            QWEN_2_5_05B | {"use_sliding_window": True, "max_window_layers": 2**63},
            "max_window_layers is 9223372036854775808; expected an integer from 0",
        ),
        (LLAMA_2_7B | {"rope_scaling": {"type": "su"}}, "scaling 'su' is not supported; supported"),
        (LLAMA_2_7B | {"rope_scaling": {"type": "linear"}}, "'linear' has no number 'factor'"),
        (LLAMA_2_7B | {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        (
            LLAMA_3_1_8B
            | {"rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"high_freq_factor": 1.0}},
            "a low_freq_factor of 1.0 and a high_freq_factor of 1.0, which must be more",
        ),
        (LLAMA_2_7B | {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' has no number 'factor'"),
        (LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": True}}, "factor is True"),
        (LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, no number"),
        (LLAMA_2_7B | {"rope_scaling": {"factor": 4.0}}, "'default' has a factor of 4.0"),
        (LLAMA_2_7B | {"rope_scaling": [8.0]}, r"rope_scaling is \[8.0\], expected an object"),
        (LLAMA_2_7B | {"rope_theta": None}, "rope_theta is None, no number"),
        (
            LLAMA_2_7B | {"rope_scaling": {"full_attention": {"rope_theta": 5.0}}},
            "for layers of full_attention: LlamaForCausalLM has one for all layers",
        ),
        (
            LLAMA_2_7B
            | {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}},
            "partial_rotary_factor is 0.5; heads of LlamaForCausalLM turn whole",
        ),
        (
            PHI_3_MINI_128K | {"rope_scaling": {"type": "linear", "factor": 2}},
            "scaling 'linear' is not supported; supported are default, longrope, su, yarn",
        ),
        (
            PHI_3_MINI_128K
            | {"rope_scaling": PHI_3_MINI_128K["rope_scaling"] | {"long_factor": [1.5] * 47}},
            "a long_factor of 47 numbers for 48 pairs",
        ),
        (
            PHI_3_MINI_128K | {"rope_scaling": PHI_3_MINI_128K["rope_scaling"] | {"type": "su"}},
            "'su' has no 'original_max_position_embeddings'",
        ),
        (PHI_3_MINI_128K | {"partial_rotary_factor": 2}, "head_dim of 96, 192 cannot rotate"),
        (SMOLLM3_3B | {"no_rope_layers": [1, 0]}, "no_rope_layers is no list of 36 layers"),
        (
            SMOLLM3_3B | {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval is 0",
        ),
        (OPT_6_7B | {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        (OPT_6_7B | {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GEMMA_3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)
def test_what_is_not_supported_is_named(config, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read(config)
    assert str(WHERE) in str(caught.value)


def test_positions_can_be_limited_and_not_added():
    assert read(LLAMA_2_7B, 100).max_positions == 100
    with pytest.raises(CheckpointError, match="4,096 positions are all it has"):
        read(LLAMA_2_7B, 5000)
    with pytest.raises(CheckpointError, match="learned, and cannot be limited"):
        read(GPT2, 100)


PUBLISHED = [LLAMA_3_1_8B, QWEN_2_5_05B, GEMMA_2_2B, GEMMA_3_1B, PHI_3_MINI_128K, SMOLLM3_3B]
PUBLISHED += [MISTRAL_V1, OPT_6_7B, GPT2]
STRANGE: list[Any] = [2**31, 2**31 - 1, 2**63, 2**64, 10**30, 10**4000, -1, 0, 1, True, 0.5]
STRANGE += [1e30, 1e308, -1e308, float("nan"), float("inf"), "7", "", None, [], [2**63], {}]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["architectures"][0])
def test_absurd_numbers_are_refused_or_read(config):
    """None escapes as an error of Python's or NumPy's, and none makes an array of its size."""
    more = {"layer_types": [], "head_dim": 64, "rope_parameters": {}, "num_key_value_heads": 2}
    scaling = config.get("rope_scaling") or {"rope_type": "yarn", "factor": 4.0}
    for key in [*config, *more]:
        for value in STRANGE:
            read_or_refuse(config | {key: value})
    for key in [*scaling, "partial_rotary_factor", "rope_theta", "attention_factor", "beta_fast"]:
        for value in STRANGE:
            read_or_refuse(config | {"rope_scaling": scaling | {key: value}})


def read_or_refuse(config: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        decoder = read(config, 512)
        assert num_parameters(decoder) <= MOST_PARAMETERS
        assert decoder.rotary_tables is None or np.isfinite(decoder.rotary_tables.frequencies).all()


JUNK = st.sampled_from(
    [
        *(None, True, False, 0, 1, 3, -1, 2.5, float("nan"), 10**30, "", "silu", "full_attention"),
        *([], [1], ["sliding_attention"] * 32, {}, {"rope_type": "yarn"}, {"factor": "two"}),
    ]
)
CONFIGS = [LLAMA_3_1_8B, QWEN_2_5_05B, GEMMA_2_2B, GEMMA_3_1B, PHI_3_MINI_128K, SMOLLM3_3B, GPT2]


@given(st.data())
def test_whatever_a_config_says_it_is_read_or_refused(data):
    config = dict(data.draw(st.sampled_from(CONFIGS)))
    keys = st.sampled_from([key for key in config if key != "architectures"] + ["layer_types"])
    config |= data.draw(st.dictionaries(keys, JUNK, min_size=1, max_size=3))
    with contextlib.suppress(CheckpointError):
        assert num_parameters(read(config, 512)) > 0
