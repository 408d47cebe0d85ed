"""`python -m experiments models`: the tables, and the numbers in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import models
from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.models import sizes as models_sizes
from experiments.models.config import ModelsConfig, check
from experiments.models.sizes import Batch, describe_model, device_share
from jax_chunkattn import CacheConfig
from jax_chunkattn.device.pool import allocate_pool
from jax_chunkattn.tree.prefix_tree import PrefixTree
from models.architectures import ARCHITECTURES
from models.parity import Parity, ParityCase
from models.weights import num_parameters
from tests.models.tiny_checkpoint import CONFIG, write_checkpoint

BATCH = Batch(requests=4, shared_tokens=40, own_tokens=10, chunk_size=16)


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command in 80 columns; returns the lines of its tables, and the summary."""
    monkeypatch.setenv("COLUMNS", "80")

    def tell(*arguments: str) -> tuple[list[str], dict[str, Any]]:
        assert main(["models", *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert main(["models", "--json", *arguments]) == 0
        return captured.out.splitlines(), json.loads(capsys.readouterr().out)

    return tell


def write_config(folder: Path, **changes: Any) -> Path:
    words = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(words | changes))
    return folder


def everything_measured() -> Parity:
    cases = {
        name: ParityCase(name, "as it is", 1.5e-6, 1024, True, "safetensors")
        for name in ARCHITECTURES
    }
    return Parity({"transformers": "5.23.0", "jax": "0.10.2"}, "2026-11-21", cases)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_cut_in_80_columns(tell, monkeypatch, measured, dtype):
    monkeypatch.setattr(
        models_sizes, "read_parity", lambda: everything_measured() if measured else None
    )
    lines, summary = tell("--dtype", dtype)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    words = set(text.replace("│", " ").split())
    for one in summary["architectures"]:
        assert {one["class_name"], *one["models"].split()} <= words
    for one in summary["models"]:
        assert {one["name"], f"{one['parameters']:,}", f"{one['max_positions']:,}"} <= words
    assert ("1.5e-06" in words) == measured
    assert text.count("1,024 equal") == (len(ARCHITECTURES) if measured else 0)
    assert ("2026-11-21)." in words) == measured
    assert ("has not been measured" in text) == (not measured)


def test_a_narrower_terminal_loses_nothing(tell, monkeypatch):
    wide, _ = tell()
    monkeypatch.setenv("COLUMNS", "40")
    assert tell()[0] == wide


def test_the_summary_has_all_architectures_and_presets(tell):
    _, summary = tell()
    assert [one["class_name"] for one in summary["architectures"]] == list(ARCHITECTURES)
    assert [one["name"] for one in summary["models"]] == list(models.PRESETS)
    llama = next(one for one in summary["models"] if one["name"] == "llama-3.1-8b")
    norms = (2 * 32 + 1) * 4096
    assert llama["weight_bytes"] == 2 * (8_030_261_248 + norms)  # which stay float32
    assert llama["kv_bytes_per_token"] == 131_072
    assert summary["chunks_shared"] == 32 + 32 * 4
    assert summary["chunks_unshared"] == 32 * 36
    assert llama["kv_bytes_shared"] == 160 * 64 * 131_072
    assert llama["kv_bytes_unshared"] == 1152 * 64 * 131_072


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny", "gpt2", "gemma-2-2b", "olmo-2-7b"])
def test_weights_take_what_the_arrays_of_the_decoder_take(name, dtype):
    model = models.load(f"random:{name}", dtype=dtype, abstract=True).model
    arrays = jax.tree.leaves(nnx.state(model))
    assert device_share(models.preset(name), dtype, 1)[0] == sum(
        array.size * array.dtype.itemsize for array in arrays
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_batch_takes_what_a_pool_of_its_chunks_takes(dtype):
    decoder = models.preset("tiny")
    told = describe_model("tiny", decoder, dtype, BATCH)
    for kind in ("shared", "unshared"):
        chunks = getattr(BATCH, f"chunks_{kind}")
        pool = allocate_pool(decoder.cache_spec, CacheConfig(chunks, BATCH.chunk_size, dtype))
        assert told[f"kv_bytes_{kind}"] == pool.keys.nbytes + pool.values.nbytes


@given(
    requests=st.integers(1, 5),
    shared_tokens=st.integers(0, 20),
    own_tokens=st.integers(1, 9),
    chunk_size=st.integers(1, 8),
)
def test_chunks_are_those_the_tree_holds(requests, shared_tokens, own_tokens, chunk_size):
    batch = Batch(requests, shared_tokens, own_tokens, chunk_size)
    tree = PrefixTree(200, chunk_size)
    prompts = [
        [*range(shared_tokens), *([1000 + request] * own_tokens)] for request in range(requests)
    ]
    held = [len(tree.insert(prompt).chunk_ids) for prompt in prompts]
    assert batch.chunks_shared == tree.in_use_count
    assert batch.chunks_unshared == sum(held)


def test_requests_beyond_the_context_are_not_counted(tell):
    lines, summary = tell("--shared-tokens", "1000", "--own-tokens", "25")
    held = {one["name"]: one["kv_bytes_shared"] for one in summary["models"]}
    assert [name for name, count in held.items() if count is None] == ["tiny", "gpt2"]
    assert sum(line.count("too long") for line in lines) == 2 * 2 + 1
    _, summary = tell("--shared-tokens", "1000", "--own-tokens", "24")
    assert None not in [one["kv_bytes_unshared"] for one in summary["models"]]


def test_one_model_of_a_folder_that_has_no_weights(tell, tmp_path):
    folder = write_config(tmp_path / ("a-long-name-" * 8))
    lines, summary = tell("--model", str(folder), "--requests", "1")
    [told] = summary["models"]
    assert "architectures" not in summary
    assert (told["layers"], told["query_heads"], told["kv_heads"]) == (3, 4, 2)
    assert told["kv_bytes_shared"] == told["kv_bytes_unshared"] == 2304 * 2 * 3 * 2 * 16 * 2
    assert max(map(len, lines)) <= 80
    assert any(f"{told['parameters']:,}" in line for line in lines)
    assert "batch: 1 request of 2,304 tokens" in "\n".join(lines)


def test_one_model_of_a_gguf_file(tell, tmp_path):
    _, summary = tell("--model", str(write_checkpoint(tmp_path / "mine.gguf")))
    [told] = summary["models"]
    assert told["parameters"] == num_parameters(CONFIG)
    assert told["max_positions"] == CONFIG.max_positions


def test_a_file_that_cannot_be_opened_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "mine.gguf")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(models_sizes, "open_checkpoint", refuse)
    assert main(["models", "--model", str(path)]) == 2
    error = f"error: --model {path} cannot be read (Permission denied)\n"
    assert capsys.readouterr().err == error


def test_positions_can_be_limited(tell, tmp_path):
    window = {"architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    folder = str(write_config(tmp_path / "windows", **window))
    _, summary = tell("--model", folder)
    assert summary["models"][0]["max_positions"] > 1024
    _, summary = tell("--model", folder, "--max-positions", "1024")
    assert summary["models"][0]["max_positions"] == 1024
    _, summary = tell("--model", "random:tiny", "--max-positions", "100")
    assert summary["models"][0]["max_positions"] == 100


def test_a_model_of_the_hub_is_read_from_the_cache_only(tell, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    assert main(["models", "--model", "org/name"]) == 2
    error = capsys.readouterr().err
    assert "error: --model org/name: it is not in the cache" in error
    assert "generate --model org/name" in error

    write_config(repository / "snapshots" / "0123abc", num_hidden_layers=7)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for name in ("org/name", "org/name@main", "org/name@0123abc"):
        _, summary = tell("--model", name)
        assert (summary["models"][0]["name"], summary["models"][0]["layers"]) == (name, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 0}, "--requests must be at least 1, got 0"),
        ({"own_tokens": 0}, "--own-tokens must be at least 1, got 0"),
        ({"chunk_size": -1}, "--chunk-size must be at least 1, got -1"),
        ({"shared_tokens": -1}, "--shared-tokens must be from 0 up, got -1"),
        ({"model": "random:tiny", "max_positions": 0}, "--max-positions must be at least 1"),
        ({"max_positions": 8}, "--max-positions is of one model"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(ModelsConfig(**changes))
