"""The options `--heads` and `--head-share`: which KV heads of the model keep all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import tyro

from experiments.harness.errors import UserError

if TYPE_CHECKING:
    from models import Decoder

DEFAULT_SHARE = 0.5
"""The paper's for grouped queries (arXiv 2410.10819, section 3.1)."""

HeadsFolder = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FOLDER",
        help="Which KV heads keep all tokens, where others see the first and the last alone: a "
        "folder that `heads` has written, or one that DuoAttention has published.",
        help_behavior_hint="(default: all keep all)",
    ),
]
"""The option `--heads` of all that run a model."""

HeadShare = Annotated[
    float | None,
    tyro.conf.arg(
        metavar="FLOAT",
        help="With --heads: the share of the KV heads that keep all tokens.",
        help_behavior_hint=f"(default: {DEFAULT_SHARE})",
    ),
]
"""The option `--head-share` beside it."""


class WithHeads(Protocol):
    """A config with both options."""

    @property
    def heads(self) -> Path | None: ...

    @property
    def head_share(self) -> float | None: ...


def check_heads(config: WithHeads) -> None:
    """Raise `UserError` or `HeadPatternError` for `--heads` or `--head-share` that no model could
    use."""
    share = config.head_share
    if config.heads is None:
        if share is not None:
            raise UserError(f"--head-share {share} says how many of --heads, which is not given")
        return
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"--head-share must be from 0 to 1, got {share}")
    from models.head_patterns import read_pattern  # and JAX, which --help can do without

    read_pattern(config.heads)


@dataclass(frozen=True)
class ChosenHeads:
    """Those of a pattern's folder that keep all tokens."""

    folder: Path
    share: float

    def given_to(self, model: Decoder) -> Decoder:
        """The model with the windows of the others.

        Raises:
            HeadPatternError: the pattern is for another model.
        """
        from models.head_patterns import load_pattern, with_pattern

        return with_pattern(model, load_pattern(self.folder, model), self.share)


def chosen_heads(config: WithHeads) -> ChosenHeads | None:
    """By both options; None where all heads keep all tokens."""
    if config.heads is None:
        return None
    share = DEFAULT_SHARE if config.head_share is None else config.head_share
    return ChosenHeads(config.heads, share)
