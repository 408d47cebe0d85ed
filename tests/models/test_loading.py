"""`models.load` end to end on tiny models."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import models
from models.loading import assemble, random_weights
from tests.models.dense_attention import empty_pool, run_dense
from tests.models.test_decoder import numpy_logits
from tests.models.tiny_checkpoint import CONFIG, checkpoint_tensors, write_checkpoint

TOKENS = np.array([5, 200, 17, 17, 3], np.int32)


def logits_of(model: models.Decoder) -> np.ndarray:
    positions = np.arange(len(TOKENS), dtype=np.int32)
    pool = empty_pool(model.cache_spec, 8)
    return np.asarray(run_dense(*nnx.split(model), TOKENS, positions, pool)[0])


def leaves_of(model: models.Decoder) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model))


def test_a_gguf_file_gives_the_logits_of_the_weights_written_to_it(tmp_path):
    loaded = models.load(write_checkpoint(tmp_path / "mine.gguf"))
    source = checkpoint_tensors(CONFIG)

    def stacked(*parts):
        layers = range(CONFIG.num_layers)
        return np.stack(
            [np.concatenate([source[f"blk.{i}.{p}.weight"] for p in parts]) for i in layers]
        )

    weights = {
        "embedding": source["token_embd.weight"],
        "unembedding": source["output.weight"].T,
        "final_norm": source["output_norm.weight"],
        "blocks/attention_norm": stacked("attn_norm"),
        "blocks/qkv": stacked("attn_q", "attn_k", "attn_v").swapaxes(1, 2),
        "blocks/attention_out": stacked("attn_output").swapaxes(1, 2),
        "blocks/mlp_norm": stacked("ffn_norm"),
        "blocks/gate_up": stacked("ffn_gate", "ffn_up").swapaxes(1, 2),
        "blocks/down": stacked("ffn_down").swapaxes(1, 2),
    }
    expected = numpy_logits(loaded.config, weights, TOKENS)
    np.testing.assert_allclose(logits_of(loaded.model), expected, atol=1e-4, rtol=0)
    assert loaded.name == "mine"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == CONFIG.vocab_size


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (models.load("random:tiny", seed=seed) for seed in (0, 0, 1))
    assert first.tokenizer is None
    assert first.name == "random:tiny"
    assert first.config == models.preset("tiny")
    np.testing.assert_array_equal(logits_of(first.model), logits_of(again.model))
    assert not np.allclose(logits_of(first.model), logits_of(other.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_weight(tmp_path, dtype):
    path = write_checkpoint(tmp_path / "tiny.gguf")
    for spec in ("random:tiny", path):
        assert {leaf.dtype.name for leaf in leaves_of(models.load(spec, dtype=dtype).model)} == {
            dtype
        }


@pytest.mark.parametrize(
    ("spec", "dtype", "error", "words"),
    [
        ("random:tiny", "float8", ValueError, "known dtypes: float32, bfloat16, float16"),
        ("random:huge", "float32", ValueError, "known presets: llama-3-8b, smollm2-135m, tiny"),
        ("no/such.gguf", "float32", FileNotFoundError, "no model file at no/such.gguf"),
        ("smollm2", "float32", FileNotFoundError, "fetch_smollm2"),
        (".", "float32", FileNotFoundError, "no model file at ."),
    ],
)
def test_wrong_arguments_say_what_is_known(spec, dtype, error, words):
    with pytest.raises(error, match=words):
        models.load(spec, dtype=dtype)


def test_assembling_refuses_weights_that_do_not_fit():
    config = models.preset("tiny")
    weights = dict(random_weights(config, 0, "float32"))
    with pytest.raises(ValueError, match="not given: blocks/down"):
        assemble(config, "float32", [(n, w) for n, w in weights.items() if n != "blocks/down"])
    with pytest.raises(ValueError, match="no such weight"):
        assemble(config, "float32", [*weights.items(), ("blocks/bias", weights["final_norm"])])
    wrong = weights | {"blocks/down": weights["blocks/down"].astype(np.float16)}
    with pytest.raises(ValueError, match=r"blocks/down: float16.*expected float32"):
        assemble(config, "float32", wrong.items())


def test_importing_models_loads_no_optional_package():
    code = (
        "import sys, flax.nnx; before = set(sys.modules); import models; "
        "optional = {'gguf', 'jinja2', 'tokenizers', 'rich', 'tyro', 'matplotlib'}; "
        "loaded = optional & (set(sys.modules) - before); sys.exit(', '.join(loaded) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
