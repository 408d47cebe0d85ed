"""The option `--prefix`: a learned prefix in the place of the system prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.harness.errors import UserError
from experiments.prompts import PromptSet, chat_tokens, common_tokens

if TYPE_CHECKING:
    from models import LoadedModel
    from models.prefixes import PrefixArrays

PrefixFolder = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FOLDER",
        help="A learned prefix in the place of the system prompt: a folder that `distill-prefix`, "
        "or Hugging Face's peft, has written for the model. Its virtual tokens must fill chunks.",
        help_behavior_hint="(default: the system prompt's tokens)",
    ),
]
"""The option of what runs an engine; see `Engine.add_prefix`."""

NAME = "prefix"
"""By which requests ask for it."""


def check_prefix(prefix: Path | None, system_prompt: Path | None) -> None:
    """Raise `UserError` for a prefix beside what it stands in the place of."""
    if prefix is not None and system_prompt is not None:
        raise UserError("--prefix is in the place of the system prompt: give no --system-prompt")


def chosen_prefix(folder: Path | None, loaded: LoadedModel) -> PrefixArrays | None:
    """What `Engine.add_prefix` takes for it.

    Raises:
        models.CheckpointError: there is no such prefix, or it is of another model.
    """
    if folder is None:
        return None
    from models.prefixes import load_prefix

    return load_prefix(folder, loaded.model.cache_spec)


def tokens_replaced(prompts: PromptSet, system_prompt: str, loaded: LoadedModel) -> int:
    """How many of each prompt's first tokens a prefix stands for: those before any question."""
    if loaded.tokenizer is None:
        return prompts.common_prefix
    some = [chat_tokens(loaded.tokenizer, system_prompt, question) for question in ("7!", "A?")]
    return min(common_tokens(some), *([prompts.common_prefix] if len(prompts.tokens) > 1 else []))


def behind_prefix(prompts: PromptSet, system_prompt: str, loaded: LoadedModel) -> PromptSet:
    """The prompts without what a prefix stands for; those that were given as tokens stay whole."""
    texts = [index for index, line in enumerate(prompts.lines) if line.text is not None]
    some = PromptSet(
        tuple(prompts.lines[index] for index in texts),
        tuple(prompts.tokens[index] for index in texts),
        common_tokens([prompts.tokens[index] for index in texts]) if texts else 0,
    )
    replaced = tokens_replaced(some, system_prompt, loaded) if texts else 0
    tokens = tuple(
        tokens[replaced:] if line.text is not None else tokens
        for line, tokens in zip(prompts.lines, prompts.tokens, strict=True)
    )
    return PromptSet(prompts.lines, tokens, common_tokens(tokens), prompts.note)
