"""`python -m experiments decode`, small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

import models
from experiments.decode import run as decode_run
from experiments.decode import views as decode_views
from experiments.decode.command import check, headline, run
from experiments.decode.config import DecodeConfig
from experiments.decode.measures import measured
from experiments.decode.points import Point, points_of, series
from experiments.harness.errors import UserError
from experiments.harness.reading import Record, Result, read_result

SMOKE = DecodeConfig(**DecodeConfig.SMOKE)
SMALL = dataclasses.replace(SMOKE, shared_tokens=(256,), max_positions=None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("decode") / "run"
    run(dataclasses.replace(SMALL, output=folder))
    return folder


def untimed(result: Result) -> list[Any]:
    return [table.untimed() for table in decode_views.tables(result)]


@pytest.mark.slow
def test_both_sides_choose_the_same_tokens(finished: Path):
    result = read_result(finished)
    (point,) = result.of_kind("point")
    assert point["equal_rows"] == SMALL.rows
    assert point["sides"]["shared"]["digest"] == point["sides"]["unshared"]["digest"]
    assert point["sides"]["shared"]["kv_bytes"] < point["sides"]["unshared"]["kv_bytes"]
    assert "reads saved" in point["sides"]["shared"]["plan"]
    (answers,) = result.of_kind("tokens")
    assert answers["equal_tokens"] == answers["tokens"] == 4 * SMALL.check_tokens
    assert answers["plans"]["shared"].startswith("shared: ")
    assert answers["plans"]["unshared"].startswith("unshared: ")


@pytest.mark.slow
def test_times_grow_along_a_completion(finished: Path):
    result = read_result(finished)
    (point,) = result.of_kind("point")
    assert point["completions"] == [16, 32]
    for side in point["sides"].values():
        assert len(side["seconds"]) == SMALL.rounds
        assert all(0 < first < second for first, second in side["seconds"])
    assert result.summary is not None
    assert all(value is not None for value in headline(result.summary).values())


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And with one seed, what is measured anew gives the same tables but for times."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (finished / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:2]))

    def no_answers(*_: object) -> Record:
        raise AssertionError("measured again")

    monkeypatch.setattr(decode_run, "_compare_tokens", no_answers)
    run(dataclasses.replace(SMALL, output=folder))
    again, before = read_result(folder), read_result(finished)
    assert untimed(again) == untimed(before)
    assert [table.title for table in decode_views.tables(again)] == [
        "decoding over completion tokens: random:tiny, 8 rows, float32",
        "the engine's answers with and without sharing: random:tiny, float32",
    ]
    assert decode_views.tables(again)[0] != decode_views.tables(before)[0]


def made_up(shared_tokens: int, seconds: dict[str, list[list[float]]], **changes: Any) -> Record:
    point = Point(shared_tokens, 8, 4, 16, 8, (8, 16))
    sides = {
        side: {"seconds": taken, "kv_bytes": 1 << 20, "digest": "", "plan": ""}
        for side, taken in seconds.items()
    }
    record = {"kind": "point", **dataclasses.asdict(point), "sides": sides, "skipped": {}}
    record["operations"] = {"products": 100, "attention": shared_tokens}
    return {**record, "equal_rows": 4, **changes}


def test_a_point_that_does_not_fit_is_skipped_and_said():
    loaded = models.load("random:tiny")
    small = dataclasses.replace(SMALL, study="shared", tokens=16)
    config = dataclasses.replace(small, points=(64, 4096), memory_gb=2e-4)
    fits, too_long = points_of(config).values()
    skips = [decode_run._skip_reasons(config, loaded, point) for point in (fits, too_long)]
    lines = [
        made_up(64, {"shared": [[1.0]]}, completions=[16], skipped=skips[0], equal_rows=None),
        made_up(4096, {}, completions=[16], skipped=skips[1], equal_rows=None),
    ]
    header = {"experiment": "decode", "config": dataclasses.asdict(config)}
    (table,) = decode_views.tables(Result(Path("."), header, lines, None))
    assert table.rows[0][4:6] == ("1.0 MiB", "skipped")
    assert table.rows[1] == ("4,096", "", "", "", "skipped", "skipped", "")
    notes = " ".join(table.notes)
    assert (
        "skipped unshared at 64 shared tokens: its copies take 0.000393 GB beside 0.000164 GB"
        in notes
    )
    assert "skipped shared at 4,096 shared tokens: it takes 4,120 positions" in notes
    tight = dataclasses.replace(config, memory_gb=1e-9)
    assert set(decode_run._skip_reasons(tight, loaded, fits)) == {"shared", "unshared"}


def test_a_study_of_which_nothing_fits_is_refused(tmp_path: Path):
    none = dataclasses.replace(SMALL, memory_gb=1e-5, output=tmp_path / "out")
    with pytest.raises(UserError, match=r"at 256 shared tokens keys and values take .*--memory-gb"):
        run(none)
    assert not (tmp_path / "out").exists()
    loaded = models.load("random:tiny")
    too_long = dataclasses.replace(SMALL, shared_tokens=(2048, 4096))
    with pytest.raises(UserError, match="at 2048 shared tokens it takes 2,088 positions, random"):
        decode_run.check_some_fit(too_long, loaded)
    decode_run.check_some_fit(dataclasses.replace(too_long, shared_tokens=(2048, 64)), loaded)


def test_a_panel_without_a_measured_point_is_drawn():
    config = {**dataclasses.asdict(SMALL), "study": "completion"}
    lines = [made_up(4096, {}), made_up(64, {"shared": [[1.0, 2.0]]})]
    result = Result(Path("."), {"experiment": "decode", "config": config}, lines, None)
    empty, measured = decode_views.figures(result)["decode"].axes
    assert empty.get_legend() is None
    assert measured.get_legend() is not None
    nothing = Result(Path("."), {"experiment": "decode", "config": config}, lines[:1], None)
    [empty] = decode_views.figures(nothing)["decode"].axes
    assert empty.get_legend() is None


def test_rates_and_ratios_follow_from_the_seconds():
    seconds = {"shared": [[1.0, 2.0], [1.0, 4.0]], "unshared": [[2.0, 8.0], [4.0, 8.0]]}
    first, second = measured("completion", [made_up(32, seconds)])
    assert (first.x, second.x) == (8, 16)
    assert first.rates["shared"].median == 4 * 8 / 1.0
    assert (second.rates["shared"].least, second.rates["shared"].most) == (16.0, 32.0)
    assert first.ratio is not None
    assert second.ratio is not None
    assert (first.ratio.median, first.ratio.least, first.ratio.most) == (3.0, 2.0, 4.0)
    assert second.ratio.median == 3.0


def test_the_loss_over_the_longest_prefix_is_told():
    config = {**dataclasses.asdict(SMALL), "study": "shared", "tokens": 8}
    lines = [
        made_up(shared, {"shared": [[taken]], "unshared": [[2 * taken]]}, completions=[8])
        for shared, taken in ((0, 1.0), (1024, 1.0), (16_384, 1.25))
    ]
    result = Result(Path("."), {"experiment": "decode", "config": config}, lines, None)
    _, flatness = decode_views.tables(result)
    assert flatness.rows[0] == ("shared", "1,024", "16,384", "20.0%")
    assert "1.6e+02 operations" in flatness.notes[0]
    labels = decode_views.figures(result)["decode"].axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["15% less (Hydragen, A100)", "shared", "unshared"]


def test_no_panel_cuts_off_a_rate():
    config = {**dataclasses.asdict(SMALL), "study": "completion"}
    lines = [
        made_up(shared, {"shared": [[1.0 / rate, 2.0 / rate]]})
        for shared, rate in ((32, 1.0), (64, 9.0))
    ]
    result = Result(Path("."), {"experiment": "decode", "config": config}, lines, None)
    low, high = decode_views.figures(result)["decode"].axes
    assert low.get_title() == "32 shared tokens"
    assert low.get_ylim() == high.get_ylim()
    assert low.get_ylim()[0] == 0
    assert high.get_ylim()[1] > 9 * 4 * 8


@pytest.mark.parametrize("study", ["completion", "batch", "shared", "chunk-size", "steps"])
def test_every_study_varies_what_it_says(study: Any):
    config = DecodeConfig(study=study)
    check(config)
    points = list(points_of(config).values())
    fields = ("shared_tokens", "rows", "chunk_size", "steps_per_call", "completions")
    different = {name for name in fields if len({getattr(one, name) for one in points}) > 1}
    expected = {
        "completion": {"shared_tokens"},  # one point takes all times along its way
        "batch": {"rows"},
        "shared": {"shared_tokens"},
        "chunk-size": {"chunk_size"},
        "steps": {"steps_per_call"},
    }
    assert different == expected[study]


@pytest.mark.parametrize("study", get_args(get_type_hints(DecodeConfig)["study"]))
def test_every_study_has_a_small_form(study: Any):
    config = dataclasses.replace(SMOKE, study=study)
    check(config)
    assert config.max_positions is not None
    assert max(point.positions for point in points_of(config).values()) <= config.max_positions


def test_the_shared_lengths_of_a_study_are_halved_to_fit():
    config = DecodeConfig(own_tokens=16, points=(128,))
    assert series(config) == (1024, 2048, 4096)
    assert series(dataclasses.replace(config, max_positions=2048 + 144)) == (1024, 2048)
    assert series(dataclasses.replace(config, max_positions=1024)) == (512,)
    assert series(dataclasses.replace(config, max_positions=1)) == (0,)
    typed = dataclasses.replace(config, max_positions=1024, shared_tokens=(4096,))
    assert series(typed) == (4096,)


def test_rows_share_whole_chunks_only():
    point = Point(40, 8, rows=3, chunk_size=16, steps_per_call=8, completions=(16,))
    tables = np.array(point.tables())
    assert tables.shape == (3, point.columns) == (3, 4)
    assert (tables[:, :2] == [0, 1]).all()
    assert sorted(tables[:, 2:].ravel()) == list(range(2, point.num_chunks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": (0, 8)}, "--points must be at least 1"),
        ({"points": (8, 8)}, "--points must be different numbers"),
        ({"points": (12,)}, "12 tokens are no multiple of 8 steps a call"),
        ({"study": "shared", "shared_tokens": (256,)}, "give them as --points"),
        ({"sides": ("shared", "shared")}, "each once, got shared shared"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"memory_gb": 0.0}, "--memory-gb must be a number above 0"),
        ({"shared_tokens": (-1,)}, "--shared-tokens must be different numbers from 0 up"),
    ],
)
def test_what_no_run_could_use_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(SMALL, **changes))
