"""The result folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder, config_record, new_run_path
from experiments.serve import ServeConfig


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        for count in range(3):
            folder.write_record({"index": count})
            lines = folder.results_path.read_text().splitlines()
            assert [json.loads(line)["index"] for line in lines] == list(range(count + 1))
        assert "3 lines" in folder.state()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        assert folder.path.is_dir()
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_where_the_results_are(tmp_path: Path) -> None:
    def interrupted(records: int) -> None:
        with ResultFolder(tmp_path / "out") as folder:
            for _ in range(records):
                folder.write_record({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="no results were written"):
        interrupted(0)
    with pytest.raises(KeyboardInterrupt, match=r"so far \(2 lines\) are in .*out/results.jsonl"):
        interrupted(2)


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with ResultFolder(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_earlier_results_are_not_overwritten(tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        folder.write_record({"kept": True})
    with pytest.raises(UserError, match="holds the results of an earlier run"):
        ResultFolder(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text()) == {"kept": True}


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*--output"):
        ResultFolder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written.*--output"):
        ResultFolder(tmp_path)


def test_a_config_becomes_json_values() -> None:
    config = ServeConfig(trace=Path("a/b.jsonl"), closed=3, sides=("shared",))
    record = json.loads(json.dumps(config_record(config)))
    assert record["trace"] == "a/b.jsonl"
    assert (record["closed"], record["speed"], record["sides"]) == (3, None, ["shared"])


def test_new_run_paths_are_distinct(tmp_path: Path) -> None:
    paths = set()
    for _ in range(3):
        path = new_run_path("generate", tmp_path)
        path.mkdir()
        paths.add(path)
    assert len(paths) == 3
    assert all(path.name.startswith("generate-") for path in paths)
