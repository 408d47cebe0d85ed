"""The picture of `quality` where codecs and choices are compared."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.harness.reading import read_result
from experiments.quality.codec_views import choice_of, figure
from tests.experiments.test_readme_commands import ROOT

RESULTS = ROOT / "experiments" / "results" / "cpu-2026-11-29"


@pytest.mark.parametrize(
    ("run", "titles", "axes"),
    [
        (
            "quality-codecs",
            ["what a smaller KV cache costs"],
            ["bytes of a token's keys and values"],
        ),
        ("quality-select", ["what reading a part costs"], ["chunks that a query reads (%)"]),
    ],
)
def test_there_is_a_panel_for_what_was_measured(run, titles, axes):
    panels = figure(read_result(RESULTS / run)).axes
    assert [panel.get_title(loc="left") or panel.get_title() for panel in panels] == [
        f"smollm2: {title}" for title in titles
    ]
    assert [panel.get_xlabel() for panel in panels] == axes


def test_choices_are_told_from_codecs():
    assert choice_of("scores 0.4") == ("scores", 0.4)
    assert choice_of("chunks") is None
    assert choice_of("as KIVI") is None


def test_each_policy_is_a_line_over_its_shares():
    [panel] = figure(read_result(RESULTS / "quality-select")).axes
    lines = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in panel.get_lines()}
    assert lines["scores"] == [20, 40]
    assert {"bounds", "recent"} <= lines.keys()
