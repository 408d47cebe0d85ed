"""What a declared architecture has to fulfil, so that a new one is complete."""

from __future__ import annotations

import dataclasses

import pytest

from models.architectures import ARCHITECTURES
from models.differences import default_config
from models.layout import Layout, every_weight, pieces

LAYOUTS = {
    f"{name} {kind}": (name, layout)
    for name, architecture in ARCHITECTURES.items()
    for kind, layout in (
        ("safetensors", architecture.layout),
        ("gguf", architecture.gguf and architecture.gguf.layout),
    )
    if layout is not None
}


@pytest.mark.parametrize(("class_name", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_has_a_tensor_for_every_weight_and_no_other(class_name: str, layout: Layout):
    config = default_config(ARCHITECTURES[class_name])
    config = dataclasses.replace(config, tie_embeddings=False)
    asked = {
        piece.part
        for name, layer in every_weight(config)
        for piece in pieces(layout, config, name, layer)
    }
    named = [part for parts in layout.tensors.values() for part in parts]
    assert sorted(named) == sorted(asked)
