"""Reading GGUF files: good ones, damaged ones, and ones meant for another program."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest

from models.errors import CheckpointError
from models.gguf_checkpoint import read_config, read_weights
from models.gguf_file import read_gguf
from models.tokenizer import read_tokenizer
from tests.models.tiny_checkpoint import CONFIG, checkpoint_tensors, write_checkpoint

TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
FLOAT32 = np.dtype("float32")


def load_weights(path) -> dict[str, np.ndarray]:
    file = read_gguf(path)
    return dict(read_weights(file, read_config(file), FLOAT32))


def load_everything(path) -> None:
    load_weights(path)
    read_tokenizer(read_gguf(path))


def refusal(path) -> str:
    """The message with which the file is refused, wherever that happens."""
    with pytest.raises(CheckpointError) as caught:
        load_everything(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_config_survives_the_file(path, config):
    read = read_config(read_gguf(write_checkpoint(path, config=config)))
    assert read.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    assert dataclasses.replace(read, rms_norm_eps=config.rms_norm_eps) == config


def test_weights_land_stacked_transposed_and_in_rotate_half_order(path):
    source = checkpoint_tensors(CONFIG)
    weights = load_weights(write_checkpoint(path))
    for layer in range(CONFIG.num_layers):
        block = {
            name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in source.items()
            if name.startswith(f"blk.{layer}.")
        }
        qkv = np.concatenate([block["attn_q"], block["attn_k"], block["attn_v"]]).T
        gate_up = np.concatenate([block["ffn_gate"], block["ffn_up"]]).T
        np.testing.assert_array_equal(weights["blocks/qkv"][layer], qkv)
        np.testing.assert_array_equal(weights["blocks/gate_up"][layer], gate_up)
        np.testing.assert_array_equal(weights["blocks/down"][layer], block["ffn_down"].T)
        np.testing.assert_array_equal(weights["blocks/mlp_norm"][layer], block["ffn_norm"])
    np.testing.assert_array_equal(weights["embedding"], source["token_embd.weight"])
    np.testing.assert_array_equal(weights["unembedding"], source["output.weight"].T)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_decoded(path, name):
    kind = gguf.GGMLQuantizationType[name]
    weights = load_weights(write_checkpoint(path, quantization=kind))
    source = checkpoint_tensors(CONFIG)["blk.1.ffn_down.weight"]
    decoded = gguf.quants.dequantize(gguf.quants.quantize(source, kind), kind)
    assert not np.array_equal(decoded, source)
    np.testing.assert_array_equal(weights["blocks/down"][1], decoded.T)


def test_header_reads_like_the_gguf_package(path):
    write_checkpoint(path)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == {name: field.contents() for name, field in fields.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.tensors[tensor.name].dequantize(), tensor.data)


def test_a_file_cut_anywhere_is_called_truncated(path):
    whole = write_checkpoint(path).read_bytes()
    random = np.random.default_rng(0)
    cuts = [*range(4, 400, 9), *random.integers(400, len(whole) - 32, 60).tolist()]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "truncated" in refusal(path), cut


def test_a_damaged_header_is_refused_or_read_but_never_crashes(path):
    whole = bytearray(write_checkpoint(path).read_bytes())
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        for position in random.integers(0, 1200, 3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_everything(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"\x89PNG" * 100])
def test_other_files_are_not_gguf(path, content):
    path.write_bytes(content)
    assert "not a GGUF file" in refusal(path)


@pytest.mark.parametrize(
    ("version", "words"), [(1, "version 1"), (99, "version 99"), (3 << 24, "big-endian")]
)
def test_unknown_versions_are_named(path, version, words):
    content = bytearray(write_checkpoint(path).read_bytes())
    content[4:8] = version.to_bytes(4, "little")
    path.write_bytes(content)
    assert words in refusal(path)


def test_other_architectures_are_named(path):
    assert "'qwen2'" in refusal(write_checkpoint(path, architecture="qwen2"))


def test_missing_unknown_and_misshapen_tensors_are_all_named(path):
    changes = {
        "blk.1.ffn_up.weight": None,
        "rope_freqs.weight": np.ones(4, np.float32),
        "blk.0.attn_v.weight": np.ones((8, 32), np.float32),
    }
    message = refusal(write_checkpoint(path, tensors=changes))
    assert "missing tensors: blk.1.ffn_up.weight" in message
    assert "does not use: rope_freqs.weight" in message
    assert "blk.0.attn_v.weight (is (8, 32), expected (16, 32))" in message


def test_missing_embedding_is_named(path):
    changes = {"token_embd.weight": None}
    assert "token_embd.weight" in refusal(write_checkpoint(path, tensors=changes))


def test_a_whole_missing_layer_is_summarised(path):
    assert "and 4 more" in refusal(write_checkpoint(path, metadata={"llama.block_count": 3}))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": "two"}, "'llama.block_count' is not one integer"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv' is not one integer"),
        ({"llama.attention.head_count_kv": 3}, "multiple of num_kv_heads"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "4 of 8 dimensions"),
        ({"llama.attention.value_length": 16}, "values 16"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2' is not supported"),
        ({"tokenizer.ggml.token_type": [1]}, "259 tokens but 1 token types"),
        ({"tokenizer.ggml.tokens": ["a"] * 259}, "holds a token twice"),
        ({"tokenizer.ggml.merges": ["x ö ö"]}, "merges"),
        ({"tokenizer.ggml.merges": 5}, "'tokenizer.ggml.merges' is not an array"),
        ({"tokenizer.ggml.eos_token_id": 900}, "eos token id 900"),
    ],
    ids=str,
)
def test_unusable_metadata_is_named(path, metadata, words):
    assert words in refusal(write_checkpoint(path, metadata=metadata))
