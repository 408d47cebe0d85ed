"""`python -m experiments search`, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import models
from experiments.harness.errors import UserError
from experiments.search import run as search_run
from experiments.search.command import run
from experiments.search.config import SearchConfig
from jax_chunkattn import chunks_needed
from tests.experiments.results import lines_in


@pytest.mark.slow
def test_a_search_forks_instead_of_computing_again(
    smollm2_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    system_prompt = tmp_path / "system.txt"
    system_prompt.write_text("Answer in one sentence.")
    config = SearchConfig(
        "What is rain?",
        model=str(smollm2_path),
        system_prompt=system_prompt,
        width=2,
        keep=1,
        depth=2,
        tokens=5,
        chunk_size=16,
        output=tmp_path / "out",
    )
    summary = run(config)
    run_record, *branches = lines_in(tmp_path / "out")
    assert [branch["depth"] for branch in branches] == [1, 1, 2, 2]
    assert summary["branches"] == summary["forked"] == 4
    assert summary["prefill_tokens_computed"] == run_record["prompt_tokens"]
    first, second, *deeper = branches
    assert first["tokens"][0] != second["tokens"][0]
    parent = max(first, second, key=lambda branch: branch["score"])
    for branch in deeper:
        assert branch["tokens"][:5] == parent["tokens"]
        assert len(branch["tokens"]) == 10
    best = max(deeper, key=lambda branch: branch["score"])
    others = [branch for branch in (first, second) if branch is not parent]
    assert summary["answer"] in [best["text"], *(branch["text"] for branch in others)]
    assert "best answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "--width must be at least 1"),
        ({"tokens": 1}, "--tokens must be at least 2, got 1: a first branch begins with one"),
        ({"width": 21}, "--width must be at most 20"),
        ({"temperature": 0.0}, "--temperature must be a number above 0"),
        ({"temperature": 1e39}, "--temperature must be a number above 0, at most 3.4e"),
        ({"question": " "}, "--question is empty"),
        ({"model": "random:tiny"}, "random models have none"),
        ({"model": "nothing"}, "unknown model"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(SearchConfig(**values, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt_tokens", [1, 16, 17, 100])
def test_the_pool_has_room_for_all_branches_held_at_once(prompt_tokens: int):
    config = SearchConfig(keep=2, width=3, depth=2, tokens=5, chunk_size=16)
    cache = search_run.cache_of(config, models.load("random:tiny"), prompt_tokens)
    at_once = [range(prompt_tokens)] * 8
    assert cache.num_chunks == chunks_needed(at_once, 10, chunk_size=16) + 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 100_000}, "--tokens 100000 are more than the model's .* positions; lower"),
        ({"depth": 100_000}, "--depth 100000 times --tokens 12 are more"),
        ({"keep": 10**12}, "branches held at once take .* of memory are free; lower --keep"),
        ({"chunk_size": 10**12}, "lower --keep, --width or --chunk-size"),
    ],
)
def test_a_search_that_is_too_large_is_refused_before_anything_is_allocated(
    values: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        search_run.cache_of(SearchConfig(**values), models.load("random:tiny"), 100)
