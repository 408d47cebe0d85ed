"""Two runs with one seed: the same tokens, and the same tables but for times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.harness.reading import Result, read_result
from experiments.harness.views import views_of


def tokens_of(result: Result) -> list[Any]:
    """What was decoded, request by request; nothing of an experiment without a model."""
    requests = sorted(result.of_kind("request"), key=lambda line: (line["of_unit"], line["index"]))
    return [line["tokens"] for line in requests]


def run(folder: Path, *command: str) -> Result:
    short = ["--no-compare"] if "generate" in command else []  # half of what is to be compiled
    assert main([*command, "--smoke", *short, "--output", str(folder)]) == 0
    return read_result(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "kernel", "serve", "tree"])
def test_one_seed_gives_one_result(name: str, tmp_path: Path):
    first, second = (run(tmp_path / which, name) for which in "ab")
    assert tokens_of(first) == tokens_of(second)
    tables = views_of(name).tables
    untimed = [table.untimed() for table in tables(first)]
    assert untimed == [table.untimed() for table in tables(second)]
    assert any(len(row) > 1 for table in untimed for row in table.rows)


@pytest.mark.slow
def test_another_seed_gives_other_tokens(tmp_path: Path):
    first = run(tmp_path / "a", "generate")
    second = run(tmp_path / "b", "generate", "--seed", "1")
    assert tokens_of(first) != tokens_of(second)
    assert len(tokens_of(second)) == 4
