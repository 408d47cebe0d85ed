"""Tree search over forks against a plain search over a model without a cache."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from jax_chunkattn import (
    Beam,
    BestFirst,
    Continuations,
    NextTokens,
    Puct,
    SamplingParams,
    Selected,
    tree_search,
)
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.plain_search import PlainSearch, Spans
from tests.jax_chunkattn.toy import (
    greedy_without_cache,
    log_probabilities_without_cache,
    token_tree,
)

PROMPT = token_tree((1, 44))[0]


def make(num_chunks: int = 200, **options):
    return make_engine(num_chunks, **{"prefill_tokens": 32, "max_running": 4, **options})


def mean(tokens, logprobs) -> float:
    return sum(logprobs) / len(logprobs)


def reward(tokens, logprobs) -> float:
    """As a verifier that knows nothing of probabilities, and finds answers of equal value."""
    return sum(tokens) % 5 / 5 + len(tokens) / 50


def evaluation(value):
    return lambda nodes: [value(node.tokens, node.logprobs) for node in nodes]


def assert_same(tree, plain: PlainSearch) -> None:
    """Children, visits and answers exactly, numbers to 1e-5."""
    nodes = plain.nodes
    index = {id(node): number for number, node in enumerate(nodes)}
    assert tree.num_nodes == len(nodes)
    for number, node in enumerate(nodes):
        assert tree.children_of(number) == [index[id(child)] for child in node.children]
        assert tree.answer(number) == node.tokens
    assert tree.visits.tolist() == [node.n for node in nodes]
    assert tree.depths.tolist() == [node.depth for node in nodes]
    assert tree.ends.tolist() == np.cumsum([node.edge for node in nodes]).tolist()
    for found, expected in (
        (tree.raw_values, [node.raw for node in nodes]),
        (tree.values, [node.mean for node in nodes]),
        (tree.priors, [node.prior for node in nodes]),
        (tree.logprobs, [one for node in nodes[1:] for one in node.logprobs[-node.edge :]]),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def commonest(count: int) -> tuple[int, ...]:
    """Likely tokens, which end answers as stop tokens."""
    return tuple(
        np.argsort(-log_probabilities_without_cache(tuple(PROMPT)))[1 : 1 + count].tolist()
    )


LIMITS = [{}, {"max_tokens": 3}, {"max_depth": 2}, {"stops": 2, "max_tokens": 5}]


def options_of(limits: dict[str, int]) -> dict[str, Any]:
    """The limits, whose `stops` are so many likely tokens."""
    rest = {name: value for name, value in limits.items() if name != "stops"}
    return rest | ({"stop_tokens": commonest(limits["stops"])} if "stops" in limits else {})


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("spans", "value", "exploration"),
    [(Spans(3), mean, 1.25), (Spans(2, more=2), reward, 0.3), (Spans(4), reward, 3.0)],
    ids=["tokens", "spans", "wide"],
)
def test_puct_grows_the_tree_of_a_search_without_a_cache(spans, value, exploration, limits):
    engine = make(stop_tokens=[commonest(1)[0]])  # the engine's own do not count
    tree = tree_search(
        engine,
        PROMPT,
        expand=spans,
        evaluate=evaluation(value),
        select=Puct(exploration),
        num_simulations=14,
        **options_of(limits),
    )
    plain = PlainSearch(PROMPT, spans, value, exploration, **options_of(limits))
    plain.puct(14 if tree.expandable.any() else exhausted_after(tree))
    assert_same(tree, plain)
    assert_all_returned(engine)


def exhausted_after(tree) -> int:
    """Simulations after which nothing was left to expand: its leaves were visited once more."""
    expanded = sum(bool(tree.children_of(node)) for node in range(tree.num_nodes))
    return expanded + int(tree.visits[0]) - (tree.num_nodes - 1)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("limits", [LIMITS[0], LIMITS[3]], ids=str)
def test_best_first_and_beam_grow_the_trees_of_searches_without_a_cache(seed, limits):
    prompt, spans = token_tree((1, 30), seed=seed)[0], Spans(3)
    engine = make()
    search = partial(tree_search, engine, prompt, expand=spans, **options_of(limits))
    plain = PlainSearch(prompt, spans, mean, **options_of(limits))
    plain.best_first(12)
    assert_same(search(select=BestFirst(), num_simulations=12), plain)
    plain = PlainSearch(prompt, spans, mean, **options_of(limits))
    plain.beam(2, 4)
    assert_same(search(select=Beam(2), num_simulations=7), plain)
    assert_all_returned(engine)


def test_next_tokens_have_the_priors_that_the_model_gives_them():
    tree = tree_search(make(), PROMPT, expand=NextTokens(3), num_simulations=8)
    plain = PlainSearch(PROMPT, Spans(3), mean)
    plain.puct(8)
    assert_same(tree, plain)
    assert tree.priors[tree.children_of(0)].sum() == pytest.approx(1)


def test_the_fields_agree_with_one_another():
    tree = tree_search(
        make(), PROMPT, expand=Continuations(3, 4), num_simulations=20, max_tokens=11
    )
    assert tree.parents[0] == tree.actions[0] == -1
    for node in range(tree.num_nodes):
        below = tree.children_of(node)
        if below:
            assert tree.visits[node] == tree.visits[below].sum() + (node != 0)
        for action, child in enumerate(below):
            assert (tree.parents[child], tree.actions[child]) == (node, action)
            assert tree.depths[child] == tree.depths[node] + 1
            assert tree.answer(child)[: len(tree.answer(node))] == tree.answer(node)
            assert tree.path(child) == [*tree.path(node), child]
        if node:
            logprobs = tree.answer_logprobs(node)
            assert tree.raw_values[node] == pytest.approx(mean(tree.answer(node), logprobs))
            assert len(logprobs) == len(tree.answer(node)) <= 11
    shares = tree.visit_distribution()
    assert shares.tolist() == (tree.visits[tree.children_of(0)] / (tree.visits[0])).tolist()
    best = tree.best()
    assert not tree.children_of(best)
    assert tree.raw_values[best] == max(
        tree.raw_values[node] for node in range(tree.num_nodes) if not tree.children_of(node)
    )


def test_sampled_continuations_differ_and_can_be_repeated():
    def search(seed):
        expand = Continuations(3, 5, SamplingParams(temperature=1.5, seed=seed))
        engine = make()
        tree = tree_search(engine, PROMPT, expand=expand, num_simulations=6)
        assert engine.stats.prefill_tokens == len(PROMPT)
        assert engine.stats.forks == tree.num_nodes - 1
        return [tree.answer(node) for node in range(tree.num_nodes)]

    answers = search(0)
    assert len(set(answers)) == len(answers) == 19
    assert answers == search(0)
    assert answers[:1] == search(1)[:1]
    assert answers[1:] != search(1)[1:]


def test_one_child_without_randomness_is_greedy_decoding():
    tree = tree_search(make(), PROMPT, expand=NextTokens(1), num_simulations=9, max_tokens=8)
    assert list(tree.answer(tree.best())) == greedy_without_cache(PROMPT, 8)
    assert tree.num_nodes == 9, "it goes on when nothing is left to expand"


def test_nodes_selected_together_decode_in_one_batch():
    """With virtual losses several descents find several leaves."""
    calls = {}
    for batch in (1, 2):
        engine = make()
        select = Puct(batch=batch)
        tree = tree_search(engine, PROMPT, expand=NextTokens(2), select=select, num_simulations=21)
        assert tree.num_nodes == 1 + 2 * 21
        assert tree.visits[0] == 2 * 21
        calls[batch] = engine.stats.calls
        assert_all_returned(engine)
    assert calls[2] < 0.7 * calls[1]


def test_a_selection_may_be_any_function():
    """UCT of Kocsis and Szepesvári, descending one node after another."""

    def uct(tree):
        node = 0
        while children := tree.children_of(node):
            bonus = np.sqrt(2 * math.log(tree.visits[node]) / tree.visits[children])
            node = children[int(np.argmax(tree.values[children] + bonus))]
        return Selected([node])

    tree = tree_search(make(), PROMPT, expand=NextTokens(2), select=uct, num_simulations=15)
    assert tree.num_nodes == 31
    assert tree.visits[0] == 30


def test_an_expansion_may_give_a_node_no_children():
    class OnlyTwoLevels(NextTokens):
        def candidates(self, node):
            return super().candidates(node) if node.depth < 2 else []

    engine = make()
    tree = tree_search(engine, PROMPT, expand=OnlyTwoLevels(2), num_simulations=30)
    assert tree.num_nodes == 7
    assert tree.visits[0] > 6, "what has no children is visited again"
    assert_all_returned(engine)

    class Nothing(NextTokens):
        def candidates(self, node):
            return []

    tree = tree_search(engine, PROMPT, expand=Nothing(2), num_simulations=30)
    assert (tree.num_nodes, tree.best(), tree.visits[0]) == (1, 0, 0)
    assert tree.visit_distribution().tolist() == [0]
    assert_all_returned(engine)


def test_stopped_answers_come_before_others():
    stops = commonest(2)
    tree = tree_search(make(), PROMPT, expand=NextTokens(4), num_simulations=6, stop_tokens=stops)
    stopped = [node for node in range(tree.num_nodes) if tree.stopped[node]]
    assert stopped
    assert all(tree.answer(node)[-1] in stops for node in stopped)
    assert not any(tree.expandable[stopped])
    assert tree.best() == max(stopped, key=lambda node: tree.raw_values[node])


@pytest.mark.parametrize("levels", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_deep_tree(levels):
    """Five children at each level, of which the best goes on: a thousand nodes in all of 200."""
    engine = make()
    tree = tree_search(
        engine,
        PROMPT,
        expand=NextTokens(5),
        select=Beam(1),
        num_simulations=2 * levels,
        max_tokens=2 * levels,
        max_depth=levels,
    )
    assert tree.num_nodes == 1 + 5 * levels
    assert tree.depths.max() == levels
    last = tree.num_nodes - 1
    assert len(tree.path(last)) == 1 + len(tree.answer(last)) == 1 + levels
    stats = engine.stats
    assert stats.prefill_tokens == len(PROMPT)
    assert stats.most_chunks_in_use < 40
    assert_all_returned(engine)


@pytest.mark.slow
def test_a_pool_too_small_for_all_leaves_grows_the_same_tree():
    """Held ones give way, to one another and to another request, and are computed again."""
    other = token_tree((1, 30), seed=4)[0]
    engine = make(num_chunks=10)
    handle = engine.submit(other, SamplingParams(60))
    tree = tree_search(engine, PROMPT, expand=Spans(3), num_simulations=12)
    plain = PlainSearch(PROMPT, Spans(3), mean)
    plain.puct(12)
    assert_same(tree, plain)
    assert engine.stats.forks < tree.num_nodes - 2, "nothing was ever dropped"
    assert run([handle]) == [greedy_without_cache(other, 60)]
    assert_all_returned(engine)
