"""`python -m experiments minor`: what is dropped when, against the definition, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.errors import UserError
from experiments.minor.command import headline, run
from experiments.minor.config import MinorConfig, check
from experiments.minor.dropping import drop_times, shares
from experiments.minor.run import MEASURES
from experiments.minor.views import tables
from models.dense_attention import (
    attention_scores,
    attention_weights,
    dense_attend,
    empty_pool,
    visible_tokens,
)
from tests.experiments.results import lines_in, read_result, text_of
from tests.jax_chunkattn.toy import toy_model, windowed_model

TOKENS = np.random.default_rng(0).integers(0, 256, 70).tolist()


def weights_of(model, tokens) -> np.ndarray:
    """Of each query, by layer and query head: `[L, Hq, T, T]`."""
    spec, length = model.cache_spec, len(tokens)
    positions = jnp.arange(length, dtype=jnp.int32)
    plain = dense_attend(positions, spec)

    def attend(pool, layer, q, k, v):
        cache, found = pool
        visible = visible_tokens(spec, layer, positions, length)
        weights = attention_weights(attention_scores(spec, q, k), visible)
        out, cache = plain(cache, layer, q, k, v)
        return out, (cache, found.at[layer].set(weights))

    found = jnp.zeros((spec.num_layers, spec.num_heads, length, length))
    pool = empty_pool(spec, length), found
    _, (_, found) = model(jnp.asarray(tokens, jnp.int32), positions, pool, attend)
    return np.asarray(found)


def dropped_at(important: np.ndarray, key: int, recent: int) -> int:
    """By the definition, query by query; `important` is `[T, T]`."""
    for query in range(key + recent, len(important)):
        if not important[query - recent + 1 : query + 1, key].any():
            return query
    return len(important)


def test_keys_are_dropped_when_no_recent_query_found_them_important():
    model, recent = toy_model(), (5, 20)
    by_query, by_kv = drop_times(model, TOKENS, recent)
    means = 1 / np.arange(1, len(TOKENS) + 1)
    important = np.array(weights_of(model, TOKENS) >= means[:, None])
    spec = model.cache_spec
    layers, group = spec.num_layers, spec.num_heads // spec.num_kv_heads
    by_group = important.reshape(layers, spec.num_kv_heads, group, *important.shape[2:])
    together = np.array(by_group.any(axis=2))
    for found, heads in ((by_query, important), (by_kv, together)):
        expected = [
            [
                [[dropped_at(head, key, number) for key in range(len(TOKENS))] for head in layer]
                for layer in heads
            ]
            for number in recent
        ]
        np.testing.assert_array_equal(found, expected)
        assert 0.1 < (found < len(TOKENS)).mean() < 0.9
    # What a KV head drops, each query head that reads it has dropped before.
    assert (by_query <= np.repeat(by_kv, group, axis=2)).all()


def test_shares_are_of_what_every_query_would_read():
    """Ten tokens in two heads, in units of two from the third on; queries from the fifth on."""
    times = np.full((2, 10), 10)
    times[0, 2:6] = 7, 6, 6, 10  # the first unit at 7, the second never
    times[1, :4] = 4, 4, 5, 8  # the first unit at 8
    found = shares(times, 2, first=2, begin=4)
    # A head's units are there for 6, 6, 4 and 2 queries.
    assert found["reads"] == pytest.approx((3 + 2) / (2 * 18))
    assert found["end"] == pytest.approx(2 / 8)
    by_token = shares(times, 1, first=0, begin=4)
    queries = 2 * (5 * 6 + 5 + 4 + 3 + 2 + 1)
    assert by_token["reads"] == pytest.approx((3 + 4 + 4 + 6 + 6 + 5 + 2) / queries)
    assert by_token["end"] == pytest.approx(7 / 20)


def test_a_model_with_windows_is_refused():
    with pytest.raises(ValueError, match="windows, which drop keys"):
        drop_times(windowed_model(), TOKENS, (5,))


@pytest.mark.slow  # its smoke form is one of the README's commands
def test_answers_are_decoded_once_and_each_is_measured(tmp_path: Path):
    small: dict[str, Any] = {**MinorConfig.SMOKE, "recent": (4, 8), "chunk_sizes": (8, 16)}
    summary = run(MinorConfig(**small, output=tmp_path))
    answers, *rows = lines_in(tmp_path)[1:]
    assert [len(answer) for answer in answers["answers"]] == [40, 40]
    assert [row["tokens"] - row["prompt_tokens"] for row in rows] == [39, 39]
    assert summary["shared_tokens"] > 500
    sizes = [(one["recent"], one["chunk_size"]) for one in summary["measured"]]
    assert sizes == [(4, 8), (4, 16), (8, 8), (8, 16)]
    for one in summary["measured"]:
        for when in ("reads", "end"):
            found = [one[name][when] for name in MEASURES[1:]]
            assert 0 < found[0] < 1
            assert found[1:] == sorted(found[1:], reverse=True)  # more must agree
    assert headline(summary).keys() == {"tokens of heads", "chunks of layers"}
    assert "chunks in layers" in text_of(tables(read_result(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "--rows"),
        ({"recent": ()}, "--recent takes one or more, each once; got none"),
        ({"chunk_sizes": (16, 16)}, "--chunk-sizes takes one or more, each once; got 16 16"),
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        check(MinorConfig(**options))
