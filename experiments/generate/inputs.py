"""What a run of `generate` is given: its model and its prompts."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.generate.config import GenerateConfig
from experiments.harness.errors import UserError
from experiments.loading import ModelSource, parse_model
from experiments.prompts import PromptLine, read_prompts, read_system_prompt


@dataclass(frozen=True)
class Inputs:
    """What the user's files and names came to."""

    model: ModelSource
    system_prompt: str
    lines: tuple[PromptLine, ...]


def read_inputs(config: GenerateConfig) -> Inputs:
    """Read the files `config` names. Raises `UserError`."""
    lines = read_prompts(config.prompts)
    batch = len(lines) if config.batch is None else config.batch
    if batch > len(lines):
        raise UserError(
            f"--batch {batch} asks for more prompts than there are: "
            f"{config.prompts or 'the shipped questions'} has {len(lines)}"
        )
    return Inputs(
        model=parse_model(config.model),
        system_prompt=read_system_prompt(config.system_prompt),
        lines=lines[:batch],
    )
