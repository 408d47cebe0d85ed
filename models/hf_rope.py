"""Which layers rotate how, by config.json: in transformers' words from version 5 on, and before.

From version 5 on `rope_parameters` has it all, for all layers or by type of layer; before, the base
was `rope_theta`, and what scales it `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from models.architectures import Architecture
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.rope import (
    FactorScaling,
    LayerRopes,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
    yarn_attention_factor,
)

LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_types(
    config: Mapping[str, Any], architecture: Architecture, num_layers: int
) -> list[str]:
    """Of each layer, whether it sees everything or a window.

    Raises:
      CheckpointError: config.json says something else.
    """
    if (declared := config.get("layer_types")) is not None:
        kinds = list(declared)
        if unknown := sorted({str(kind) for kind in kinds if kind not in LAYER_TYPES}):
            raise CheckpointError(f"layers of type {', '.join(unknown)} are not supported")
        if len(kinds) != num_layers:
            raise CheckpointError(f"layer_types names {len(kinds)} layers of {num_layers}")
        return kinds
    windows = architecture.windows
    if windows.if_used and not config.get("use_sliding_window", False):
        return ["full_attention"] * num_layers
    if windows.pattern is not None:
        pattern = config.get("sliding_window_pattern") or windows.pattern
        return [LAYER_TYPES[(layer + 1) % pattern != 0] for layer in range(num_layers)]
    first = config.get("max_window_layers", 0)
    return [LAYER_TYPES[layer >= first] for layer in range(num_layers)]


def read_ropes(
    config: Mapping[str, Any],
    architecture: Architecture,
    decoder: DecoderConfig,
    max_positions: int | None,
) -> Rope | LayerRopes:
    """The rotary embedding of all layers, or of each where they differ.

    Raises:
      CheckpointError: an unknown scaling, a key that it lacks, or one that a cache cannot follow.
    """
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(kind in params for kind in LAYER_TYPES):
        by_type = {kind: params.get(kind) or {} for kind in LAYER_TYPES}
    else:
        by_type = {"full_attention": params, "sliding_attention": params}
        if architecture.local_theta is not None:
            by_type["sliding_attention"] = {"rope_theta": config.get("rope_local_base_freq")}
    theta = config.get("rope_theta") or architecture.theta
    thetas = {"full_attention": theta, "sliding_attention": architecture.local_theta or theta}
    limit = max_positions or decoder.max_positions
    ropes: dict[str, Rope] = {}
    for kind in LAYER_TYPES:
        reader = _Reader(config, by_type[kind], decoder, limit)
        ropes[kind] = reader.rope(thetas[kind])
    kinds = layer_types(config, architecture, decoder.num_layers)
    rotates = _rotating_layers(config, architecture, decoder.num_layers)
    layers = tuple(
        ropes[kind] if rotating else None for kind, rotating in zip(kinds, rotates, strict=True)
    )
    return layers[0] if len(set(layers)) == 1 and layers[0] is not None else layers


def _rotating_layers(
    config: Mapping[str, Any], architecture: Architecture, num_layers: int
) -> list[bool]:
    if architecture.nope_interval is None:
        return [True] * num_layers
    declared = config.get("no_rope_layers")  # whose 1 means that a layer does rotate
    if declared:
        return [bool(layer) for layer in declared]
    interval = config.get("no_rope_layer_interval") or architecture.nope_interval
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


class _Reader:
    """Reads one set of rope parameters."""

    def __init__(
        self,
        config: Mapping[str, Any],
        params: Mapping[str, Any],
        decoder: DecoderConfig,
        limit: int,
    ) -> None:
        self._config = config
        self._params = params
        self._decoder = decoder
        self._limit = limit
        self.kind = params.get("rope_type") or params.get("type") or "default"

    def rope(self, theta: float) -> Rope:
        known = SCALINGS.get(self.kind)
        if known is None:
            raise CheckpointError(
                f"rotary scaling {self.kind!r} is not supported; supported are "
                f"{', '.join(SCALINGS)}"
            )
        head_dim = self._decoder.head_dim
        part = self._get("partial_rotary_factor") or self._config.get("partial_rotary_factor")
        dims = None if part in (None, 1, 1.0) else int(head_dim * part)
        return Rope(float(self._get("rope_theta") or theta), known(self), dims)

    def unscaled(self) -> None:
        """`default`; and `dynamic`, which scales only sequences longer than the model's positions.

        As they grow, all keys would have to be turned anew; none is that long here.
        """

    def linear(self) -> Scaling:
        return LinearScaling(self._number("factor"))

    def llama3(self) -> Scaling:
        return Llama3Scaling(
            self._number("factor"),
            self._number("low_freq_factor"),
            self._number("high_freq_factor"),
            self._original_positions(),
        )

    def yarn(self) -> Scaling:
        original = self._original_positions()
        factor = self._get("factor") or self._decoder.max_positions / original
        attention_factor = self._get("attention_factor")
        mscale, all_dims = self._get("mscale"), self._get("mscale_all_dim")
        if attention_factor is None and mscale and all_dims:
            attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(
                factor, all_dims
            )
        return YarnScaling(
            float(factor),
            original,
            self._get("beta_fast") or 32.0,
            self._get("beta_slow") or 1.0,
            attention_factor,
            self._params.get("truncate", True),
        )

    def longrope(self) -> Scaling:
        """LongRoPE has other frequencies for sequences longer than the original context."""
        original = self._original_positions()
        if self._limit > original:
            raise CheckpointError(
                f"rotary scaling 'longrope' turns sequences of more than {original:,} tokens "
                "another way, which cached keys cannot follow; load with "
                f"max_positions={original} (--max-positions {original})"
            )
        factor = self._get("factor") or self._decoder.max_positions / original
        attention_factor = self._get("attention_factor")
        if attention_factor is None:
            warmer = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            attention_factor = warmer
        factors = self._params.get("short_factor")
        if not isinstance(factors, list):
            raise CheckpointError("rotary scaling 'longrope' has no list 'short_factor'")
        return FactorScaling(tuple(map(float, factors)), float(attention_factor))

    def _get(self, name: str) -> Any:
        return self._params.get(name)

    def _number(self, name: str) -> float:
        value = self._get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"rotary scaling {self.kind!r} has no number {name!r}")
        return float(value)

    def _original_positions(self) -> int:
        name = "original_max_position_embeddings"
        value = self._get(name) or self._config.get(name)
        return int(value or self._decoder.max_positions)


SCALINGS: dict[str, Callable[[_Reader], Scaling | None]] = {
    "default": _Reader.unscaled,
    "dynamic": _Reader.unscaled,
    "linear": _Reader.linear,
    "llama3": _Reader.llama3,
    "yarn": _Reader.yarn,
    "longrope": _Reader.longrope,
}
