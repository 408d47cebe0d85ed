"""Prompts of a run: read from files, then rendered by a chat template or made up at random.

A prompts file has one question a line, or one JSON object a line with `text` (a question) or
`tokens` (a whole prompt as token ids, used as it is, without system prompt or chat template).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.harness.errors import UserError
from experiments.harness.json_text import is_half_a_pair

if TYPE_CHECKING:
    from models import LoadedModel

_CHARACTERS_PER_TOKEN = 4


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
    ) -> list[int]: ...


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file: exactly one of `text` and `tokens` is given."""

    where: str
    text: str | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run.

    Attributes:
        lines: where each prompt came from.
        tokens: each prompt as token ids.
        common_prefix: number of leading tokens that all prompts have in common.
        note: what the reader of the results must know about how the prompts were made, if anything.
    """

    lines: tuple[PromptLine, ...]
    tokens: tuple[tuple[int, ...], ...]
    common_prefix: int
    note: str | None = None


def shipped_asset(name: str) -> str:
    """The text of a file in `experiments/assets`."""
    return resources.files("experiments").joinpath("assets", name).read_text(encoding="utf-8")


def tokens_of(loaded: LoadedModel, text: str) -> list[int]:
    """Of the model's tokenizer; for a model without one the bytes of the text."""
    if loaded.tokenizer is not None:
        return loaded.tokenizer.encode(text, parse_special=False)
    if loaded.config.vocab_size < 256:
        raise UserError(
            f"{loaded.name} has no tokenizer, and a vocabulary too small for the bytes of a text"
        )
    return list(text.encode())


def python_help() -> str:
    """The help that ships with Python: texts about its grammar and types, by their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def second_half(text: str) -> str:
    """What is fitted to, where the first half is what is measured with."""
    return text[len(text) // 2 :]


def given_text(path: Path | None) -> str:
    """That of the option `--text`, or Python's own help.

    Raises:
        UserError: it cannot be read.
    """
    return python_help() if path is None else read_text(path, "text")


def text_name(path: Path | None) -> str:
    """What a summary calls it."""
    return "pydoc_data.topics" if path is None else path.name


def read_text(path: Path, purpose: str) -> str:
    """The text of a file the user named.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{purpose} {path}:{line}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{purpose} {path}: {error.strerror or error}") from error


def read_system_prompt(path: Path | None) -> str:
    """The system prompt in `path`, or the one that ships with the project.

    Raises:
        UserError: the file cannot be read, or is blank.
    """
    if path is None:
        return shipped_asset("system_prompt.md").strip()
    text = read_text(path, "system prompt").strip()
    if not text:
        raise UserError(f"system prompt {path}: the file is empty")
    return text


def read_prompts(path: Path | None) -> tuple[PromptLine, ...]:
    """The lines of the prompts file `path`, or of the questions that ship with the project.

    Raises:
        UserError: the file cannot be read, has no prompt, or has a malformed line (named with its
            number).
    """
    if path is None:
        return parse_prompts(shipped_asset("questions.txt"), "questions.txt")
    text = read_text(path, "prompts file")
    json_lines = path.suffix in (".jsonl", ".json") or text.lstrip().startswith("{")
    return parse_prompts(text, str(path), json_lines=json_lines)


def parse_prompts(text: str, source: str, *, json_lines: bool = False) -> tuple[PromptLine, ...]:
    """Parse the text of a prompts file; blank lines are skipped. Raises `UserError`."""
    lines = []
    # Not `splitlines`: it also cuts at Unicode separators, which a question may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            where = f"{source}:{number}"
            parsed = _parse_json_line(stripped, where) if json_lines else None
            lines.append(parsed or PromptLine(where, text=stripped))
    if not lines:
        raise UserError(f"prompts file {source}: it has no prompts; write one on each line")
    return tuple(lines)


def _parse_json_line(line: str, where: str) -> PromptLine:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"prompts file {where}: not valid JSON ({error.msg} at column {error.colno})"
        ) from error
    if not isinstance(record, dict) or ("text" in record) == ("tokens" in record):
        raise UserError(
            f'prompts file {where}: expected an object with either "text" or "tokens", such as '
            '{"text": "When does the library open?"}'
        )
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'prompts file {where}: "text" must be a string that is not blank')
        if is_half_a_pair(text):
            raise UserError(f'prompts file {where}: "text" has half a surrogate pair: no text')
        return PromptLine(where, text=text.strip())
    tokens = record["tokens"]
    if not isinstance(tokens, list) or not tokens or not all(map(_is_token_id, tokens)):
        raise UserError(
            f'prompts file {where}: "tokens" must be a list, not empty, of integers from 0 up'
        )
    return PromptLine(where, tokens=tuple(tokens))


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def render_prompts(
    lines: Sequence[PromptLine], system_prompt: str, tokenizer: ChatTokenizer, vocab_size: int
) -> PromptSet:
    """Prompts for a model with a tokenizer: each text becomes a chat with the system prompt.

    Raises:
        UserError: a given token id is not in the vocabulary, or as `chat_tokens`.
    """
    _check_vocabulary(lines, vocab_size)
    tokens = [
        chat_tokens(tokenizer, system_prompt, line.text)
        if line.text is not None
        else line.tokens or ()
        for line in lines
    ]
    return _prompt_set(lines, tokens)


def chat_tokens(tokenizer: ChatTokenizer, system_prompt: str, question: str) -> tuple[int, ...]:
    """The prompt that asks for an answer to `question`, as the model's chat template writes it.

    Raises:
        UserError: the model has no chat template, or one that takes no system prompt.
    """
    messages = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": question},
    ]
    try:
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except ValueError as error:
        raise UserError(
            f"no chat can be made of the system prompt and a question ({error}); choose a model "
            "whose chat template takes both"
        ) from error


def random_prompts(
    lines: Sequence[PromptLine],
    system_prompt: str,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    seed: int,
) -> PromptSet:
    """Prompts for a model without a tokenizer: random ids in place of each text.

    The lengths are about those the texts would have; the stand-in for the system prompt is the same
    in all prompts and is cut so that every prompt fits in `max_prompt_tokens`.

    Raises:
        UserError: a given token id is not in the vocabulary.
    """
    _check_vocabulary(lines, vocab_size)
    questions = [_estimated_tokens(line.text) for line in lines if line.text is not None]
    if not questions:
        return _prompt_set(lines, [line.tokens or () for line in lines])
    wanted = _estimated_tokens(system_prompt)
    shared_tokens = max(0, min(wanted, max_prompt_tokens - max(questions)))
    generator = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(vocab_size) for _ in range(count))

    shared = ids(shared_tokens)
    tokens = [
        shared + ids(_estimated_tokens(line.text)) if line.text is not None else line.tokens or ()
        for line in lines
    ]
    cut = f" (cut from {wanted:,} to fit the model)" if shared_tokens < wanted else ""
    note = (
        "The model has no tokenizer: each text is replaced by random token ids, "
        f"{shared_tokens:,} for the system prompt{cut}."
    )
    return _prompt_set(lines, tokens, note)


def make_prompts(
    lines: Sequence[PromptLine],
    system_prompt: str,
    loaded: LoadedModel,
    *,
    max_tokens: int,
    seed: int,
) -> PromptSet:
    """Prompts that leave room for `max_tokens` more: rendered, or random without a tokenizer.

    Raises:
        UserError: ids outside the vocabulary, or more tokens than the model has positions.
    """
    vocab_size, max_positions = loaded.config.vocab_size, loaded.config.max_positions
    if loaded.tokenizer is not None:
        prompts = render_prompts(lines, system_prompt, loaded.tokenizer, vocab_size)
    else:
        prompts = random_prompts(
            lines,
            system_prompt,
            vocab_size=vocab_size,
            max_prompt_tokens=max_positions - max_tokens,
            seed=seed,
        )
    check_lengths(prompts, max_tokens, max_positions)
    return prompts


def check_lengths(prompts: PromptSet, max_tokens: int, max_positions: int) -> None:
    """Raise `UserError` for a prompt that leaves no room for `max_tokens` more tokens."""
    for line, tokens in zip(prompts.lines, prompts.tokens, strict=True):
        if len(tokens) + max_tokens > max_positions:
            raise UserError(
                f"prompt {line.where}: its {len(tokens):,} tokens and --max-tokens {max_tokens} "
                f"are more than the model's {max_positions:,} positions"
            )


def _estimated_tokens(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_PER_TOKEN)


def _check_vocabulary(lines: Sequence[PromptLine], vocab_size: int) -> None:
    for line in lines:
        if line.tokens is not None and max(line.tokens) >= vocab_size:
            raise UserError(
                f"prompts file {line.where}: token id {max(line.tokens)} is out of range; the "
                f"model's vocabulary has {vocab_size} ids"
            )


def _prompt_set(
    lines: Sequence[PromptLine], tokens: Sequence[tuple[int, ...]], note: str | None = None
) -> PromptSet:
    return PromptSet(tuple(lines), tuple(tokens), common_tokens(tokens), note)


def common_tokens(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with alike."""
    # What the first and the last in lexicographic order have in common, all between them have.
    pairs = zip(min(sequences), max(sequences), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
