"""The options `--select`, `--keep` and `--dense-layers`: which of the chunks before its own a query
reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from experiments.harness.errors import UserError

if TYPE_CHECKING:
    from models import Decoder
    from pallas_kernels.selection import ChunkSelector

POLICIES = ("scores", "bounds", "hip")
YARDSTICKS = ("oracle", "recent", "random")
DEFAULT_KEEP = 0.4
"""SmolLM2 then copies as if it read all; with half of it not everywhere."""

SelectPolicy = Annotated[
    str | None,
    tyro.conf.arg(
        metavar=f"{{{','.join(POLICIES)}}}",
        help="By what a query chooses the chunks that it reads: scores of 4-bit keys, bounds of "
        "the keys (Quest), or descent (HiP). The last two lose what has to be copied word by word.",
        help_behavior_hint="(default: all are read)",
    ),
]
"""The option `--select` of what runs an engine; see `pallas_kernels.selection`."""

KeepShare = Annotated[
    float | None,
    tyro.conf.arg(
        metavar="FLOAT",
        help="With --select: the share of the chunks before it that a query reads.",
        help_behavior_hint=f"(default: {DEFAULT_KEEP})",
    ),
]
"""The option `--keep` beside it."""

DenseLayers = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FILE",
        help="With --select: layers whose queries read everything, in a file that `layers` has "
        "written for the model.",
        help_behavior_hint="(default: none)",
    ),
]
"""The option `--dense-layers` beside both."""

CHOICES = f"[{{{','.join(POLICIES + YARDSTICKS)}}}:SHARE ...]"
"""How several policies with their shares are shown, see `named_selector`."""


class WithSelection(Protocol):
    """A config with both options."""

    @property
    def select(self) -> str | None: ...

    @property
    def keep(self) -> float | None: ...

    @property
    def dense_layers(self) -> Path | None: ...


def check_selection(config: WithSelection, chunk_size: int) -> None:
    """Raise `UserError` for `--select` or `--keep` that no engine could use."""
    if config.select is None:
        if config.keep is not None:
            raise UserError(f"--keep {config.keep} says how much of --select, which is not given")
        check_dense_layers(config.dense_layers, ())
        return
    check_choice(config.select, config.keep, known=POLICIES)
    _check_fit(config.select, _selector(config.select, config.keep), chunk_size)
    check_dense_layers(config.dense_layers, (config.select,))


def check_dense_layers(file: Path | None, select: Sequence[str]) -> None:
    """Raise `UserError` or `LayerFileError` for `--dense-layers` that no model could use."""
    if file is None:
        return
    if not select:
        raise UserError(f"--dense-layers {file} are layers beside --select, which is not given")
    from models.dense_layers import DENSE_LAYERS

    DENSE_LAYERS.read(file)


def given_dense_layers(file: Path | None, model: Decoder) -> tuple[int, ...]:
    """Those of `--dense-layers`.

    Raises:
        LayerFileError: the file is for another model.
    """
    if file is None:
        return ()
    from models.dense_layers import load_dense_layers

    return load_dense_layers(file, model)


def check_choices(select: tuple[str, ...], chunk_size: int) -> None:
    """Raise `UserError` for a choice among `--select` that no engine could make."""
    for choice in select:
        _check_fit(choice, named_selector(choice), chunk_size)


def _check_fit(name: str, selector: ChunkSelector, chunk_size: int) -> None:
    try:
        selector.check(chunk_size, 1)
    except ValueError as error:
        raise UserError(f"--select {name}: {error}") from error


def check_choice(policy: str, keep: float | None, *, known: tuple[str, ...]) -> None:
    """Raise `UserError` for a policy that is not known, or a share that there is none of."""
    if policy not in known:
        raise UserError(f"--select must be one of {', '.join(known)}, got {policy}")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {keep}")


def named_selector(choice: str, **how: Any) -> ChunkSelector:
    """The selector of a policy, or yardstick, and a share, as in "scores:0.2", otherwise as said.

    Raises:
        UserError: for what is none.
    """
    policy, _, share = choice.partition(":")
    try:
        keep = float(share)
    except ValueError:
        raise UserError(f"--select takes POLICY:SHARE, such as scores:0.2, got {choice}") from None
    check_choice(policy, keep, known=POLICIES + YARDSTICKS)
    return _selector(policy, keep, **how)


def chosen_selector(config: WithSelection, model: Decoder, **how: Any) -> ChunkSelector | None:
    """What `CacheConfig` takes for them, otherwise as said.

    Raises:
        LayerFileError: `--dense-layers` is for another model.
    """
    if config.select is None:
        return None
    dense = given_dense_layers(config.dense_layers, model)
    return _selector(config.select, config.keep, dense_layers=dense, **how)


def _selector(policy: str, keep: float | None, **how: Any) -> ChunkSelector:
    from pallas_kernels.selection import ChunkSelector  # and JAX, which --help can do without

    return ChunkSelector(DEFAULT_KEEP if keep is None else keep, policy, **how)
