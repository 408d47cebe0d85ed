"""Words of config.json for rotary embedding, in both forms, in tiny heads: what each means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD_DIM = 16
LAYERS = 2
BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 4 * HEAD_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
ORIGINAL = {"original_max_position_embeddings": 1024}
BESIDE = {"original_max_position_embeddings": 2048}
SHORT = [1.0 + 0.1 * pair for pair in range(HEAD_DIM // 2)]
LISTS = {"short_factor": SHORT, "long_factor": [2 * factor for factor in SHORT]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeCase:
    """What config.json says of rotary embedding, and of which architecture."""

    words: dict[str, Any]
    architecture: str = "Llama"


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old key": {"type": "linear", "factor": 2},
    "both keys": {"type": "linear", "rope_type": "dynamic", "factor": 2.0},
    "linear, no factor": {"rope_type": "linear"},
    "linear, null": {"rope_type": "linear", "factor": None},
    "linear, text": {"rope_type": "linear", "factor": "4"},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "dynamic, no factor": {"type": "dynamic"},
    "no type": {"factor": 4.0},
    "null type": {"rope_type": None, "type": "linear", "factor": 4.0},
    "su": {"type": "su", **LISTS, **ORIGINAL},
    "llama3": {"rope_type": "llama3", **LLAMA3, **ORIGINAL},
    "llama3, no original": {"rope_type": "llama3", **LLAMA3},
    "llama3, no factor": {"rope_type": "llama3", **LLAMA3, **ORIGINAL, "factor": None},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, old key": {"type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, no original": {"rope_type": "yarn", "factor": 4.0},
    "yarn, null original": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": None,
    },
    "yarn, no factor": {"rope_type": "yarn", **ORIGINAL},
    "yarn, null factor": {"rope_type": "yarn", "factor": None, **ORIGINAL},
    "yarn, half": {"rope_type": "yarn", "factor": 0.5, **ORIGINAL},
    "yarn, betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        **ORIGINAL,
        "attention_factor": 0.9,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, null betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        **ORIGINAL,
        "beta_fast": None,
        "beta_slow": 0,
    },
    "yarn, no attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        **ORIGINAL,
        "attention_factor": 0.0,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        **ORIGINAL,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn, one mscale": {"rope_type": "yarn", "factor": 40.0, **ORIGINAL, "mscale": 0.707},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "truncate": False},
    "yarn, truncate null": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "truncate": None},
    "longrope": {"rope_type": "longrope", **LISTS, **ORIGINAL},
    "longrope, factor": {"rope_type": "longrope", **LISTS, **ORIGINAL, "factor": 2.0},
    "longrope, attention": {
        "rope_type": "longrope",
        **LISTS,
        **ORIGINAL,
        "attention_factor": 1.3,
    },
    "longrope, no original": {"rope_type": "longrope", **LISTS},
    "longrope, no long_factor": {"rope_type": "longrope", "short_factor": SHORT, **ORIGINAL},
    "longrope, short list": {"rope_type": "longrope", **LISTS, "short_factor": SHORT[1:]},
    "unknown": {"rope_type": "sparkling", "factor": 4.0},
}


def _cases() -> dict[str, RopeCase]:
    cases = {}
    for name, scaling in SCALINGS.items():
        old = {"rope_theta": 5e5, "rope_scaling": scaling}
        cases[name] = RopeCase(old)
        cases[f"{name}; beside"] = RopeCase(old | BESIDE)
        params = {"rope_theta": 5e5, **scaling}
        cases[f"{name}; parameters"] = RopeCase({"rope_parameters": params})
        cases[f"{name}; parameters, beside"] = RopeCase({"rope_parameters": params} | BESIDE)
        cases[f"{name}; Phi-3"] = RopeCase(old, "Phi3")
        cases[f"{name}; Phi-3, beside"] = RopeCase(old | BESIDE, "Phi3")
        cases[f"{name}; Gemma 3"] = RopeCase(old | BESIDE, "Gemma3")
    for architecture in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Olmo2", "SmolLM3"):
        cases[f"nothing; {architecture}"] = RopeCase({}, architecture)
        cases[f"two places; {architecture}"] = RopeCase(
            {
                "rope_theta": 500.0,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            architecture,
        )
        cases[f"by type of layer; {architecture}"] = RopeCase(
            {
                "layer_types": [FULL] * LAYERS,
                "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 500.0}},
            },
            architecture,
        )
        cases[f"part, default; {architecture}"] = RopeCase(
            {"partial_rotary_factor": 0.5}, architecture
        )
        cases[f"part, linear; {architecture}"] = RopeCase(
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            architecture,
        )
        cases[f"part of one; {architecture}"] = RopeCase(
            {"partial_rotary_factor": 1, "rope_scaling": {"type": "linear", "factor": 4.0}},
            architecture,
        )
        cases[f"null theta; {architecture}"] = RopeCase({"rope_theta": None}, architecture)
    for part in (0.25, 0.5, 0.75, 1.0, 1, None, "0.5"):
        words = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": part}
        cases[f"part {part!r}; Phi-3"] = RopeCase({"partial_rotary_factor": part}, "Phi3")
        cases[f"part {part!r}; Phi-3, parameters"] = RopeCase({"rope_parameters": words}, "Phi3")
    half = {
        "rope_type": "longrope",
        "short_factor": SHORT[:4],
        "long_factor": SHORT[:4],
    }
    cases |= {
        "part, longrope; Phi-3": RopeCase(
            {"partial_rotary_factor": 0.5, "rope_scaling": half}, "Phi3"
        ),
        "su, original beside only; Phi-3": RopeCase(
            BESIDE | {"rope_scaling": {"type": "su", **LISTS}}, "Phi3"
        ),
        "null original beside; Phi-3": RopeCase(
            {
                "original_max_position_embeddings": None,
                "rope_scaling": {"type": "longrope", **LISTS, **ORIGINAL},
            },
            "Phi3",
        ),
        "null original beside": RopeCase(
            {
                "original_max_position_embeddings": None,
                "rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL},
            }
        ),
        "empty": RopeCase({"rope_scaling": {}, "rope_parameters": {"rope_theta": 500.0}}),
        "scaling is a list": RopeCase({"rope_scaling": [1]}),
        "theta in text": RopeCase({"rope_theta": "500"}),
        "null theta in parameters": RopeCase(
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": None}}
        ),
        "interval 0; SmolLM3": RopeCase({"no_rope_layer_interval": 0}, "SmolLM3"),
        "null interval; SmolLM3": RopeCase({"no_rope_layer_interval": None}, "SmolLM3"),
        "no layers; SmolLM3": RopeCase({"no_rope_layers": []}, "SmolLM3"),
        "too many layers; SmolLM3": RopeCase({"no_rope_layers": [1, 1, 0, 0]}, "SmolLM3"),
        "nothing; Gemma 3": RopeCase({}, "Gemma3"),
        "two bases; Gemma 3": RopeCase(
            {"rope_theta": 5e5, "rope_local_base_freq": 500.0}, "Gemma3"
        ),
        "flat parameters; Gemma 3": RopeCase(
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
            "Gemma3",
        ),
        "scaling beside flat parameters; Gemma 3": RopeCase(
            {"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 4.0}}, "Gemma3"
        ),
        "part, default; Gemma 3": RopeCase({"partial_rotary_factor": 0.5}, "Gemma3"),
        "part, linear; Gemma 3": RopeCase(
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "Gemma3",
        ),
        "nested; Gemma 3": RopeCase(
            {
                "rope_parameters": {
                    FULL: {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, **ORIGINAL},
                    SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                },
                **BESIDE,
            },
            "Gemma3",
        ),
        "nested, some null; Gemma 3": RopeCase(
            {
                "rope_theta": 5e5,
                "rope_parameters": {FULL: None, SLIDING: {"type": "linear", "factor": 2.0}},
            },
            "Gemma3",
        ),
        "nested, truncate inside; Gemma 3": RopeCase(
            {
                "rope_parameters": {
                    FULL: {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "truncate": False},
                },
            },
            "Gemma3",
        ),
        "nested, truncate beside; Gemma 3": RopeCase(
            {
                "rope_parameters": {
                    FULL: {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
                    "truncate": False,
                },
            },
            "Gemma3",
        ),
        "nested, no original; Gemma 3": RopeCase(
            {"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 4.0}}, **BESIDE}, "Gemma3"
        ),
        "scaling over nested; Gemma 3": RopeCase(
            {
                "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 500.0}},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "Gemma3",
        ),
    }
    return cases


CASES = _cases()
LEFT_OUT = {
    *(f"by type of layer; {name}" for name in ("Llama", "Mistral", "Olmo2")),
    *(f"{name}; Gemma 3" for name in ("linear, old key", "yarn, old key", "dynamic")),
    *(name for name in CASES if name.startswith("no type")),
}
"""Words that transformers warns of and leaves out: a scaling, or a base, that we refuse to drop."""
