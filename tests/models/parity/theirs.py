"""A case's checkpoint, written by transformers, and what transformers makes of it."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from models.safetensors_folder import read_folder
from tests.models.parity.cases import PROMPTS, Case
from tests.models.parity.recipe import draw

torch.set_num_threads(1)  # others would wait for the next of many small products, busily


def make_model(case: Case) -> Any:
    """transformers' model of this case in float32, with the recipe's weights."""
    model_class = getattr(transformers, case.class_name)
    model = model_class(model_class.config_class(**case.config))
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return model


def write_checkpoint(case: Case, model: Any, folder: Path) -> None:
    """Saves it as transformers does."""
    saved = model.base_model if case.bare else model
    saved.config.architectures = [case.class_name]
    options = {}
    if case.shards > 1:
        size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
        options["max_shard_size"] = size // case.shards + 1
    saved.save_pretrained(folder, **options)
    if case.bare:  # the base class puts its own name there
        config = type(model.config).from_pretrained(folder)
        config.architectures = [case.class_name]
        config.save_pretrained(folder)


def describe(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config.json of a checkpoint, and the shapes of its tensors."""
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: list(shape) for name, shape in read_folder(folder).shapes.items()}
    return config, shapes


def prompt_logits(model: Any) -> list[np.ndarray]:
    """Logits `[T, V]` of both prompts."""
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]


def choices_behind(model: Any, answers: list[list[int]]) -> tuple[list[list[int]], float]:
    """The likeliest token in the place of each of `answers`' to both prompts, and the smallest gap
    between one and the next best.

    Where they are the answers themselves, these are, by induction, what the model decodes greedily.
    """
    tokens, smallest = [], float("inf")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        best = torch.topk(logits, 2).values
        smallest = min(smallest, float((best[:, 0] - best[:, 1]).min()))
        tokens.append(logits.argmax(dim=-1).tolist())
    return tokens, smallest
