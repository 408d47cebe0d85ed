"""The result folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import runs
from experiments.harness.errors import UserError
from experiments.harness.reading import SCHEMA, read_result
from experiments.harness.results import ResultFolder, config_record
from experiments.harness.runs import begin_anew, new_run_path, open_results
from experiments.kernel.config import KernelConfig
from experiments.serve.config import ServeConfig
from tests.experiments.results import ENVIRONMENT, lines_in

WHERE: dict[str, Any] = ENVIRONMENT


def opened(path: Path, **changes: Any) -> ResultFolder:
    return ResultFolder(path, "serve", ServeConfig(**changes))


def begun(path: Path, **changes: Any) -> ResultFolder:
    folder = opened(path, **changes)
    folder.begin(WHERE)
    return folder


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with begun(tmp_path / "out", requests=3) as folder:
        for count in range(3):
            folder.write_record({"kind": "a", "index": count})
            header, *lines = lines_in(tmp_path / "out")
            assert [line["index"] for line in lines] == list(range(count + 1))
        assert "3 lines" in folder.state()
    assert (header["kind"], header["schema"], header["experiment"]) == ("run", SCHEMA, "serve")
    assert (header["config"]["requests"], header["environment"]) == (3, WHERE)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for make in (opened, begun):
        with make(tmp_path / "out") as folder:
            assert folder.path.is_dir()
        assert not (tmp_path / "out").exists()


def test_an_interrupt_says_where_the_results_are(tmp_path: Path) -> None:
    def interrupted(records: int) -> None:
        with begun(tmp_path / "out") as folder:
            for _ in range(records):
                folder.write_record({"kind": "a"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="no results were written"):
        interrupted(0)
    with pytest.raises(KeyboardInterrupt, match=r"so far \(2 lines\) are in .*out/results.jsonl"):
        interrupted(2)


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    assert tmp_path.is_dir()


def break_off(path: Path, **changes: Any) -> None:
    """One unit ended, another not, and a line cut off, as by SIGKILL."""
    with begun(path, **changes) as folder:
        folder.write_record({"kind": "loose"})
        folder.write_record({"kind": "part", "index": 0}, of_unit="first")
        folder.finish_unit("first", {"kind": "whole", "value": 1.5})
        folder.write_record({"kind": "part", "index": 1}, of_unit="second")
    with (path / "results.jsonl").open("a") as file:
        file.write('{"kind": "part", "ind')


def test_what_was_broken_off_can_be_read(tmp_path: Path) -> None:
    break_off(tmp_path / "out", requests=3)
    result = read_result(tmp_path / "out" / "results.jsonl")
    assert (result.experiment, result.config["requests"], result.summary) == ("serve", 3, None)
    assert [line["kind"] for line in result.lines] == ["loose", "part", "whole"]
    assert result.finished == {"first": {"kind": "whole", "unit": "first", "value": 1.5}}


def test_a_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    break_off(tmp_path / "out")
    with begun(tmp_path / "out") as folder:
        assert folder.finished["first"]["value"] == 1.5
        assert [line["index"] for line in folder.lines_of("first")] == [0]
        folder.write_record({"kind": "part", "index": 2}, of_unit="second")
        folder.finish_unit("second", {"kind": "whole", "value": 2.5})
        folder.write_summary({})
    kinds = [(line["kind"], line.get("index")) for line in lines_in(tmp_path / "out")]
    assert kinds == [("run", None), ("part", 0), ("whole", None), ("part", 2), ("whole", None)]


def test_a_run_that_was_killed_before_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"kind": "ru')
    with begun(tmp_path) as folder:
        folder.finish_unit("first", {"kind": "whole"})
    assert [line["kind"] for line in lines_in(tmp_path)] == ["run", "whole"]


def test_what_has_ended_is_not_overwritten(tmp_path: Path) -> None:
    break_off(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{}")
    before = (tmp_path / "out" / "results.jsonl").read_text()
    with pytest.raises(UserError, match="holds the results of an earlier run, which has ended"):
        opened(tmp_path / "out")
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


def test_a_run_with_other_options_is_not_gone_on_with(tmp_path: Path) -> None:
    break_off(tmp_path / "out", seed=1)
    with pytest.raises(UserError, match=r"a run with other options \(seed: 1, now 2\)"):
        opened(tmp_path / "out", seed=2)
    with pytest.raises(UserError, match=r"\(of serve\)"):
        ResultFolder(tmp_path / "out", "kernel", KernelConfig())


def test_a_run_over_a_file_that_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("1")
    break_off(tmp_path / "out", trace=trace)
    trace.write_text("2")
    with pytest.raises(UserError, match=r"results of .*trace.jsonl as it was then"):
        opened(tmp_path / "out", trace=trace)
    trace.write_text("1")
    assert opened(tmp_path / "out", trace=trace).finished


def test_a_folder_has_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.harness import environment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "describe_host", lambda: WHERE)
    with open_results("serve", ServeConfig()) as first:
        first.begin(WHERE)
        first.finish_unit("one", {"kind": "whole"})
        with pytest.raises(UserError, match="a run is writing to output folder"):
            opened(first.path)
        with pytest.raises(UserError, match="a run is writing to output folder"):
            begin_anew(first.path)
        with open_results("serve", ServeConfig()) as second:
            assert second.path != first.path
            assert second.finished == {}
    with open_results("serve", ServeConfig()) as third:
        assert third.path == first.path
        assert set(third.finished) == {"one"}


def test_two_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    free = iter(["taken", "taken", "free"])
    monkeypatch.setattr(runs, "new_run_path", lambda _: tmp_path / next(free))
    with open_results("serve", ServeConfig()), open_results("serve", ServeConfig()) as second:
        assert second.path.name == "free"


def test_begin_anew_leaves_what_has_ended(tmp_path: Path) -> None:
    begin_anew(tmp_path / "absent")
    break_off(tmp_path / "out")
    begin_anew(tmp_path / "out")
    assert not list(tmp_path.rglob("*.jsonl"))
    break_off(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{}")
    begin_anew(tmp_path / "out")
    assert read_result(tmp_path / "out").finished


def test_begin_anew_takes_no_runs_but_the_points_of_a_sweep(tmp_path: Path) -> None:
    break_off(tmp_path / "runs" / "serve-1")
    begin_anew(tmp_path / "runs")
    break_off(tmp_path / "out")
    break_off(tmp_path / "out" / "serve-1")
    begin_anew(tmp_path / "out")
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    with ResultFolder(tmp_path / "sweep", "sweep", ServeConfig()) as sweep:
        sweep.begin(WHERE)
        sweep.write_record({"kind": "a"})
        break_off(tmp_path / "sweep" / "seed=1")
    begin_anew(tmp_path / "sweep")
    assert not list((tmp_path / "sweep").rglob("*.jsonl"))


def test_an_interrupt_after_the_summary_says_that_the_run_has_ended(tmp_path: Path) -> None:
    def end_and_interrupt() -> None:
        with begun(tmp_path / "out") as folder:
            folder.finish_unit("one", {"kind": "whole"})
            folder.write_summary({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the run has ended, and its results are in"):
        end_and_interrupt()


@pytest.mark.parametrize(
    "name", ["device", "torch", "python", "versions", "settings", "cpu_count", "commit"]
)
def test_a_run_somewhere_else_is_not_gone_on_with(tmp_path: Path, name: str) -> None:
    break_off(tmp_path / "out")
    with (
        opened(tmp_path / "out") as folder,
        pytest.raises(UserError, match=f"was begun with {name} .* --fresh"),
    ):
        folder.begin(WHERE | {name: "other"})


def test_the_same_command_finds_what_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.harness import environment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "describe_host", lambda: WHERE)
    break_off(Path("runs/serve-1"), seed=1)
    break_off(Path("runs/serve-2"), seed=2)
    break_off(Path("runs/serve-3"), seed=1)
    (tmp_path / "runs" / "serve-3" / "summary.json").write_text("{}")
    assert open_results("serve", ServeConfig(seed=1)).path == Path("runs/serve-1")
    assert open_results("serve", ServeConfig(seed=2)).path == Path("runs/serve-2")
    assert open_results("serve", ServeConfig(seed=3)).finished == {}
    changed = WHERE | {"commit": "abc+123"}  # nobody knows what has changed since
    monkeypatch.setattr(environment, "describe_host", lambda: changed)
    assert open_results("serve", ServeConfig(seed=1)).finished == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("", "holds other than JSON objects with a kind"),
        ('{"kind": "run"\n', "can be read"),
        ('{"a": 1}\n', "holds other than JSON objects with a kind"),
        ('{"kind": "run", "config": {}}\n', "not written by this version"),
        ('{"kind": "run", "schema": 1, "config": {}}\n', "not written by this version"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_result(tmp_path)


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*--output"):
        opened(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written.*--output"):
        opened(tmp_path)


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
