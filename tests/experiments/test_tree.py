"""`python -m experiments tree`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.harness.errors import UserError
from experiments.tree.command import run
from experiments.tree.config import TreeConfig

SMALL = {
    "chunks": 1_200,
    "prompt_tokens": 40,
    "chunk_size": 4,
    "children": (1, 30),
    "samples": 5,
}


def test_costs_are_measured_at_every_size(tmp_path: Path):
    summary = run(TreeConfig(**SMALL, output=tmp_path / "out"))
    assert [record["nodes"] for record in summary["sizes"]] == [1_000, 1_200]
    assert [record["root_children"] for record in summary["children"]] == [1, 30]
    for record in (*summary["sizes"], *summary["children"]):
        assert record["match"]["median"] > 0
    planning = summary["planning"]
    assert [record["options"] for record in planning] == [
        "CPU",
        "GPU, cost",
        "GPU, fasttree",
        "GPU, pat",
    ]
    assert all(0 < record["plan"]["median"] <= record["plan"]["p95"] for record in planning)
    assert {record["rows"] for record in planning} == {256}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"children": (1, 0)}, r"--children must be at least 1, got \(1, 0\)"),
        ({"prompt_tokens": 7}, "--prompt-tokens 7 must fill at least two chunks"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(UserError, match=message):
        run(TreeConfig(**{**SMALL, "output": tmp_path / "out", **change}))
    assert not (tmp_path / "out").exists()
