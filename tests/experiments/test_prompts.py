"""Prompts files and the prompts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.errors import UserError
from experiments.prompts import (
    PromptLine,
    check_lengths,
    parse_prompts,
    random_prompts,
    read_prompts,
    read_system_prompt,
    render_prompts,
)


class LetterTokenizer:
    """One token per character; roles are marked by ids no letter has."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [{"system": 1, "user": 2}[message["role"]], *map(ord, message["content"])]
        return [*ids, 3] if add_generation_prompt else ids


def test_text_lines_skip_blanks_and_keep_their_numbers() -> None:
    lines = parse_prompts("one\n\n  two \n", "q.txt")
    assert lines == (PromptLine("q.txt:1", text="one"), PromptLine("q.txt:3", text="two"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_json_lines_are_told_by_suffix_or_first_character(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('\n{"text": "hello"}\n{"tokens": [4, 5]}\n')
    text, tokens = read_prompts(path)
    assert text.text == "hello"
    assert tokens.tokens == (4, 5)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ',
        '"text"',
        "{}",
        '{"text": "a", "tokens": [1]}',
        '{"text": "  "}',
        '{"text": 3}',
        '{"tokens": []}',
        '{"tokens": [1, -2]}',
        '{"tokens": [1, 2.5]}',
        '{"tokens": [true]}',
        '{"tokens": "1 2"}',
        "plain text",
    ],
)
def test_malformed_json_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl:3: "):
        read_prompts(path)


def test_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"prompts\.txt:2: not UTF-8"):
        read_prompts(path)


def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfhello\n")
    assert read_prompts(path)[0].text == "hello"


def test_rendered_prompts_share_the_system_prompt() -> None:
    lines = parse_prompts("abc\nabd\n", "q.txt")
    prompts = render_prompts(lines, "SYS", LetterTokenizer(), vocab_size=200)
    assert prompts.tokens[0] == (1, *map(ord, "SYS"), 2, *map(ord, "abc"), 3)
    assert prompts.common_prefix == len("1SYS2ab")
    assert prompts.note is None


def test_a_chat_that_cannot_be_made_is_the_users_to_mend() -> None:
    class NoSystemPrompts(LetterTokenizer):
        def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool) -> list[int]:
            raise ValueError("System role not supported")

    lines = (PromptLine("p:1", tokens=(9,)), PromptLine("p:2", text="x"))
    with pytest.raises(UserError, match=r"no chat can be made .*\(System role not supported\)"):
        render_prompts(lines, "SYS", NoSystemPrompts(), vocab_size=200)
    only_tokens = render_prompts(lines[:1], "SYS", NoSystemPrompts(), vocab_size=200)
    assert only_tokens.tokens == ((9,),)


def test_given_tokens_are_used_as_they_are() -> None:
    lines = (PromptLine("p:1", tokens=(9, 8, 7)), PromptLine("p:2", text="x"))
    prompts = render_prompts(lines, "SYS", LetterTokenizer(), vocab_size=200)
    assert prompts.tokens[0] == (9, 8, 7)
    assert prompts.common_prefix == 0


def test_token_outside_the_vocabulary_is_named_with_its_line() -> None:
    lines = (PromptLine("p:1", tokens=(1,)), PromptLine("p:2", tokens=(3, 200)))
    with pytest.raises(UserError, match=r"p:2: token id 200 is out of range.*200 ids"):
        render_prompts(lines, "SYS", LetterTokenizer(), vocab_size=200)
    with pytest.raises(UserError, match=r"p:2: token id 200 is out of range"):
        random_prompts(lines, "SYS", vocab_size=200, max_prompt_tokens=100, seed=0)


def test_random_prompts_have_the_lengths_of_the_texts_and_one_prefix() -> None:
    lines = parse_prompts("a" * 40 + "\n" + "b" * 80, "q.txt")
    prompts = random_prompts(lines, "s" * 400, vocab_size=256, max_prompt_tokens=1000, seed=0)
    assert [len(tokens) for tokens in prompts.tokens] == [110, 120]
    assert prompts.common_prefix >= 100
    assert max(max(tokens) for tokens in prompts.tokens) < 256
    assert prompts.note is not None
    assert "random token ids" in prompts.note


def test_random_prompts_are_the_seeds_alone() -> None:
    lines = parse_prompts("one question\nanother question", "q.txt")

    def make(seed: int) -> tuple[tuple[int, ...], ...]:
        return random_prompts(
            lines, "s" * 400, vocab_size=256, max_prompt_tokens=1000, seed=seed
        ).tokens

    assert make(0) == make(0)
    assert make(0) != make(1)


def test_random_prompts_are_cut_to_what_the_model_holds() -> None:
    lines = parse_prompts("a" * 40 + "\n" + "b" * 80, "q.txt")
    prompts = random_prompts(lines, "s" * 4000, vocab_size=256, max_prompt_tokens=100, seed=0)
    assert max(map(len, prompts.tokens)) == 100
    assert prompts.note is not None
    assert "cut from 1,000" in prompts.note


def test_prompt_longer_than_the_model_is_named_with_its_line() -> None:
    lines = parse_prompts("abc\nabcdefg\n", "q.txt")
    prompts = render_prompts(lines, "SYS", LetterTokenizer(), vocab_size=200)
    check_lengths(prompts, 7, 20)
    with pytest.raises(UserError, match=r"q\.txt:2: its 13 tokens and --max-tokens 8 .* 20 pos"):
        check_lengths(prompts, 8, 20)


def test_blank_system_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "system.md"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="empty"):
        read_system_prompt(path)
