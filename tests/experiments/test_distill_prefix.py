"""`python -m experiments distill-prefix`, small, and what takes the folder that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import models
from experiments.cli import main
from experiments.distill_prefix.command import headline, run
from experiments.distill_prefix.config import DistillPrefixConfig, check
from experiments.generate.config import GenerateConfig
from experiments.harness.errors import UserError
from experiments.harness.inputs import inputs_of
from experiments.harness.reading import read_result
from experiments.harness.views import views_of
from experiments.prefix_option import behind_prefix, tokens_replaced
from experiments.prompts import parse_prompts, render_prompts
from models.prefix_training import PrefixTraining
from models.prefixes import load_prefix
from tests.experiments.results import text_of

SMALL: dict[str, Any] = {**DistillPrefixConfig.SMOKE, "max_positions": 256}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    run(DistillPrefixConfig(**SMALL, output=folder))
    return folder


def records_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, but for times."""
    result = read_result(folder)
    return [
        {name: value for name, value in one.items() if name != "seconds"}
        for kind in ("answers", "steps", "prefix")
        for one in result.of_kind(kind)
    ]


@pytest.mark.slow
def test_a_run_leaves_a_prefix_and_tells_what_it_is_worth(distilled: Path):
    result = read_result(distilled)
    model = models.load("random:tiny").model
    assert load_prefix(distilled / "prefix", model.cache_spec).num_tokens == 16
    assert not list(distilled.glob("*.npz"))
    summary = result.summary
    assert summary is not None
    assert summary["steps_done"] == 4
    assert summary["scored"] == 2 * 2 * 8
    assert summary["bytes"]["prompt"] == summary["prompt_tokens"] * summary["bytes"]["prefix"] // 16
    assert summary["divergence"] < summary["divergence_at_first"]
    assert set(summary["perplexity"]) == {"prompt", "prefix", "first", "nothing"}
    assert [one["step"] for one in result.of_kind("steps")] == [2, 4]
    assert headline(summary)["divergence"] == summary["divergence"]
    text = text_of(views_of("distill-prefix").tables(result))
    assert "16 virtual tokens for a system prompt, random:tiny" in text
    assert "Perplexity of 32 tokens" in text
    assert list(views_of("distill-prefix").figures(result)) == ["divergence"]


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distilled: Path
):
    """In the fourth of four steps, behind two that were saved."""
    taken, step = [], PrefixTraining.step

    def broken_off(training: PrefixTraining, examples: Any) -> float:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(training, examples))
        return taken[-1]

    config = DistillPrefixConfig(**SMALL, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PrefixTraining, "step", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    assert records_of(tmp_path / "out") == records_of(distilled)


@pytest.mark.slow
def test_generate_answers_behind_it(distilled: Path, tmp_path: Path, capsys: Any):
    folder = str(distilled / "prefix")
    options = ["--model", "random:tiny", "--chunk-size", "16", "--max-tokens", "4", "--batch", "3"]
    command = ["generate", *options, "--compare-batch", "2", "--output", str(tmp_path / "out")]
    assert main([*command, "--prefix", folder]) == 0
    summary = read_result(tmp_path / "out").summary
    assert summary is not None
    lines = read_result(tmp_path / "out").of_kind("request")
    assert len(lines) == 3
    assert main([*command, "--prefix", folder, "--system-prompt", __file__]) == 2
    assert "give no --system-prompt" in capsys.readouterr().err
    named = inputs_of(GenerateConfig(model="random:tiny", prefix=distilled / "prefix"))
    assert {Path(name).name for name in named} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


class Words:
    """A chat template over words, each of them a token."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool) -> list[int]:
        text = [word for one in messages for word in (one["role"], *one["content"].split())]
        return [self.words.setdefault(word, len(self.words)) for word in (*text, "answer:")]


def test_a_prefix_stands_for_all_before_the_question_and_nothing_of_it():
    tokenizer: Any = Words()
    lines = parse_prompts('{"text": "Why so?"}\n{"text": "Why not?"}\n{"tokens": [1, 2]}', "x",
                          json_lines=True)  # fmt: skip
    prompts = render_prompts(lines, "Be brief .", tokenizer, 100)

    class Loaded:
        pass

    loaded: Any = Loaded()
    loaded.tokenizer = tokenizer
    texts = render_prompts(lines[:2], "Be brief .", tokenizer, 100)
    before = ["system", "Be", "brief", ".", "user"]
    assert texts.common_prefix == len([*before, "Why"])
    assert tokens_replaced(texts, "Be brief .", loaded) == len(before)
    found = behind_prefix(prompts, "Be brief .", loaded)
    words = {token: word for word, token in tokenizer.words.items()}
    assert [[words[token] for token in tokens] for tokens in found.tokens[:2]] == [
        ["Why", "so?", "answer:"],
        ["Why", "not?", "answer:"],
    ]
    assert found.tokens[2] == (1, 2)
    assert found.common_prefix == 0


def test_options_that_no_run_could_use_are_refused(tmp_path: Path):
    for changes, message in (
        ({"tokens": 20}, "--tokens must fill whole chunks of --chunk-size 16, got 20"),
        ({"warmup": 9}, "--warmup must be from 0 to --steps 4"),
        ({"held_out": 0}, "--held-out"),
    ):
        with pytest.raises(UserError, match=message):
            check(DistillPrefixConfig(**{**SMALL, **changes}))
    (tmp_path / "two.txt").write_text("Why?\nHow?\n")
    (tmp_path / "ids.jsonl").write_text('{"tokens": [1]}\n' * 3)
    for name, message in (("two.txt", "leaves none"), ("ids.jsonl", "must be text")):
        with pytest.raises(UserError, match=message):
            run(DistillPrefixConfig(**SMALL, prompts=tmp_path / name))
    long = {**SMALL, "tokens": 128, "max_positions": 128}
    with pytest.raises(UserError, match="would be no fewer"):
        run(DistillPrefixConfig(**long, output=tmp_path / "long"))
