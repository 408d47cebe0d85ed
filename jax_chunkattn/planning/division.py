"""A division of the work between the two phases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_chunkattn.planning.work_items import Items


@dataclass(frozen=True)
class Division:
    """What is read as work items, what by each row itself, and why.

    Letters: B rows, P columns of the block table.
    """

    items: Items
    private: np.ndarray  # bool [B, P]: entries read in the sequence-first phase, tails included
    covered: np.ndarray  # int32 [B]: full chunks of the row that items cover
    shared_items: int  # these two before items are cut
    private_items: int
    chunk_reads: int
    unshared_chunk_reads: int  # the same if every row read its own
    reason: str
    packing: str
    seconds: float | None = None
    unshared_seconds: float | None = None


def chunk_reads_saved(reads: int, unshared_reads: int) -> str:
    return f"{unshared_reads - reads} of {unshared_reads} chunk reads saved"


SWITCHED_OFF = "sharing is switched off"
NOTHING_IN_COMMON = "no two rows have a full chunk in common"
TOO_SHORT = "the common prefixes are too short to pay for a work item"
