"""The system prompt and the questions that ship with the project."""

from __future__ import annotations

from pathlib import Path

from experiments.prompts import read_prompts, read_system_prompt, render_prompts, shipped_asset


def test_assets_are_plain_ascii() -> None:
    for name in ("system_prompt.md", "questions.txt"):
        assert shipped_asset(name).isascii()


def test_there_are_32_different_questions() -> None:
    questions = [line.text for line in read_prompts(None)]
    assert len(questions) == len(set(questions)) == 32


def test_shared_prefix_is_a_little_over_2048_tokens(smollm2_path: Path) -> None:
    from models.gguf_file import read_gguf
    from models.gguf_tokenizer import read_gguf_tokenizer

    tokenizer = read_gguf_tokenizer(read_gguf(smollm2_path))
    prompts = render_prompts(
        read_prompts(None), read_system_prompt(None), tokenizer, tokenizer.vocab_size
    )
    assert 2048 <= prompts.common_prefix <= 2150
    assert max(map(len, prompts.tokens)) <= prompts.common_prefix + 32
