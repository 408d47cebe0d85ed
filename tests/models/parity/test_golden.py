"""Every architecture against what transformers made of it once.

Where transformers is installed, test_parity.py compares with itself, and with these files.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import models
from tests.models.parity import ours
from tests.models.parity.cases import CASES, LOGIT_TOLERANCE
from tests.models.parity.golden import FAST, FOLDER, NAMES, Golden, last_logits

HAS_TRANSFORMERS = all(find_spec(package) for package in ("torch", "transformers"))


@pytest.mark.skipif(HAS_TRANSFORMERS, reason="test_parity.py compares with transformers itself")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NAMES],
)
def test_checkpoint_decodes_as_transformers_once_did(name, tmp_path):
    golden = Golden.read(FOLDER / f"{name}.npz")
    golden.write_checkpoint(tmp_path / name)
    loaded = models.load(tmp_path / name, max_positions=CASES[name].max_positions)
    prefilled = ours.prefill(loaded)
    for actual, expected in zip(last_logits(prefilled.logits), golden.logits, strict=True):
        assert np.abs(actual - expected).max() < LOGIT_TOLERANCE
    assert ours.greedy_tokens(loaded, prefilled) == golden.tokens


def test_missing_extra_and_misshapen_tensors_are_named_in_one_error(tmp_path):
    golden = Golden.read(FOLDER / "llama.npz")
    del golden.shapes["model.layers.1.mlp.up_proj.weight"]
    golden.shapes["model.layers.0.self_attn.q_proj.bias"] = [48]
    golden.shapes["model.norm.weight"] = [47]
    golden.write_checkpoint(tmp_path / "bad")
    with pytest.raises(models.CheckpointError) as caught:
        models.load(tmp_path / "bad")
    assert str(caught.value) == (
        f"{tmp_path / 'bad'}: missing tensors: model.layers.1.mlp.up_proj.weight; "
        "tensors this decoder does not use: model.layers.0.self_attn.q_proj.bias; "
        "tensors of another shape: model.norm.weight (is [47], expected [48])"
    )


def test_what_old_checkpoints_hold_besides_weights_is_left_out(tmp_path):
    golden = Golden.read(FOLDER / "llama.npz")
    golden.shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = [6]
    golden.write_checkpoint(tmp_path / "old")
    assert models.load(tmp_path / "old").config.num_layers == 2
