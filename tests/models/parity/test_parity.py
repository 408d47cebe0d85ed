"""Every architecture against transformers, on checkpoints that transformers writes.

Needs the extra `parity`. `pytest tests/models/parity --write` keeps the results.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

import models
from tests.models.parity import ours
from tests.models.parity.cases import CASES, GREEDY_TOKENS, LOGIT_TOLERANCE, PROMPTS, Case
from tests.models.parity.gguf_writer import GGUF_CASES, read_by_transformers, write_gguf
from tests.models.parity.golden import FAST, FOLDER, NAMES, Golden, last_logits

if not all(find_spec(package) for package in ("torch", "transformers")):
    pytest.skip("needs torch and transformers: the extra `parity`", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

ONLY_LOGITS = [name for name in CASES if name not in NAMES and not name.endswith("windows")]
"""Cases whose greedy tokens another case's stand for: only the turning of positions differs."""


def compare(
    theirs: Any, model: Any, loaded: models.LoadedModel, class_name: str, what: str, *, greedy: bool
) -> tuple[dict[str, Any], list[np.ndarray], list[list[int]] | None]:
    """Asserts that both agree; gives the figures, and transformers' logits and tokens."""
    logits = theirs.prompt_logits(model)
    prefilled = ours.prefill(loaded)
    difference = max(
        float(np.abs(one - other[-len(one) :]).max())
        for one, other in zip(prefilled.logits, logits, strict=True)
    )
    assert difference < LOGIT_TOLERANCE
    found = {
        "class_name": class_name,
        "what": what,
        "format": "gguf" if what.startswith("GGUF") else "safetensors",
        "max_abs_logit_difference": float(f"{difference:.1e}"),
        "greedy_tokens": 0,
        "greedy_tokens_equal": True,
    }
    if not greedy:
        return found, logits, None
    decoded = ours.greedy_tokens(loaded, prefilled)
    tokens, gap = theirs.choices_behind(model, decoded)
    assert gap > 10 * difference, "a tie: the case proves nothing"
    assert len(set(tokens[0])) > 4, "the case decodes the same few tokens again and again"
    assert decoded == tokens
    found["greedy_tokens"] = GREEDY_TOKENS * len(PROMPTS)
    return found, logits, tokens


def assert_agrees(kept: Golden, golden: Golden) -> None:
    """But for what another version of transformers adds to config.json."""
    assert kept.shapes == golden.shapes
    assert kept.tokens == golden.tokens
    chex.assert_trees_all_close(kept.logits, golden.logits, rtol=1e-7, atol=LOGIT_TOLERANCE / 4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CASES],
)
def test_checkpoint_decodes_as_in_transformers(name, theirs, tmp_path, figures, write):
    case = CASES[name]
    model = theirs.make_model(case)
    theirs.write_checkpoint(case, model, tmp_path / name)
    loaded = models.load(tmp_path / name, max_positions=case.max_positions)
    found, logits, tokens = compare(
        theirs, model, loaded, case.class_name, name, greedy=name not in ONLY_LOGITS
    )
    figures[name] = found
    if tokens is None or name not in NAMES:
        return
    config, shapes = theirs.describe(tmp_path / name)
    golden = Golden(config, shapes, last_logits(logits), tokens)
    if write:
        golden.save(FOLDER / f"{name}.npz")
    assert_agrees(Golden.read(FOLDER / f"{name}.npz"), golden)


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_file_decodes_as_the_model_it_was_made_of(name, theirs, tmp_path, figures):
    """And transformers, reading the same file, agrees that it is that model."""
    case = GGUF_CASES[name]
    model = theirs.make_model(Case(case.class_name, case.config))
    path = write_gguf(case, model, tmp_path)
    expected = theirs.prompt_logits(model)
    if case.transformers_reads_it:
        for one, other in zip(
            theirs.prompt_logits(read_by_transformers(path)), expected, strict=True
        ):
            assert np.abs(one - other).max() < LOGIT_TOLERANCE
    loaded = models.load(path, max_positions=case.max_positions)
    found, _, _ = compare(theirs, model, loaded, case.class_name, f"GGUF, {name}", greedy=False)
    figures[f"{name} in GGUF"] = found


def test_golden_files_are_of_these_cases():
    assert {path.stem for path in Path(FOLDER).glob("*.npz")} == set(NAMES)
