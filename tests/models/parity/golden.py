"""What transformers made of a case, small enough to be kept: one file for each architecture.

The weights are not in it: they are drawn again by the recipe, and written anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.parity.cases import CASES, PROMPTS
from tests.models.parity.recipe import draw
from tests.models.safetensors_writer import write_safetensors

FOLDER = Path(__file__).parent / "golden"
LAST_POSITIONS = 6
"""Of each prompt, whose logits are kept."""

NAMES = list({case.class_name: name for name, case in reversed(CASES.items())}.values())
"""The first case of each architecture."""
FAST = {"gemma3", "gpt2", "olmo2"}
"""Together they have every kind of norm, position and MLP; the others are slow tests."""


@dataclass(frozen=True)
class Golden:
    """A checkpoint without its weights, and the logits [P, V] and tokens of each prompt."""

    config: dict[str, Any]
    shapes: dict[str, list[int]]
    logits: list[np.ndarray]
    tokens: list[list[int]]

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(
            path,
            config=np.array(json.dumps(self.config)),
            shapes=np.array(json.dumps(self.shapes)),
            logits=np.stack(self.logits),
            tokens=np.array(self.tokens, np.int32),
        )

    @classmethod
    def read(cls, path: Path) -> Golden:
        with np.load(path) as archive:
            return cls(
                json.loads(str(archive["config"])),
                json.loads(str(archive["shapes"])),
                list(archive["logits"]),
                archive["tokens"].tolist(),
            )

    def write_checkpoint(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        weights = {name: draw(name, tuple(shape)) for name, shape in self.shapes.items()}
        write_safetensors(folder / "model.safetensors", weights)


def last_logits(logits: list[np.ndarray]) -> list[np.ndarray]:
    """Those that are kept, of the logits `[T, V]` of both prompts."""
    assert len(logits) == len(PROMPTS)
    return [one[-LAST_POSITIONS:] for one in logits]
