"""Reading GGUF files: good ones, damaged ones, and ones meant for another program."""

from __future__ import annotations

import dataclasses
import struct

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import CheckpointError
from models.gguf_file import read_gguf
from models.layout import rotate_half_rows
from models.rope import rotate
from models.sources import open_checkpoint
from models.weights import block_weights, decoder_weights
from tests.models.tiny_checkpoint import (
    CONFIG,
    checkpoint_tensors,
    config_metadata,
    write_checkpoint,
)

TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def load_weight(path, name: str, layer: int | None = None) -> np.ndarray:
    checkpoint = open_checkpoint(path, None)
    weights = (decoder_weights if layer is None else block_weights)(checkpoint.config).by_name()
    out = np.empty(weights[name].shape, np.float32)
    checkpoint.fill()(name, layer, out)
    return out


def load_everything(path) -> None:
    checkpoint = open_checkpoint(path, None)
    checkpoint.fill()
    checkpoint.tokenizer()


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
    read = open_checkpoint(write_checkpoint(path, config=config), None).config
    assert read.norm_epsilon == pytest.approx(config.norm_epsilon)
    assert dataclasses.replace(read, norm_epsilon=config.norm_epsilon) == config


@pytest.mark.parametrize("dims", [22, 30, 44])
def test_as_many_dimensions_turn_as_the_file_says(path, dims):
    """int(44 * (30 / 44)) is 29."""
    config = dataclasses.replace(CONFIG, hidden_size=4 * 44, head_dim=44)
    write_checkpoint(path, config=config, metadata={"llama.rope.dimension_count": dims})
    rope = open_checkpoint(path, None).config.layer_ropes[0]
    assert rope is not None
    assert rope.turning(44) == dims


@pytest.mark.parametrize("dims", [4, 8])
def test_neighbours_that_turn_in_llama_cpp_turn_as_halves(dims):
    """Also where the last dimensions of a head do not turn, and must stay where they are."""
    rows = np.random.default_rng(0).normal(size=(2 * 8, 1)).astype(np.float32)
    angles = np.arange(1, dims // 2 + 1, dtype=np.float32)
    pairs = rows.reshape(2, 4, 2)[:, : dims // 2]
    numbers = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    turned = rows.reshape(2, 8).copy()
    turned[:, :dims:2], turned[:, 1:dims:2] = numbers.real, numbers.imag
    heads = rotate_half_rows(rows, 8, dims).reshape(1, 2, 8)
    actual = rotate(jnp.asarray(heads), (jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]))
    expected = rotate_half_rows(turned.reshape(16, 1), 8, dims).reshape(1, 2, 8)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_decoded(path, name):
    kind = gguf.GGMLQuantizationType[name]
    down = load_weight(write_checkpoint(path, quantization=kind), "down", 1)
    source = checkpoint_tensors(CONFIG)["blk.1.ffn_down.weight"]
    decoded = gguf.quants.dequantize(gguf.quants.quantize(source, kind), kind)
    assert not np.array_equal(decoded, source)
    np.testing.assert_array_equal(down, decoded.T)


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


def test_an_empty_tensor_of_an_impossible_shape_is_refused(path):
    whole = write_checkpoint(path, tensors={"rope_freqs.weight": np.ones((1, 1), np.float32)})
    before, name, after = whole.read_bytes().partition(b"rope_freqs.weight" + b"\x02\0\0\0")
    path.write_bytes(before + name + struct.pack("<2Q", 0, 2**63) + after[16:])
    assert "tensor rope_freqs.weight has the impossible shape" in refusal(path)


def test_a_sliding_window_of_none_is_none(path):
    """As llama.cpp's converter writes Phi-4."""
    zero = {"phi3.attention.sliding_window": 0}
    metadata = {key.replace("llama.", "phi3."): v for key, v in config_metadata(CONFIG).items()}
    write_checkpoint(path, architecture="phi3", metadata=metadata | zero)
    assert open_checkpoint(path, None).config.max_positions == CONFIG.max_positions


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
    message = refusal(write_checkpoint(path, architecture="mamba"))
    assert "'mamba' is not supported in GGUF files, only llama, qwen2" in message


def test_missing_unknown_and_misshapen_tensors_are_all_named(path):
    changes = {
        "blk.1.ffn_up.weight": None,
        "blk.0.attn_q_norm.weight": np.ones(4, np.float32),
        "blk.0.attn_v.weight": np.ones((8, 32), np.float32),
    }
    message = refusal(write_checkpoint(path, tensors=changes))
    assert "missing tensors: blk.1.ffn_up.weight" in message
    assert "does not use: blk.0.attn_q_norm.weight" in message
    assert "blk.0.attn_v.weight (is [8, 32], expected [16, 32])" in message


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
        ({"llama.attention.head_count": 0}, "head_count' is 0; expected an integer from 1 to"),
        ({"llama.context_length": 2**31}, "context_length' is 2147483648; expected an integer"),
        ({"llama.rope.freq_base": float("inf")}, "rope_theta is inf, no number over 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan, no num"),
        ({"llama.attention.head_count_kv": 3}, "multiple of num_kv_heads"),
        ({"llama.rope.scaling.type": "sparkling"}, "'sparkling' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "no number 'factor'"),
        ({"llama.rope.dimension_count": 12}, "of a head_dim of 8, 12 cannot rotate"),
        ({"llama.rope.dimension_count": "all"}, "dimension_count' is not one integer"),
        ({"llama.rope.dimension_count": [8, 8]}, "dimension_count' is not one integer"),
        ({"llama.block_count": 2**31}, "is 2147483648; expected an integer from 1 to 10,000"),
        ({"llama.attention.value_length": 16}, "values 16"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported"),
        ({"tokenizer.ggml.pre": "poro"}, "pre-tokenizer 'poro' is not supported"),
        ({"tokenizer.ggml.pre": ["smollm"]}, "pre-tokenizer ['smollm'] is not supported"),
        ({"tokenizer.ggml.token_type": [1]}, "259 tokens but 1 token types"),
        ({"tokenizer.ggml.tokens": ["a"] * 259}, "holds a token twice"),
        ({"tokenizer.ggml.merges": ["x ö ö"]}, "merges"),
        ({"tokenizer.ggml.merges": [1, 2]}, "merges are not all text"),
        ({"tokenizer.ggml.merges": 5}, "'tokenizer.ggml.merges' is not an array"),
        ({"tokenizer.ggml.eos_token_id": 900}, "eos token id 900"),
    ],
    ids=str,
)
def test_unusable_metadata_is_named(path, metadata, words):
    assert words in refusal(write_checkpoint(path, metadata=metadata))
