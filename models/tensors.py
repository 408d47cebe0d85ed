"""What a loader asks of a checkpoint, whatever its format."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np


class Tensors(Protocol):
    """A checkpoint's tensors, read one by one.

    Reading them all in turn makes resident memory grow by little more than the largest of them, as
    long as the caller keeps none. (`with file.tensor(name) as values` keeps `values` until the name
    is bound again: `del` it, or read in a function. Of a mapped tensor even that keeps nothing.)
    """

    @property
    def path(self) -> Path:
        """The file, or the folder, that messages name."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by name, outermost first."""
        ...

    @property
    def total_bytes(self) -> int:
        """Bytes that all tensors take on disk."""
        ...

    def tensor(self, name: str) -> AbstractContextManager[np.ndarray]:
        """The values, of shape `shapes[name]`, to be read and not written inside the context.

        Raises KeyError for an unknown name, CheckpointError when the values cannot be had.
        """
        ...


def drop_pages(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Take the pages that hold bytes `begin` to `end` of a mapped file out of resident memory.

    They are read again from the file when they are touched again. Where the platform cannot do
    that, they go when the mapping goes.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin -= begin % mmap.PAGESIZE
    if begin < end:
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)
