"""Writes a transformers model as a GGUF file, as llama.cpp's converter does.

Names of tensors and of metadata are the gguf package's own, so that they check ours.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.parity.cases import CASES, SMALL, WINDOW
from tests.models.tiny_checkpoint import interleave_rows

FILE = "model.gguf"


@dataclass(frozen=True)
class GgufCase:
    """One file.

    Attributes:
      architecture: the file's name for it.
      transformers_reads_it: the same model as it was made of; not where the file leaves out what
        transformers then takes from another model.
      rope_factors: written as a tensor.
    """

    class_name: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    max_positions: int | None = None
    transformers_reads_it: bool = True
    rope_factors: bool = False


_GEMMA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
}
GGUF_CASES = {
    "llama": GgufCase("LlamaForCausalLM", "llama", CASES["llama"].config),
    "llama3-rope": GgufCase(
        "LlamaForCausalLM",
        "llama",
        CASES["llama3-rope"].config,
        transformers_reads_it=False,
        rope_factors=True,
    ),
    "qwen2": GgufCase("Qwen2ForCausalLM", "qwen2", CASES["qwen2"].config),
    "qwen3": GgufCase(
        "Qwen3ForCausalLM", "qwen3", CASES["qwen3"].config, transformers_reads_it=False
    ),
    "gemma2": GgufCase(
        "Gemma2ForCausalLM",
        "gemma2",
        SMALL | _GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
        transformers_reads_it=False,
    ),
    "gemma3": GgufCase(
        "Gemma3ForCausalLM",
        "gemma3",
        SMALL | _GEMMA,
        transformers_reads_it=False,
    ),
    "phi3": GgufCase("Phi3ForCausalLM", "phi3", SMALL),
    "gpt2": GgufCase("GPT2LMHeadModel", "gpt2", CASES["gpt2"].config),
}
_LINEAR_OF_GPT2 = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def write_gguf(case: GgufCase, model: Any, folder: Path) -> Path:
    """Writes the model, with a vocabulary of its size that means nothing."""
    config = model.config
    writer = gguf.GGUFWriter(folder / FILE, case.architecture)
    layers = config.num_hidden_layers
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if case.architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        _add_llama_metadata(writer, config, case.architecture)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[case.architecture.upper()], layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(known, _converted(case.architecture, known, tensor.numpy(), config))
    if case.rope_factors:
        theta = config.rope_parameters["rope_theta"]
        turning = model.model.rotary_emb.inv_freq.numpy()
        plain = theta ** -(np.arange(len(turning), dtype=np.float32) / len(turning))
        writer.add_tensor("rope_freqs.weight", (plain / turning).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / FILE


def _add_llama_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"token{index}" for index in range(3, size))])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)


def _converted(architecture: str, name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if architecture == "llama" and ".attn_q." in name:
        return interleave_rows(values, config.num_attention_heads)
    if architecture == "llama" and ".attn_k." in name:
        return interleave_rows(values, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1.0)
    is_linear = any(part in name for part in _LINEAR_OF_GPT2) and name.endswith(".weight")
    if architecture == "gpt2" and is_linear:
        return np.ascontiguousarray(values.T)
    return values


def read_by_transformers(path: Path) -> Any:
    import transformers  # takes seconds

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval()
