"""What a run shows and sums up: tables, picture, summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.generate import views as generate_views
from experiments.generate.config import GenerateConfig
from experiments.generate.summary import (
    THIS_RUN,
    measured_of,
    measured_record,
    request_record,
    setting_of,
    summarise,
)
from experiments.generate.views import comparison_figure
from experiments.harness.plotting import save_figures
from experiments.harness.tables import format_bytes
from experiments.prompts import PromptLine, PromptSet
from tests.experiments.results import make_result, text_of

MakeMeasured = Callable[..., Any]


@pytest.fixture
def unshared(make_measured: MakeMeasured) -> Any:
    return make_measured(
        batch=4,
        sharing=False,
        shared_tokens=0,
        prefill_tokens_computed=800,
        prefill_tokens_reused=0,
        prefill_seconds=8.0,
        decode_tokens=80,
        decode_seconds=2.0,
        answers=((1, 2), (3, 5)),
    )


def test_answers_are_in_order_and_in_a_line_each() -> None:
    lines = [
        {"index": 1, "prompt": None, "prompt_tokens": 7, "text": None, "tokens": [5, 6]},
        {"index": 0, "prompt": "why [bold]?", "text": "one\ntwo [/end]", "tokens": [1]},
    ]
    assert generate_views.answers(lines).rows == [
        ("0", "why [bold]?", "one two [/end]"),
        ("1", "(7 token ids)", "5 6"),
    ]


def test_sharing_table(make_measured: MakeMeasured) -> None:
    text = text_of([generate_views.sharing(make_measured())])
    for expected in ("1,000", "4,000", "75.0%", "1.0 MiB", "8.0 MiB", "87.5%", "32 requests"):
        assert expected in text


def test_speed_table_names_both_batches(make_measured: MakeMeasured, unshared: Any) -> None:
    table = generate_views.speed(make_measured(), unshared, {"load": 1.0})
    assert table.rows[0] == ("requests", "32", "4", "")
    assert table.rows[1][3] == "20.00 x"  # prompts: 2,000 against 100 tokens a second
    assert table.rows[3][3] == "3.00 x"  # decode: 120 against 40 tokens a second
    assert "different batches" in table.notes[0]
    assert table.timed_notes == ("phases: load 1.0 s",)
    assert [len(row) for row in table.untimed().rows] == [1] * 4


def test_speed_table_without_comparison(make_measured: MakeMeasured) -> None:
    assert generate_views.speed(make_measured(), None, {}).rows[0][2] == "not run"


def test_all_comes_from_the_lines(make_measured: MakeMeasured, unshared: Any) -> None:
    request = {
        "kind": "request",
        "index": 0,
        "prompt": "q",
        "text": "a",
        "tokens": [1],
        "of_unit": THIS_RUN,
    }
    lines = [request, measured_record(make_measured()), measured_record(unshared)]
    result = make_result("generate", json.loads(json.dumps(lines)), {}, {"model": "m"})
    assert measured_of(result.lines[1]) == make_measured()
    text = text_of(generate_views.tables(result))
    assert "| 0 | q | a |" in text
    assert "3.00 x" in text
    picture = generate_views.figures(result)["picture"]
    assert picture.get_suptitle() == "m on cpu, 2,048 shared tokens"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.00 GiB")]
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_figure_shows_both_sides_with_units(make_measured: MakeMeasured, unshared: Any) -> None:
    rate, memory = comparison_figure("title", make_measured(), unshared).axes
    assert [bar.get_height() for bar in rate.patches] == pytest.approx([120.0, 40.0])  # pyright: ignore
    assert [bar.get_height() for bar in memory.patches] == pytest.approx([1.0, 8.0])  # pyright: ignore
    assert (rate.get_ylabel(), memory.get_ylabel()) == ("tokens per second", "MiB")
    names = [label.get_text() for label in rate.get_xticklabels()]
    assert "batch 32" in names[0]
    assert "batch 4" in names[1]
    first, second = rate.patches
    assert first.get_facecolor() != second.get_facecolor()
    assert first.get_hatch() != second.get_hatch()


@pytest.mark.parametrize("compared", [True, False])
def test_picture_is_drawn_the_same_each_time(
    tmp_path: Path, make_measured: MakeMeasured, unshared: Any, compared: bool
) -> None:
    from matplotlib.image import imread

    def draw(name: str) -> Path:
        (tmp_path / name).mkdir()
        figure = comparison_figure("title", make_measured(), unshared if compared else None)
        [path] = save_figures(tmp_path / name, {"picture": figure})
        return path

    path, again = draw("a"), draw("b")
    for suffix in (".png", ".svg"):
        assert path.with_suffix(suffix).read_bytes() == again.with_suffix(suffix).read_bytes()
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 800
    blue = (abs(pixels - [0.0, 0x72 / 255, 0xB2 / 255]) < 0.01).all(-1)
    orange = (abs(pixels - [0xE6 / 255, 0x9F / 255, 0.0]) < 0.01).all(-1)
    assert blue.mean() > 0.01
    assert orange.mean() > 0.01


def test_summary_has_what_readers_of_the_last_line_rely_on(
    make_measured: MakeMeasured, unshared: Any
) -> None:
    seconds = {"load": 1.0, "compile": 9.0, "prefill": 2.0, "decode": 5.0, "first_answer": 13.0}
    summary = summarise(GenerateConfig(), {"device": "cpu"}, make_measured(), unshared, seconds)
    assert json.loads(json.dumps(summary)) == summary
    expected = {
        "model": "smollm2",
        "implementation": "xla",
        "batch": 32,
        "shared_tokens": 2048,
        "prefill_tokens_computed": 1000,
        "prefill_tokens_reused": 3000,
        "prefill_tokens_per_second": 500.0,
        "decode_tokens_per_second": 120.0,
        "kv_bytes_held": 1 << 20,
        "kv_bytes_unshared": 1 << 23,
        "compilations": 7,
        "max_rss_bytes": 1 << 30,
        "seconds": seconds,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["compare"]["batch"] == 4
    assert summary["compare"]["decode_rate_ratio"] == 3.0
    assert summary["compare"]["equal_answers"] == 1


def test_summary_without_comparison_says_null(make_measured: MakeMeasured) -> None:
    assert summarise(GenerateConfig(), {}, make_measured(), None, {})["compare"] is None


def test_sampled_answers_are_not_compared(make_measured: MakeMeasured, unshared: Any) -> None:
    summary = summarise(GenerateConfig(temperature=1.0), {}, make_measured(), unshared, {})
    assert summary["compare"]["equal_answers"] is None


def test_records_hold_every_prompt_in_full() -> None:
    lines = (PromptLine("q:1", text="a"), PromptLine("q:2", text="b"))
    prompts = PromptSet(lines, ((1, 2, 3), (1, 2, 4, 5)), common_prefix=2)
    run = setting_of(prompts)
    request: Any = SimpleNamespace(tokens=[7, 8], finish_reason="length")
    record = request_record(1, prompts, request, "text")
    assert tuple(run["common_prefix_tokens"] + record["prompt_suffix_tokens"]) == (1, 2, 4, 5)
    assert (record["index"], record["prompt"], record["prompt_tokens"]) == (1, "b", 4)
    assert (record["tokens"], record["text"]) == ([7, 8], "text")
