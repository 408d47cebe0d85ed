"""Which layers have sliding windows, and which rotate, by config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.architectures.declaration import Rotary, Windows
from models.errors import CheckpointError
from models.messages import listed
from models.sizes import is_size, shown, size_error

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_types(
    config: Mapping[str, Any], windows: Windows | None, rotates: Sequence[bool]
) -> list[str]:
    """The type of each layer: `FULL`, or `SLIDING` where it has a window; `rotates` says whether
    each layer rotates queries and keys.

    Raises:
      CheckpointError: config.json has other types, or not one for each layer.
    """
    num_layers = len(rotates)
    if windows is None or (windows.if_used and not config.get("use_sliding_window", False)):
        return [FULL] * num_layers
    if (declared := config.get("layer_types")) is not None:
        if not isinstance(declared, list):
            raise CheckpointError(f"layer_types is {shown(declared)}, expected a list")
        kinds = declared
        if unknown := sorted({shown(kind) for kind in kinds if kind not in LAYER_TYPES}):
            raise CheckpointError(f"layers of type {listed(unknown)} are not supported")
        if len(kinds) != num_layers:
            raise CheckpointError(f"layer_types names {len(kinds)} layers of {num_layers}")
        return kinds
    if windows.unless_rotating:
        return [FULL if rotating else SLIDING for rotating in rotates]
    if windows.pattern is not None:
        pattern = config.get("sliding_window_pattern", windows.pattern)
        if not is_size(pattern):
            raise CheckpointError(size_error("sliding_window_pattern", pattern))
        return [LAYER_TYPES[(layer + 1) % pattern != 0] for layer in range(num_layers)]
    first = config.get("max_window_layers", windows.first)
    if not is_size(first, least=0):
        raise CheckpointError(size_error("max_window_layers", first, least=0))
    return [LAYER_TYPES[layer >= first] for layer in range(num_layers)]


def rotating_layers(
    config: Mapping[str, Any], rotary: Rotary | None, num_layers: int
) -> list[bool]:
    """Whether each layer rotates queries and keys.

    Raises:
      CheckpointError: config.json has not an entry for each layer, or no valid interval.
    """
    if rotary is None:
        return [False] * num_layers
    if rotary.nope_interval is None:
        return [True] * num_layers
    declared = config.get("no_rope_layers")  # 1 means that a layer does rotate
    if declared is not None:
        if not isinstance(declared, list) or len(declared) < num_layers:
            raise CheckpointError(f"no_rope_layers is no list of {num_layers} layers")
        return [bool(layer) for layer in declared[:num_layers]]
    interval = config.get("no_rope_layer_interval", rotary.nope_interval)
    if not is_size(interval):
        raise CheckpointError(size_error("no_rope_layer_interval", interval))
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]
