"""`python -m experiments engine`, small."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from experiments.engine.command import run
from experiments.engine.config import EngineConfig, check
from experiments.engine.run import Timed
from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from pallas_kernels.native import library


@pytest.mark.slow
def test_both_sides_are_timed_in_turns(tmp_path: Path):
    deterministic = library.problem() is None
    sides = {"deterministic": deterministic, "mesh_of_one": True}
    options = {**EngineConfig.SMOKE, **sides, "output": tmp_path / "out"}
    config = EngineConfig(**options)
    summary = run(config)
    rounds = read_result(tmp_path / "out").of_kind("round")
    bare, engine = ([one[side] for one in rounds] for side in ("bare loop", "engine"))
    for one in (*bare, *engine):
        assert one["rate"] == one["tokens"] / one["seconds"] > 0
    assert {one["tokens"] for one in bare} == {config.rows * config.tokens}
    assert all(0 < one["tokens"] <= config.rows * config.tokens for one in engine)
    ratios = [two["rate"] / one["rate"] for one, two in zip(bare, engine, strict=True)]
    assert summary["ratio"] == pytest.approx(median(ratios), abs=1e-3)
    assert summary["host_microseconds_per_token"] > 0
    others = [("deterministic engine", "deterministic_ratio")] if deterministic else []
    for side, name in (*others, ("engine on a mesh", "mesh_ratio")):
        rates = [one[side]["rate"] for one in rounds]
        ratios = [rate / one["rate"] for one, rate in zip(engine, rates, strict=True)]
        assert summary[name] == pytest.approx(median(ratios), abs=1e-3)


def test_rates_and_host_work_are_per_token():
    timed = Timed(tokens=200, seconds=4.0, host_seconds=0.01)
    assert timed.rate == 50
    assert timed.host_microseconds == pytest.approx(50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "--rows must be at least 1"),
        ({"shared_tokens": -1}, "--shared-tokens must be from 0 up"),
        ({"tokens": 31}, "--tokens must be at least 32, four calls of 8, got 31"),
        ({"seed": 2**31}, "--seed must be from 0"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(EngineConfig(**changes))


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path):
    config = EngineConfig(model="random:tiny", shared_tokens=100_000, output=tmp_path / "out")
    with pytest.raises(UserError, match="make 100081 positions, random:tiny has"):
        run(config)
