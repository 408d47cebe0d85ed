"""Head patterns: what they choose, their files, and what a model with one computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
from jax_chunkattn.device.model_interface import CacheSpec
from models import HeadPatternError
from models.head_patterns import (
    HeadPattern,
    load_pattern,
    read_pattern,
    with_pattern,
    write_pattern,
)
from pallas_kernels.windows import Window, WindowMap
from tests.jax_chunkattn.toy import toy_model

SCORES = [[0.2, 0.9], [0.4, 0.9]]
PATTERN = HeadPattern.of(SCORES, sinks=3, recent=10)
SPEC = CacheSpec(2, 2, 16, 4)
STREAMING = Window(10, sinks=3)


def kept(pattern: HeadPattern, share: float) -> list[list[bool]]:
    return pattern.retrieval_heads(share).tolist()


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, [[False, False], [False, False]]),
        (0.25, [[False, True], [False, False]]),
        (0.5, [[False, True], [False, True]]),
        (0.75, [[False, True], [True, True]]),
        (1, [[True, True], [True, True]]),
    ],
)
def test_the_share_with_the_highest_scores_keeps_all_tokens(share, expected):
    assert kept(PATTERN, share) == expected


@pytest.mark.parametrize("shape", [(30, 3), (32, 8), (3, 1), (1, 7)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9])
def test_different_scores_are_divided_at_their_quantile(shape, share):
    """As published: at least the quantile of one minus the share."""
    scores = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) / np.prod(shape)
    threshold = np.quantile(scores, 1 - share)
    expected = scores >= threshold - 1e-12
    np.testing.assert_array_equal(HeadPattern.of(scores).retrieval_heads(share), expected)


def test_of_equal_scores_the_first_are_taken_and_no_more():
    zeros = HeadPattern.of(np.zeros((4, 2)))
    assert kept(zeros, 0.5) == [[True, True], [True, True], [False, False], [False, False]]
    half = HeadPattern.of([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert kept(half, 0.5) == [[True, True], [True, False], [True, False], [False, False]]


def test_windows_are_of_the_others():
    windows = PATTERN.windows(SPEC, 0.5)
    assert windows == WindowMap((STREAMING, None), ((0, 1), (0, 1)))
    assert PATTERN.windows(SPEC, 1) is None
    assert PATTERN.windows(SPEC, 0) == WindowMap((STREAMING,), ((0, 0), (0, 0)))


def test_heads_with_a_window_of_the_model_keep_it_and_are_not_counted():
    own = Window(5)
    spec = replace(SPEC, windows=WindowMap.of([[own, None], [None, own]]))
    assert PATTERN.windows(spec, 1) == spec.windows
    assert PATTERN.windows(spec, 0.5) == WindowMap.of([[own, None], [STREAMING, own]])
    assert PATTERN.windows(spec, 0) == WindowMap.of([[own, STREAMING], [STREAMING, own]])


def test_bytes_are_of_what_is_seen():
    spec = replace(SPEC, windows=PATTERN.windows(SPEC, 0.5))
    assert SPEC.values_seen(100) == SPEC.values_per_token * 100
    assert spec.values_seen(100) == 2 * 16 * (2 * 100 + 2 * 13)
    assert spec.values_seen(7) == SPEC.values_seen(7)


def test_a_model_with_all_of_its_heads_is_the_same():
    model = with_pattern(toy_model(), PATTERN, 1)
    assert model.cache_spec == toy_model().cache_spec
    assert model.embedding[...] is toy_model().embedding[...]


def test_a_model_with_a_pattern_has_other_windows_and_the_same_weights():
    model = with_pattern(toy_model(), PATTERN, 0.5)
    assert model.cache_spec.windows == PATTERN.windows(SPEC, 0.5)
    assert toy_model().cache_spec.windows is None
    assert model.embedding[...] is toy_model().embedding[...]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: HeadPattern(()), "as many KV heads in every layer"),
        (lambda: HeadPattern.of([[]]), "as many KV heads in every layer"),
        (lambda: HeadPattern.of([[0.1], [0.1, 0.2]]), "as many KV heads in every layer"),
        (lambda: HeadPattern.of([[0.1, 1.5]]), "numbers from 0 to 1, got 1.5"),
        (lambda: HeadPattern.of([[0.1, np.nan]]), "got nan"),
        (lambda: HeadPattern.of(SCORES, sinks=-1), "got -1 and 256"),
        (lambda: HeadPattern.of(SCORES, recent=0), "got 64 and 0"),
        (lambda: PATTERN.retrieval_heads(1.1), "from 0 to 1, got 1.1"),
        (lambda: PATTERN.windows(SPEC, float("nan")), "from 0 to 1, got nan"),
        (
            lambda: with_pattern(toy_model(), HeadPattern.of(np.zeros((3, 2))), 0.5),
            "another model: it is of 3 layers of 2 KV heads, and the model has 2 of 2",
        ),
    ],
)
def test_what_no_model_can_use_is_refused(wrong, words):
    with pytest.raises(HeadPatternError, match=words):
        wrong()


def test_a_pattern_is_read_as_it_was_written(tmp_path: Path):
    scores = np.random.default_rng(2).random((2, 2)).astype(np.float32)
    pattern = HeadPattern.of(scores, sinks=4, recent=32)
    folder = tmp_path / "patterns" / "scored"
    write_pattern(folder, pattern, toy_model(), {"made_by": "a test"})
    assert load_pattern(folder, toy_model()) == pattern
    assert load_pattern(folder / "full_attention_heads.tsv", toy_model()) == pattern
    assert json.loads((folder / "config.json").read_text())["made_by"] == "a test"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "full_attention_heads.tsv",
    ]
    half_precision = models.load("random:tiny", dtype="bfloat16").model
    assert load_pattern(folder, half_precision) == pattern
    with pytest.raises(HeadPatternError, match="another model of the same sizes"):
        load_pattern(folder, models.load("random:tiny", seed=1).model)


def publish(folder: Path, table: str, **config) -> Path:
    """A folder as DuoAttention's repository has them."""
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text(table)
    sizes = {"lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": None, **config}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


PUBLISHED = (
    "9.960937500000000000e-01\t-5.340576171875000000e-04\n"
    "1.003906250000000000e+00\t2.490234375000000000e-02\n"
)


def test_a_published_pattern_is_read(tmp_path: Path):
    """Its gates may be a little outside of what they are taken for, and it names no weights."""
    pattern = load_pattern(publish(tmp_path, PUBLISHED), toy_model())
    assert pattern == HeadPattern(((0.99609375, 0.0), (1.0, 0.02490234375)), 128, 256)
    assert load_pattern(tmp_path, models.load("random:tiny", seed=1).model) == pattern


@pytest.mark.parametrize(
    ("table", "config", "words"),
    [
        ("0.5\t0.5\n0.5\n", {}, "as many KV heads in every layer"),
        ("0.5\tx\n0.5\t1\n", {}, r"line 1 of full_attention_heads.tsv .* got '0.5\\tx'"),
        ("0.5\t0.5\n0.5\tnan\n", {}, "line 2 of"),
        ("0.5\t0.5\n0.5\tinf\n", {}, "line 2 of"),
        ("0.5\t0.5\n-3\t0\n", {}, "line 2 of"),
        ("0.5 0.5\n", {}, "line 1 of"),
        ("", {}, "as many KV heads in every layer"),
        (PUBLISHED, {"sink_size": -1}, "sink_size of config.json .* got -1"),
        (PUBLISHED, {"recent_size": "256"}, "recent_size of config.json .* got '256'"),
        (PUBLISHED, {"recent_size": 0}, "got 128 and 0"),
        (PUBLISHED, {"recent_size": 2**40}, "recent_size of config.json"),
        (PUBLISHED, {"embedding_signature": ["a"]}, "embedding_signature of config.json"),
        (PUBLISHED, {"embedding_signature": []}, "embedding_signature of config.json"),
        (PUBLISHED, {"embedding_signature": [0.5]}, "another model of the same sizes"),
        (PUBLISHED * 2, {}, "another model: it is of 4 layers of 2 KV heads"),
        ("1\t1\t1\n1\t1\t1\n", {}, "it is of 2 layers of 3 KV heads"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, table, config, words):
    folder = publish(tmp_path, table, **config)
    with pytest.raises(HeadPatternError, match=words) as error:
        load_pattern(folder, toy_model())
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_not_of_a_pattern_are_refused(tmp_path: Path):
    with pytest.raises(HeadPatternError, match=r"full_attention_heads\.tsv \(No such file"):
        read_pattern(tmp_path / "nothing")
    folder = publish(tmp_path / "one", PUBLISHED)
    for text in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(HeadPatternError, match="has no head pattern"):
            read_pattern(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HeadPatternError, match=r"config\.json \(No such file"):
        read_pattern(folder)
    (publish(tmp_path / "two", "") / "full_attention_heads.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HeadPatternError, match="has no head pattern"):
        read_pattern(tmp_path / "two")
