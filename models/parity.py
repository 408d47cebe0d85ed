"""How closely this decoder agrees with transformers: what the parity tests last measured.

`parity.json` is written by those tests, from tiny checkpoints of every architecture that both sides
load in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.architectures import ARCHITECTURES
from models.differences import describe_differences

PATH = Path(__file__).with_name("parity.json")
NOT_MEASURED = "not measured"
GGUF_ARCHITECTURES = frozenset(
    name for name, architecture in ARCHITECTURES.items() if architecture.gguf is not None
)
"""Class names of the architectures whose GGUF files load."""

_HEADINGS = (
    "architecture",
    "models",
    "beside Llama",
    "GGUF",
    "largest logit difference",
    "greedy tokens",
)
_RULES = ("---", "---", "---", "---", "---:", "---:")


@dataclass(frozen=True)
class ParityCase:
    """One checkpoint, loaded by both sides.

    Attributes:
      class_name: its architecture.
      what: what it tests.
      max_abs_logit_difference: over all positions of all prompts.
      greedy_tokens, greedy_tokens_equal: how many were decoded, and whether all were the same.
      format: of the file that was loaded here.
    """

    class_name: str
    what: str
    max_abs_logit_difference: float
    greedy_tokens: int
    greedy_tokens_equal: bool
    format: Literal["safetensors", "gguf"]


@dataclass(frozen=True)
class Agreement:
    """All cases of an architecture: how many, the worst difference, and their greedy tokens."""

    cases: int
    max_abs_logit_difference: float
    greedy_tokens: int
    greedy_tokens_equal: bool

    @property
    def tokens_in_words(self) -> str:
        return f"{self.greedy_tokens:,} equal" if self.greedy_tokens_equal else "not equal"


@dataclass(frozen=True)
class Parity:
    """What was measured, when, and with which versions; cases by name."""

    versions: Mapping[str, str]
    date: str
    cases: Mapping[str, ParityCase]

    def agreement(self, class_name: str) -> Agreement | None:
        """None when no case has this architecture."""
        cases = [case for case in self.cases.values() if case.class_name == class_name]
        if not cases:
            return None
        return Agreement(
            cases=len(cases),
            max_abs_logit_difference=max(case.max_abs_logit_difference for case in cases),
            greedy_tokens=sum(case.greedy_tokens for case in cases),
            greedy_tokens_equal=all(case.greedy_tokens_equal for case in cases),
        )


def read_parity(path: Path = PATH) -> Parity | None:
    """What was measured; None when nothing was yet, and there is no file.

    Raises:
      ValueError: the file is not such a record.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        cases = {name: ParityCase(**case) for name, case in record["cases"].items()}
        return Parity(record["versions"], record["date"], cases)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no record of parity: {error!r}; run its tests anew") from error


def markdown_table(parity: Parity | None = None) -> str:
    """The table of architectures for the README, in Markdown; it ends without a newline.

    Args:
      parity: what was measured; None reads it.
    """
    parity = parity or read_parity()
    rows = [_HEADINGS, _RULES, *(_row(class_name, parity) for class_name in ARCHITECTURES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(class_name: str, parity: Parity | None) -> tuple[str, ...]:
    architecture = ARCHITECTURES[class_name]
    agreement = parity.agreement(class_name) if parity else None
    return (
        f"`{class_name}`",
        architecture.models,
        describe_differences(architecture),
        "yes" if class_name in GGUF_ARCHITECTURES else "no",
        f"{agreement.max_abs_logit_difference:.1e}" if agreement else NOT_MEASURED,
        agreement.tokens_in_words if agreement else NOT_MEASURED,
    )
