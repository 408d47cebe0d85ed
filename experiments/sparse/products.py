"""How many products of queries with tokens attention takes that reads a part: its work, whatever
the machine makes of it."""

from __future__ import annotations

import math

import numpy as np

from pallas_kernels.selection import ChunkSelector


def of_selector(selector: ChunkSelector, positions: np.ndarray, chunk_size: int) -> float:
    """A query's products with keys and with values, the mean over queries at these positions, those
    by which they choose among them.

    A query chooses for `refresh` of them. By scores it looks at all keys before its chunk, by
    bounds at two for each chunk, and by descent at a chunk in the middle of each half of as many
    groups as it wants chunks, in each round (HiP, arXiv 2406.09827, Algorithm 1).
    """
    own, columns = positions // chunk_size, int(positions.max()) // chunk_size + 1
    number = selector.counts(columns)[own]
    read = (number - 1) * chunk_size + positions % chunk_size + 1
    always = selector.always(own + 1)
    looked = {
        "scores": own * chunk_size,
        "oracle": own * chunk_size,
        "bounds": own * 2,
        "hip": [
            _of_descent(int(chunks), int(wanted)) * chunk_size
            for chunks, wanted in zip(own + 1 - always, number - always, strict=True)
        ],
    }.get(selector.policy, np.zeros(len(own)))
    chooses = number <= own
    return float(np.mean(2 * read + np.where(chooses, looked, 0) / selector.refresh))


def of_window(window: int | None, positions: np.ndarray) -> float:
    """The same of a query that reads the last tokens, or all."""
    seen = positions + 1 if window is None else np.minimum(positions + 1, window)
    return float(np.mean(2 * seen))


def _of_descent(chunks: int, wanted: int) -> int:
    if not 0 < wanted < chunks:
        return 0
    return 2 * wanted * math.ceil(math.log2(chunks / wanted))
