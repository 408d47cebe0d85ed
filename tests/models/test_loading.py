"""`models.load` end to end on tiny models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.architectures.declaration import Key
from models.architectures.gpt2 import GPT2
from models.architectures.llama import LLAMA
from models.building import build
from models.decoder import Block
from models.dense_attention import empty_pool, run_dense
from models.hf_config import read_config
from models.layout import expected_shapes
from models.random_weights import random_fill
from tests.models.safetensors_writer import write_safetensors
from tests.models.test_decoder import numpy_logits
from tests.models.tiny_checkpoint import CONFIG, checkpoint_tensors, write_checkpoint

TOKENS = np.array([5, 200, 17, 17, 3], np.int32)


def logits_of(model: models.Decoder) -> np.ndarray:
    positions = np.arange(len(TOKENS), dtype=np.int32)
    pool = empty_pool(model.cache_spec, 8)
    return np.asarray(run_dense(*nnx.split(model), TOKENS, positions, pool)[0])


def leaves_of(model: models.Decoder) -> dict[str, jax.Array]:
    return {
        "/".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def test_a_gguf_file_gives_the_logits_of_the_weights_written_to_it(tmp_path):
    loaded = models.load(write_checkpoint(tmp_path / "mine.gguf"))
    source = checkpoint_tensors(CONFIG)
    hidden, dim = CONFIG.hidden_size, CONFIG.head_dim
    group = CONFIG.num_heads // CONFIG.num_kv_heads

    def stacked(part):
        layers = range(CONFIG.num_layers)
        return np.stack([source[f"blk.{i}.{part}.weight"] for i in layers])

    def by_kv_head(part, heads):
        weight = stacked(part).reshape(CONFIG.num_layers, CONFIG.num_kv_heads, heads, dim, hidden)
        return weight.transpose(0, 4, 1, 2, 3)

    qkv = [by_kv_head("attn_q", group), by_kv_head("attn_k", 1), by_kv_head("attn_v", 1)]
    gate_up = np.stack([stacked("ffn_gate"), stacked("ffn_up")], 1)  # [L, 2, F, E]
    out = stacked("attn_output").swapaxes(1, 2)
    weights = {
        "embedding": source["token_embd.weight"],
        "unembedding": source["output.weight"].T,
        "final_norm": source["output_norm.weight"],
        "blocks/attention_norm": stacked("attn_norm"),
        "blocks/qkv": np.concatenate(qkv, axis=3),
        "blocks/attention_out": out.reshape(CONFIG.num_layers, CONFIG.num_heads, dim, hidden),
        "blocks/mlp_norm": stacked("ffn_norm"),
        "blocks/gate_up": gate_up.transpose(0, 3, 1, 2),
        "blocks/down": stacked("ffn_down").swapaxes(1, 2),
    }
    expected = numpy_logits(loaded.config, weights, TOKENS)
    chex.assert_trees_all_close(logits_of(loaded.model), expected, rtol=0, atol=1e-4)
    assert loaded.name == "mine"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == CONFIG.vocab_size


def test_the_unembedding_of_gpt2_is_no_transposed_matrix(tmp_path):
    sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 64}
    config = {"architectures": [GPT2.class_name], "tie_word_embeddings": False, **sizes}
    decoder = read_config(config, GPT2, tmp_path)
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(shape, np.float32)
        for name, shape in expected_shapes(GPT2.layout, decoder).items()
    }
    tensors["lm_head.weight"] = random.standard_normal((96, 48), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    leaves = leaves_of(models.load(tmp_path).model)
    np.testing.assert_array_equal(leaves["unembedding"], tensors["lm_head.weight"].T)
    up = tensors["transformer.h.0.mlp.c_fc.weight"]
    np.testing.assert_array_equal(np.ravel(leaves["blocks/up"]), np.ravel(up))


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (models.load("random:tiny", seed=seed) for seed in (0, 0, 1))
    assert first.tokenizer is None
    assert first.name == "random:tiny"
    assert first.config == models.preset("tiny")
    chex.assert_trees_all_equal(leaves_of(first.model), leaves_of(again.model))
    assert not np.allclose(logits_of(first.model), logits_of(other.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_weight_but_the_norms(tmp_path, dtype):
    path = write_checkpoint(tmp_path / "tiny.gguf")
    for spec in ("random:tiny", path):
        for name, leaf in leaves_of(models.load(spec, dtype=dtype).model).items():
            assert leaf.dtype.name == ("float32" if "norm" in name else dtype), name


def test_abstract_weights_have_shapes_and_no_values():
    abstract = models.load("random:llama-3.1-70b", dtype="bfloat16", abstract=True).model
    leaves = leaves_of(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    assert sum(leaf.size for leaf in leaves.values()) == 70_553_706_496


def test_progress_counts_every_byte_once():
    seen: list[tuple[int, int]] = []
    model = models.load("random:tiny", on_progress=lambda *args: seen.append(args)).model
    size = sum(leaf.nbytes for leaf in leaves_of(model).values())
    assert [total for _, total in seen] == [size] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (size, size)


def test_stacked_weights_are_not_copied_on_a_cpu():
    """What was written is what the decoder holds: one array of the weights' size, not two."""
    config = models.preset("tiny")
    written: dict[tuple[str, int | None], int] = {}
    random = random_fill(config, 0)

    def fill(name, layer, out):
        written[name, layer] = out.ctypes.data
        random(name, layer, out)

    model = build(config, "float32", fill)
    assert isinstance(model.blocks, Block)
    qkv = model.blocks.qkv[...]
    assert qkv.unsafe_buffer_pointer() == written["qkv", 0]
    assert model.embedding[...].unsafe_buffer_pointer() == written["embedding", None]


@pytest.mark.parametrize(
    ("spec", "dtype", "error", "words"),
    [
        ("random:tiny", "float8", ValueError, "known dtypes: float32, bfloat16, float16"),
        ("random:huge", "float32", ValueError, "known presets: gemma-2-2b, gpt2"),
        ("no/such.gguf", "float32", FileNotFoundError, "no/such.gguf"),
    ],
)
def test_wrong_arguments_say_what_is_known(spec, dtype, error, words):
    with pytest.raises(error, match=words):
        models.load(spec, dtype=dtype)


@pytest.mark.slow
def test_importing_models_loads_no_optional_package():
    code = (
        "import sys, flax.nnx; before = set(sys.modules); import models; "
        "optional = {'gguf', 'jinja2', 'tokenizers', 'huggingface_hub', 'safetensors', 'rich', "
        "'tyro', 'matplotlib'}; "
        "loaded = optional & (set(sys.modules) - before); sys.exit(', '.join(loaded) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


MEASURED = models.DecoderConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
)
PEAK_MEMORY = """
import re, sys
import jax
from flax import nnx
import models

def resident(key):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", status.read())[1])

models.load("random:tiny", dtype="bfloat16")  # brings in what is used once
before = resident("VmRSS")
model = models.load(sys.argv[1], dtype="bfloat16").model
size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print((resident("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_peaks_at_little_more_than_the_checkpoint(tmp_path):
    shapes = expected_shapes(LLAMA.layout, MEASURED)
    zeros = np.zeros(MEASURED.vocab_size * MEASURED.hidden_size, jnp.bfloat16)
    weights = {name: zeros[: math.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", weights)
    config = {
        "architectures": [LLAMA.class_name],
        **{
            source.name: getattr(MEASURED, field)
            for field, source in LLAMA.fields.by_name().items()
            if isinstance(source, Key)
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    finished = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 0, finished.stderr
    assert 0.95 < float(finished.stdout) < 1.3
