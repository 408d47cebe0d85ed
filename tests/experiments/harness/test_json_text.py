"""JSON that any reader takes, whatever the numbers and texts are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import run_and_report
from experiments.harness.errors import CheckFailed
from experiments.harness.json_text import as_read, from_json, to_json
from experiments.harness.reading import read_result
from experiments.harness.results import ResultFolder
from experiments.serve.config import ServeConfig
from tests.experiments.results import ENVIRONMENT

ODD = {"a": math.nan, "b": [math.inf, {"c": (-math.inf, 1.5)}], "text": "NaN", "half": "\udcff é"}


def strict(text: str) -> Any:
    """As a reader of RFC 8259, of bytes in UTF-8."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text.encode(), parse_constant=refuse)


def test_numbers_that_are_not_finite_are_named_and_read_back():
    assert strict(to_json(ODD))["b"] == [
        {"number": "Infinity"},
        {"c": [{"number": "-Infinity"}, 1.5]},
    ]
    read = from_json(to_json(ODD))
    assert math.isnan(read.pop("a"))
    assert read == {"b": [math.inf, {"c": [-math.inf, 1.5]}], "text": "NaN", "half": "\udcff é"}


@pytest.mark.parametrize("value", [{"number": "three"}, {"number": 3}, {"number": "NaN", "x": 1}])
def test_other_objects_are_left_alone(value: Any):
    assert as_read(value) == value


def test_results_are_strict_json(tmp_path: Path):
    with ResultFolder(tmp_path / "out", "serve", ServeConfig(warm_up=math.inf)) as folder:
        folder.begin(ENVIRONMENT, odd=ODD)
        folder.write_record({"kind": "a", "value": ODD})
        finished = folder.finish_unit("one", {"kind": "b", "value": math.inf})
        folder.write_summary({"value": ODD})
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(list(map(strict, lines))) == 3
    strict((tmp_path / "out" / "summary.json").read_text())
    result = read_result(tmp_path / "out")
    assert result.config["warm_up"] == finished["value"] == math.inf
    assert result.summary is not None
    assert math.isnan(result.summary["value"]["a"])


def test_results_with_bare_names_are_gone_on_with_and_become_strict(tmp_path: Path):
    config = ServeConfig(warm_up=math.inf)
    with ResultFolder(tmp_path, "serve", config) as folder:
        folder.begin(ENVIRONMENT)
        folder.finish_unit("one", {"kind": "b", "value": math.nan})
    file = tmp_path / "results.jsonl"
    for name in ("NaN", "Infinity"):
        file.write_text(file.read_text().replace(f'{{"number": "{name}"}}', name))
    with pytest.raises(ValueError, match="Infinity"):
        strict(file.read_text().splitlines()[0])
    with ResultFolder(tmp_path, "serve", config) as folder:
        folder.begin(ENVIRONMENT)
        assert math.isnan(folder.finished["one"]["value"])
    assert len(list(map(strict, file.read_text().splitlines()))) == 2


def test_what_scripts_get_is_strict(capsys: pytest.CaptureFixture[str]):
    def fail() -> dict[str, Any]:
        raise CheckFailed("it is not", {"value": math.nan})

    assert run_and_report(lambda: ODD, as_json=True) == 0
    assert strict(capsys.readouterr().out)["a"] == {"number": "NaN"}
    assert run_and_report(fail, as_json=True) == 1
    assert strict(capsys.readouterr().out) == {"value": {"number": "NaN"}}
