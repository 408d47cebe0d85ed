"""Learned prefixes in files: what peft writes is read, and what cannot be used is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.errors import CheckpointError
from models.prefixes import CONFIG, TENSOR, WEIGHTS, PrefixArrays, load_prefix, save_prefix
from models.safetensors_file import read_tensors, write_tensors
from tests.jax_chunkattn.engine.behind import prefix_of
from tests.jax_chunkattn.toy import toy_model

SPEC = toy_model().cache_spec
PREFIX = PrefixArrays(*prefix_of(16))


@pytest.fixture
def folder(tmp_path):
    save_prefix(tmp_path / "prefix", PREFIX, base_model="toy")
    return tmp_path / "prefix"


def test_what_is_written_is_read(folder):
    found = load_prefix(folder, SPEC)
    np.testing.assert_array_equal(found.keys, PREFIX.keys)
    np.testing.assert_array_equal(found.values, PREFIX.values)
    assert found.num_tokens == 16


def test_each_tokens_numbers_lie_layer_by_layer_keys_before_values(folder):
    with read_tensors(folder / WEIGHTS)[TENSOR].values() as stored:
        parts = np.asarray(stored).reshape(16, 2 * SPEC.num_layers, SPEC.num_kv_heads, -1)
    np.testing.assert_array_equal(parts[5, 2, 1], PREFIX.keys[1, 1, 5])
    np.testing.assert_array_equal(parts[5, 3, 0], PREFIX.values[1, 0, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; PREFIX_TUNING and CARTRIDGE"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "'SEQ_2_SEQ_LM'"),
        ({"num_transformer_submodules": 2}, "2 stacks"),
        ({"num_layers": 5}, "num_layers is 5, and the model has 2"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, and the model has 2"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be"),
        ({"num_virtual_tokens": 20}, "20 virtual tokens of the model have shape"),
    ],
)
def test_what_is_no_prefix_for_the_model_is_refused(folder, change, message):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_prefix(folder, SPEC)


def test_folders_that_lack_something_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no learned prefix can be read from"):
        load_prefix(tmp_path, SPEC)
    write_tensors(folder / WEIGHTS, {"other": np.zeros(3, np.float32)}, {})
    with pytest.raises(CheckpointError, match="prompt_embeddings is not there"):
        load_prefix(folder, SPEC)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors$"):
        load_prefix(folder, SPEC)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled files are not read"):
        load_prefix(folder, SPEC)
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        load_prefix(folder, SPEC)
