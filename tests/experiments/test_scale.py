"""`python -m experiments scale`, small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.reading import read_result
from experiments.scale import command
from experiments.scale.command import headline, run
from experiments.scale.config import ScaleConfig, check
from experiments.scale.views import tables
from tests.experiments.results import text_of


@pytest.mark.slow
def test_fleets_answer_as_one_engine_though_an_actor_is_killed(tmp_path: Path):
    pytest.importorskip("ray")
    summary = run(ScaleConfig(**ScaleConfig.SMOKE, output=tmp_path / "out"))
    assert summary["different"] == 0
    [one], [kill] = summary["rounds"], summary["kills"]
    assert one["hit_rate"] > 0.2
    assert kill["moved"] > 0 < kill["pause"]
    assert headline(summary)["tokens found"] == one["hit_rate"]
    shown = text_of(tables(read_result(tmp_path / "out")))
    assert "1 actors were lost and replaced" in shown


def test_an_answer_that_differs_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from experiments.scale import run as scale_run

    monkeypatch.setattr(command, "check_installed", lambda: None)
    monkeypatch.setattr(scale_run, "measure", lambda *_: {"different": 2})
    with pytest.raises(CheckFailed, match="2 answers"):
        run(ScaleConfig(model="random:tiny", output=tmp_path / "out"))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jax_chunkattn\[ray\]"):
        run(ScaleConfig())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"replicas": ()}, "--replicas must name some"),
        ({"policies": ("random", "random")}, "each once"),
        ({"policies": ("best",)}, "unknown 'best'"),
        ({"kills": -1}, "--kills"),
        ({"pool_tokens": 700}, "two requests"),
    ],
    ids=["none", "twice", "unknown", "kills", "pool"],
)
def test_what_no_run_could_use_is_refused(how: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(ScaleConfig(**how))
