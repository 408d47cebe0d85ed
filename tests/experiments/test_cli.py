"""The command line: quick help, exit codes, and errors in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import COMMANDS, DEBUG_VARIABLE, EXPERIMENTS, main, run_and_report
from experiments.codecs import check_used_codec
from experiments.harness.console import make_console
from experiments.harness.errors import CheckFailed, UserError

ROOT = Path(__file__).resolve().parents[2]

HEAVY = ("jax", "numpy", "flax", "rich", "matplotlib", "models", "jax_chunkattn", "pallas_kernels")

LIST_HEAVY_IMPORTS = f"""
import sys
from experiments.cli import main
try:
    main(sys.argv[1:])
finally:
    print("heavy:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""


NAMES = (*EXPERIMENTS, *COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], *([name] for name in NAMES)], ids=str)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    arguments = [sys.executable, "-c", LIST_HEAVY_IMPORTS, *command, "--help"]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "usage: python -m experiments" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "heavy:"


def test_module_is_executable() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"], capture_output=True, text=True, check=True
    )
    for subcommand in NAMES:
        assert subcommand in finished.stdout


def test_a_reader_that_has_seen_enough_of_the_help_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody_reads:
        finished = subprocess.run(
            [sys.executable, "-m", "experiments", "--help"],
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (finished.returncode, finished.stderr) == (1, "")


def test_without_the_extra_its_name_is_told() -> None:
    code = "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('experiments')"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "error: this needs an extra: pip install -e '.[experiments]'"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--bogus"],
        ["generate", "--batch", "many"],
        ["generate", "--implementation", "magic"],
        ["generate", "--dtype", "int8"],
        ["nonsense"],
    ],
)
def test_wrong_flags_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


BAD_INPUT = {
    "unknown model": (["--model", "gpt5"], "--model gpt5: unknown model"),
    "missing gguf": (["--model", "absent.gguf"], "absent.gguf: there is no such file"),
    "unknown preset": (["--model", "random:huge"], "unknown preset 'huge'"),
    "not a gguf": (["--model", "text.gguf"], "text.gguf"),
    "batch of zero": (["--batch", "0"], "--batch must be at least 1, got 0"),
    "batch above prompts": (["--batch", "33"], "--batch 33 asks for more prompts"),
    "compare batch": (["--compare-batch", "0"], "--compare-batch must be at least 1, got 0"),
    "chunk size of zero": (["--chunk-size", "0"], "--chunk-size must be at least 1, got 0"),
    "kernel without a gpu": (
        ["--implementation", "pallas_triton"],
        "'pallas_triton' cannot run: it needs an NVIDIA GPU, and the device is 'cpu'",
    ),
    "no tokens": (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    "steps": (["--steps-per-call", "-1"], "--steps-per-call must be at least 1, got -1"),
    "temperature": (["--temperature", "-1"], "--temperature must be a number from 0"),
    "temperature nan": (["--temperature", "nan"], "--temperature must be a number from 0"),
    "high temperature": (["--temperature", "1e39"], "--temperature must be a number from 0 to"),
    "top k": (["--top-k", "-1"], "--top-k must be from 0 (off)"),
    "large top k": (["--top-k", f"{2**31}"], "--top-k must be from 0 (off) to 2147483647, got"),
    "top p": (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
    "seed": (["--seed", "-1"], "--seed must be from 0"),
    "missing prompts": (["--prompts", "absent.txt"], "absent.txt: No such file"),
    "empty prompts": (["--prompts", "empty.txt"], "empty.txt: it has no prompts"),
    "malformed prompts": (["--prompts", "bad.jsonl"], "bad.jsonl:2: not valid JSON"),
    "missing system prompt": (["--system-prompt", "absent.md"], "absent.md: No such file"),
    "empty system prompt": (["--system-prompt", "empty.txt"], "empty.txt: the file is empty"),
    "half a character": (["--prompts", "half.jsonl"], '"text" has half a surrogate pair'),
    "zero byte": (["--config", "zero.toml"], "--prompts=a\\0b cannot be used: it has a zero byte"),
    "long output": (["--output", "a" * 300], "cannot be written (File name too long)"),
    "output below a file": (["--output", "text.gguf/out"], "text.gguf/out cannot be written"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    Path("empty.txt").write_text("\n \n")
    Path("text.gguf").write_text("not a model")
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n')
    Path("zero.toml").write_text('prompts = "a\\u0000b"\n')
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')

    model = [] if "--model" in arguments else ["--model", "random:tiny"]
    assert main(["generate", *model, *arguments]) == 2

    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not list(Path("runs").glob("*"))


def tell_and_count() -> dict[str, int]:
    make_console().print("a table")
    return {"batch": 3}


def test_people_get_tables_and_scripts_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(tell_and_count) == 0
    assert capsys.readouterr().out == "a table\n"
    assert run_and_report(tell_and_count, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"batch": 3}


def test_what_was_to_be_proved_and_does_not_hold_exits_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run() -> dict[str, int]:
        raise CheckFailed("memory grew", {"failures": 1})

    assert run_and_report(run, as_json=True) == 1
    captured = capsys.readouterr()
    assert captured.err == "failed: memory grew\n"
    assert json.loads(captured.out) == {"failures": 1}


def test_interrupt_says_where_the_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> dict[str, int]:
        raise KeyboardInterrupt("the results so far are in x")

    assert run_and_report(run) == 130
    assert capsys.readouterr().err == "interrupted: the results so far are in x\n"


def test_library_errors_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import jax_chunkattn
    import models

    for kind in (
        UserError,
        jax_chunkattn.InvalidRequest,
        jax_chunkattn.PoolExhausted,
        models.CheckpointError,
        models.DownloadError,
    ):

        def run(kind: type[Exception] = kind) -> dict[str, int]:
            raise kind("first line\nsecond line")

        assert run_and_report(run) == 2
        assert capsys.readouterr().err == "error: first line second line\n"


def test_a_full_disk_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> dict[str, int]:
        raise OSError(errno.ENOSPC, "No space left on device", "out/picture.png")

    assert run_and_report(run) == 2
    error = "error: out/picture.png cannot be written (No space left on device)\n"
    assert capsys.readouterr().err == error


def test_debug_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(UserError, match="--batch"):
        main(["generate", "--batch", "0"])


def test_a_bug_is_not_hidden() -> None:
    def run() -> dict[str, int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_report(run)


def test_a_prompt_that_the_engine_refuses_is_told_in_one_line_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.generate import decoding

    monkeypatch.setattr(decoding, "chunks_needed", lambda *_, **__: 4)
    monkeypatch.chdir(tmp_path)
    lengths = (8, 200, 8)
    Path("q.jsonl").write_text("\n\n".join(f'{{"tokens": {[1] * n}}}' for n in lengths))
    options = ["--model", "random:tiny", "--prompts", "q.jsonl", "--max-tokens", "4"]
    assert main(["generate", *options, "--chunk-size", "16"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: prompt q.jsonl:3: a request of 200 tokens that asks for 4 more")
    assert told.count("\n") == 1


NO_TEXT = os.fsdecode(b"runs/\xff")


def path_options() -> list[list[str]]:
    """Every option of every command that takes a path or a text, given one that is not UTF-8."""
    given = []
    for name, command in {**EXPERIMENTS, **COMMANDS}.items():
        texts = [
            field.name.replace("_", "-")
            for field in dataclasses.fields(command.config)
            if "Path" in str(field.type) or "str" in str(field.type)
        ]
        shared = ["config", "from", "sweep"] if name in EXPERIMENTS else []
        given += [[name, f"--{option}", NO_TEXT] for option in (*texts, *shared)]
    return [*given, ["report", NO_TEXT], [NO_TEXT], ["generate", f"--output={NO_TEXT}"]]


@pytest.mark.parametrize("arguments", path_options(), ids=lambda given: " ".join(given[:2])[:20])
def test_what_is_not_utf8_is_one_line_and_exit_code_2(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.endswith("runs/\\xff cannot be used: it is no text in UTF-8\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_is_not_utf8_and_a_locale_of_ascii_are_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def run(*arguments: str | bytes) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=folder,
            env={**os.environ, **ascii_only, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )

    assert run("tree", "--smoke", "--output", "out").returncode == 0
    assert run("report", "out", "--output", "page").returncode == 0
    assert "tree" in (folder / "page" / "report.md").read_text()
    refused = run("generate", "--bogus", "\N{LATIN SMALL LETTER E WITH ACUTE}".encode())
    assert refused.returncode == 2
    assert refused.stderr == b"error: --bogus \\xc3\\xa9 cannot be used: it is no text in ASCII\n"


def test_no_page_is_made_of_a_folder_that_it_cannot_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "results.jsonl").touch()
    assert main(["report", "."]) == 2
    assert capsys.readouterr().err.startswith("error: '\\udcff' is no text in UTF-8")


@pytest.mark.parametrize("command", ["generate", "serve", "search", "soak"])
def test_a_codec_is_checked_before_anything_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([command, "--codec", "int5", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: unknown codec 'int5'; known: identity, int8")
    assert not (tmp_path / "out").exists()


def test_a_codec_that_spoils_answers_is_warned_of(capsys: pytest.CaptureFixture[str]):
    for codec, warned in (("int2", True), ("int4/int2", False), ("identity", False)):
        check_used_codec(codec)
        assert capsys.readouterr().err.startswith("warning: with keys of 2 bits") == warned
