"""Every architecture against what transformers made of it once; see test_parity.py."""

from __future__ import annotations

import numpy as np
import pytest

import models
from tests.models.parity import ours
from tests.models.parity.cases import CASES, LOGIT_TOLERANCE
from tests.models.parity.golden import FOLDER, NAMES, Golden, last_logits


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_decodes_as_transformers_once_did(name, tmp_path):
    golden = Golden.read(FOLDER / f"{name}.npz")
    golden.write_checkpoint(tmp_path / name)
    loaded = models.load(tmp_path / name, max_positions=CASES[name].max_positions)
    prefilled = ours.prefill(loaded)
    for actual, expected in zip(last_logits(prefilled.logits), golden.logits, strict=True):
        assert np.abs(actual - expected).max() < LOGIT_TOLERANCE
    assert ours.greedy_tokens(loaded, prefilled) == golden.tokens
