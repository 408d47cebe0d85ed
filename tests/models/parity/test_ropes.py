"""What words of config.json make of rotary embedding: as transformers reads them, or refused.

golden/ropes.json holds what transformers made of each case; it is compared with itself where it is
installed.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.architectures import ARCHITECTURES
from models.errors import CheckpointError
from models.hf_config import read_config
from tests.models.parity.golden import FOLDER
from tests.models.parity.rope_cases import (
    BASE,
    CASES,
    FULL,
    LAYERS,
    LEFT_OUT,
    SLIDING,
    RopeCase,
)

PATH = FOLDER / "ropes.json"
CLASSES = {name.removesuffix("ForCausalLM"): name for name in ARCHITECTURES}
MAX_POSITIONS = 512
GEMMA3_TYPES = [SLIDING, FULL]
HAS_TRANSFORMERS = all(find_spec(package) for package in ("torch", "transformers"))

Layer = dict[str, Any] | None
"""Radians a token of one layer's pairs, and what cos and sin are multiplied by."""


def config_of(case: RopeCase) -> dict[str, Any]:
    types = {"layer_types": GEMMA3_TYPES} if case.architecture == "Gemma3" else {}
    return copy.deepcopy(BASE | types | case.words)


def ours(case: RopeCase) -> list[Layer] | None:
    """Each layer's; None of a layer that does not turn, and of words that are refused."""
    architecture = ARCHITECTURES[CLASSES[case.architecture]]
    config = config_of(case) | {"sliding_window": MAX_POSITIONS}
    try:
        decoder = read_config(config, architecture, Path("config.json"), MAX_POSITIONS)
    except CheckpointError:
        return None
    made = [rope and rope.frequencies(decoder.head_dim) for rope in decoder.layer_ropes]
    return [each and {"frequencies": each[0].tolist(), "factor": each[1]} for each in made]


def theirs(case: RopeCase) -> list[Layer] | None:
    """As `ours`; the embedding is made as the model makes it, and turns a query."""
    import torch
    import transformers

    name = case.architecture
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    config_class = getattr(
        transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    try:
        config = config_class.from_dict(config_of(case))
        embedding = getattr(module, f"{name}RotaryEmbedding")(config)
        found = []
        for layer in range(LAYERS):
            kind = config.layer_types[layer] if name == "Gemma3" else None
            prefix, of_kind = (f"{kind}_", [kind]) if kind else ("", [])
            frequencies = getattr(embedding, f"{prefix}inv_freq")
            query = torch.ones(1, 1, 1, BASE["head_dim"])
            cos, sin = embedding(query, torch.tensor([[3]]), *of_kind)
            assert torch.isfinite(module.apply_rotary_pos_emb(query, query, cos, sin)[0]).all()
            factor = float(getattr(embedding, f"{prefix}attention_scaling"))
            turns = name != "SmolLM3" or config.no_rope_layers[layer]
            found.append({"frequencies": frequencies.tolist(), "factor": factor} if turns else None)
        return found
    except Exception:  # of any kind: what it cannot read
        return None


def assert_equal(actual: list[Layer] | None, expected: list[Layer] | None) -> None:
    assert (actual is None) == (expected is None), (actual, expected)
    for one, other in zip(actual or [], expected or [], strict=True):
        assert (one is None) == (other is None)
        if one and other:
            np.testing.assert_allclose(one["frequencies"], other["frequencies"], rtol=2e-6)
            assert one["factor"] == pytest.approx(other["factor"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_words_mean_what_transformers_once_made_of_them(name):
    golden = json.loads(PATH.read_text())[name]
    if name in LEFT_OUT:
        assert golden is not None
        golden = None
    assert_equal(ours(CASES[name]), golden)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: the extra `parity`")
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_transformers_makes_of_them_what_it_once_made(write):
    made = {name: theirs(case) for name, case in CASES.items()}
    if write:
        lines = [f"{json.dumps(name)}: {json.dumps(_short(each))}" for name, each in made.items()]
        PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    kept = json.loads(PATH.read_text())
    assert kept.keys() == made.keys()
    for name in made:
        assert_equal(made[name], kept[name])


def _short(layers: list[Layer] | None) -> list[Layer] | None:
    """With as many digits as are compared."""
    return layers and [
        layer
        and {
            "frequencies": [float(f"{each:.7g}") for each in layer["frequencies"]],
            "factor": float(f"{layer['factor']:.7g}"),
        }
        for layer in layers
    ]
