"""Messages to the user that more than one module writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MOST_NAMED = 5


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def tell(message: str) -> None:
    """A line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)
