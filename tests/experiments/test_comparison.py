"""How many requests the run without sharing takes on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.generate import run as generate_run
from experiments.generate.comparison import affordable_batch
from experiments.generate.config import GenerateConfig
from experiments.generate.inputs import read_inputs
from experiments.prompts import PromptSet

ROOMY: dict[str, Any] = {
    "max_tokens": 10,
    "tokens_per_second": 100.0,
    "bytes_per_token": 1.0,
    "free_bytes": None,
    "seconds": 30.0,
}


@pytest.mark.parametrize(
    ("lengths", "changes", "expected"),
    [
        ([100] * 8, {}, 8),
        ([1000] * 8, {}, 3),
        ([1000] * 8, {"seconds": 45.0}, 4),
        ([1000] * 8, {"tokens_per_second": 200.0}, 6),
        ([9000] * 8, {}, 1),
        ([1000, 3000, 10], {}, 1),
        ([100] * 8, {"free_bytes": 660}, 3),
        ([100] * 8, {"free_bytes": 659}, 2),
        ([100] * 8, {"tokens_per_second": 0.0}, 1),
    ],
)
def test_affordable_batch(lengths: list[int], changes: dict[str, Any], expected: int) -> None:
    assert affordable_batch(lengths, **{**ROOMY, **changes}) == expected


@pytest.mark.parametrize(("batch", "compared"), [(1, 1), (4, 2)])
def test_no_more_are_compared_than_were_answered(
    batch: int, compared: int, make_measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    def decode(config: GenerateConfig, loaded: Any, prompts: PromptSet, display: Any) -> Any:
        assert not config.sharing
        return make_measured(batch=len(prompts.tokens), sharing=False)

    monkeypatch.setattr(generate_run, "decode", decode)
    config = GenerateConfig(model="random:tiny", batch=batch, compare_batch=2)
    lines = read_inputs(config).lines
    prompts = PromptSet(lines, ((1, 2),) * len(lines), 2)
    folder: Any = SimpleNamespace(finished={}, finish_unit=lambda _, record: record)
    loaded: Any = None
    unshared = generate_run.compare(config, loaded, prompts, make_measured(), folder)
    assert unshared is not None
    assert unshared.batch == compared
