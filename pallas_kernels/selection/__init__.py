"""Which chunks a query reads: the best by its scores, beside the first and the last ones."""

from __future__ import annotations

from pallas_kernels.selection.asking import Asking, ItemColumns, asking_rows, asking_tokens
from pallas_kernels.selection.choosing import choose
from pallas_kernels.selection.chosen_tiles import RowChoice
from pallas_kernels.selection.landmarks import Landmarks
from pallas_kernels.selection.selected_plans import (
    blocks_of_tokens,
    selected_rows,
    selected_tokens,
)
from pallas_kernels.selection.selector import POLICIES, YARDSTICKS, ChunkSelector

__all__ = [
    "POLICIES",
    "YARDSTICKS",
    "Asking",
    "ChunkSelector",
    "ItemColumns",
    "Landmarks",
    "RowChoice",
    "asking_rows",
    "asking_tokens",
    "blocks_of_tokens",
    "choose",
    "selected_rows",
    "selected_tokens",
]
