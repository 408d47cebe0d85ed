"""Checks the tensors of a checkpoint as a whole, then copies them into a decoder's arrays."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

import numpy as np

from models.building import Fill
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.layout import Layout, expected_shapes, pieces, place
from models.messages import listed
from models.tensors import Tensors


def matching_layout(tensors: Tensors, layout: Layout, config: DecoderConfig) -> Layout:
    """The layout, with the prefix if the checkpoint's tensors have it.

    Raises:
      CheckpointError: tensors are missing, have another shape, or are not the decoder's; one
        message names all of them.
    """
    if layout.prefix and not any(name.startswith(layout.prefix) for name in tensors.shapes):
        layout = layout.without_prefix()
    expected = expected_shapes(layout, config)
    found = {name: shape for name, shape in tensors.shapes.items() if not layout.ignores(name)}
    if config.tie_embeddings:  # a copy of it that a file has is not read
        found = {name: shape for name, shape in found.items() if name not in _unembedding(layout)}
    complaints = [
        f"{what}: {listed(names)}"
        for what, names in [
            ("missing tensors", sorted(expected.keys() - found.keys())),
            ("tensors this decoder does not use", sorted(found.keys() - expected.keys())),
            (
                "tensors of another shape",
                sorted(
                    f"{name} (is {list(found[name])}, expected {list(shape)})"
                    for name, shape in expected.items()
                    if found.get(name, shape) != shape
                ),
            ),
        ]
        if names
    ]
    if complaints:
        raise CheckpointError(f"{tensors.path}: {'; '.join(complaints)}")
    return layout


def checkpoint_fill(tensors: Tensors, layout: Layout, config: DecoderConfig) -> Fill:
    """A `Fill` that reads each weight from the checkpoint when it is asked for.

    Raises:
      CheckpointError: as `matching_layout`, before any is read.
    """
    layout = matching_layout(tensors, layout, config)

    def fill(name: str, layer: int | None, out: np.ndarray) -> None:
        found = sorted(pieces(layout, config, name, layer), key=attrgetter("tensor"))
        for tensor, group in groupby(found, key=attrgetter("tensor")):
            with tensors.tensor(tensor) as stored:
                for piece in group:
                    place(out, piece, stored, layout, config)

    return fill


def _unembedding(layout: Layout) -> set[str]:
    return {f"{stem}.weight" for stem, parts in layout.tensors.items() if "unembedding" in parts}
