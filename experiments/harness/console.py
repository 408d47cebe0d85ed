"""Where tables for people go: standard output, unless only JSON is wanted there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 120  # a file or a pipe has no width to fit
NARROWEST = 80  # narrower tables would lose digits; a narrower terminal wraps their lines

_quiet = False


def make_console() -> Console:
    """A console for standard output: silent under `--json`, plain text where nobody watches.

    `NO_COLOR`, `FORCE_COLOR` and `COLUMNS` are respected.
    """
    from rich.console import Console

    console = Console(highlight=False, quiet=_quiet)
    if not (console.is_terminal or "COLUMNS" in os.environ):
        console.width = FILE_WIDTH
    console.width = max(console.width, NARROWEST)
    return console


@contextmanager
def quiet_consoles(quiet: bool = True) -> Iterator[None]:
    """While the block runs, consoles that are made print nothing."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before
