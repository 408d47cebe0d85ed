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
from jax_chunkattn import SearchTree, chunks_needed
from tests.experiments.results import lines_in
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine
from tests.jax_chunkattn.toy import token_tree


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


class Recorder:
    """What the search needs of a folder for results."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write_record(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Bytes(BytePairs):
    """A tokenizer, some of whose tokens end answers."""

    stop_ids = tuple(range(0, 256, 20))


def grown(**values: Any) -> tuple[SearchTree, list[dict[str, Any]]]:
    """The tree of a search with a toy model, and what it has recorded."""
    engine, recorder = make_engine(), Recorder()
    config = SearchConfig(**{"width": 3, "keep": 2, "depth": 4, "tokens": 5, **values})
    tree = search_run.grow(engine, token_tree((1, 44))[0], config, Bytes(), recorder)  # type: ignore[arg-type]
    assert_all_returned(engine)
    return tree, recorder.records


@pytest.mark.parametrize("values", [{}, {"keep": 1}, {"temperature": 1.5}], ids=str)
def test_at_each_depth_the_best_that_have_not_stopped_go_on(values: dict[str, Any]) -> None:
    tree, records = grown(**values)
    keep = values.get("keep", 2)
    assert len({tree.answer(node)[0] for node in tree.children_of(0)}) == 3
    for depth in range(1, int(tree.depths.max()) + 1):
        level = [node for node in range(tree.num_nodes) if tree.depths[node] == depth]
        running = [node for node in level if not tree.stopped[node]]
        best = sorted(running, key=lambda node: -tree.raw_values[node])[:keep]
        going_on = [node for node in level if tree.children_of(node)]
        assert sorted(going_on) == (sorted(best) if depth < 4 else [])
        assert all(len(tree.children_of(node)) == 3 for node in going_on)
        assert all(len(tree.answer(node)) == 5 * depth for node in running)
        for node in level:
            assert (tree.answer(node)[-1] in Bytes.stop_ids) == tree.stopped[node]
    assert [record["depth"] for record in records] == tree.depths[1:].tolist()
    for node, record in enumerate(records, 1):
        tokens, stopped = tree.answer(node), bool(tree.stopped[node])
        logprobs = tree.answer_logprobs(node)
        assert (record["tokens"], record["stopped"]) == (list(tokens), stopped)
        assert record["text"] == Bytes().decode(tokens[: len(tokens) - stopped])
        assert record["score"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)


def test_the_seed_decides_the_branches() -> None:
    (tree, _), (same, _), (other, _) = (grown(seed=seed) for seed in (0, 0, 1))
    answers = [[one.answer(node) for node in range(one.num_nodes)] for one in (tree, same, other)]
    assert answers[0] == answers[1] != answers[2]


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
