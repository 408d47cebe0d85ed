"""The rotary embedding that config.json describes, in transformers 5's keys or in the older ones.

From version 5 on `rope_parameters` has all of it, for all layers or by type of layer; before, the
base was `rope_theta`, and its scaling `rope_scaling`. Keys are read as transformers 5.24 reads them
(modeling_rope_utils.py, and the configuration of each architecture), and those that it ignores are
ignored. Refused are what it raises an error for, and a scaling that it warns of and leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models.architectures.declaration import Architecture, Rotary
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.hf_layers import FULL, LAYER_TYPES, SLIDING, layer_types, rotating_layers
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
from models.sizes import is_number, is_positive, is_size, shown, size_error

ORIGINAL = "original_max_position_embeddings"
BESIDE = f"{ORIGINAL} beside the scaling"
PART = "partial_rotary_factor"

Words = Mapping[str, Any]


def read_ropes(
    config: Words,
    architecture: Architecture,
    rotary: Rotary,
    decoder: DecoderConfig,
    max_positions: int | None,
) -> Rope | LayerRopes:
    """The rotary embedding of all layers, or of each where they differ.

    Raises:
      CheckpointError: an unknown scaling, one without a key that it needs, or one that would change
        keys that are already cached.
    """
    limit = max_positions or decoder.max_positions
    ropes = {
        kind: _Reader(words, architecture, rotary, decoder, limit).rope()
        for kind, words in _words_by_type(config, architecture, rotary).items()
    }
    rotates = rotating_layers(config, rotary, decoder.num_layers)
    kinds = layer_types(config, architecture.windows, rotates)
    layers = tuple(
        ropes.get(kind, ropes[FULL]) if rotating else None
        for kind, rotating in zip(kinds, rotates, strict=True)
    )
    return layers[0] if len(set(layers)) == 1 and layers[0] is not None else layers


def _words_by_type(
    config: Words, architecture: Architecture, rotary: Rotary
) -> dict[str, dict[str, Any]]:
    """What config.json says of each type of layer; of all layers, where there is only one entry.

    Of a key that occurs twice, `rope_scaling` wins over `rope_parameters`, and both over the top
    level of config.json; except the original context, for which the top level wins.
    """
    scaling, params = _object(config, "rope_scaling"), _object(config, "rope_parameters")
    theta = config.get("rope_theta", rotary.theta)
    beside = {PART: config[PART]} if PART in config else {}
    if not rotary.scalings.turns_part and config.get(PART) is None:
        beside = {}
    if rotary.local_theta is None:
        words = scaling or params or {}
        if by_type := [kind for kind in LAYER_TYPES if kind in words]:
            raise CheckpointError(
                f"rotary embedding for layers of {by_type[0]}: {architecture.class_name} has one "
                "for all layers"
            )
        words = {"rope_theta": theta, **beside, **words}
        original = config.get(ORIGINAL, rotary.scalings.original_positions)
        if original is not None or ORIGINAL in config:
            words[BESIDE] = original
        return {FULL: words}
    local = config.get("rope_local_base_freq", rotary.local_theta)
    if scaling is not None and params is not None and params.get(FULL) is None:
        raise CheckpointError(f"rope_scaling beside rope_parameters without {FULL!r}")
    outer = params or {}
    # YaRN's `truncate` is looked up beside the types of layers, and not in them.
    truncate = {"truncate": outer.get("truncate", True)}
    full = (_object(outer, FULL) or {"rope_type": "default"}) | (scaling or {})
    sliding = _object(outer, SLIDING) or {}
    return {
        FULL: {"rope_theta": theta, **beside, **full, **truncate},
        SLIDING: {"rope_theta": local, **beside, **sliding, **truncate},
    }


def _object(words: Words, name: str) -> dict[str, Any] | None:
    value = words.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{name} is {shown(value)}, expected an object")
    return value if value is None else dict(value)


class _Reader:
    """Reads the keys for one type of layer."""

    def __init__(
        self,
        words: Words,
        architecture: Architecture,
        rotary: Rotary,
        decoder: DecoderConfig,
        limit: int,
    ) -> None:
        self._words = words
        self._architecture = architecture
        self._scalings = rotary.scalings
        self._decoder = decoder
        self._limit = limit
        self._named = words["rope_type"] if "rope_type" in words else words.get("type", "default")
        self._names = self._scalings.names or {name: name for name in SCALINGS}
        self.kind = self._names.get(self._named) if isinstance(self._named, str) else None

    def rope(self) -> Rope:
        if self.kind is None:
            raise CheckpointError(
                f"rotary scaling {shown(self._named)} is not supported; supported are "
                f"{', '.join(self._names)}"
            )
        scaling = SCALINGS[self.kind](self)
        rope = Rope(self._number("rope_theta", "rotary embedding"), scaling, self._dims())
        with np.errstate(all="ignore"):
            frequencies, _ = rope.frequencies(self._decoder.head_dim)
        if not np.isfinite(frequencies).all():
            raise CheckpointError(f"rotary scaling {self.kind!r}: frequencies are not finite")
        return rope

    def _dims(self) -> int | None:
        """How many dimensions rotate; None: all."""
        if not self._scalings.turns_part and self.kind == "default":
            return None
        if PART not in self._words:
            return None
        head_dim = self._decoder.head_dim
        self._number(PART, "rotary embedding")
        dims = int(head_dim * self._words[PART])  # exact where it is a Fraction
        if dims == head_dim:
            return None
        if dims > head_dim:
            raise CheckpointError(f"of a head_dim of {head_dim}, {dims} cannot rotate")
        if not self._scalings.turns_part:
            raise CheckpointError(
                f"{PART} is {shown(self._words[PART])}; heads of "
                f"{self._architecture.class_name} turn whole"
            )
        return dims

    def unscaled(self) -> None:
        if self._words.get("factor") not in (None, 1):
            raise CheckpointError(
                f"rotary scaling 'default' has a factor of {shown(self._words['factor'])}; "
                f"expected a rope_type that scales by it: {', '.join(self._names)}"
            )

    def dynamic(self) -> None:
        """No scaling: it applies only to sequences longer than the model's positions.

        No sequence is that long here.
        """
        self._number("factor")

    def linear(self) -> Scaling:
        return LinearScaling(self._number("factor"))

    def llama3(self) -> Scaling:
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        if low >= high:
            raise CheckpointError(
                f"rotary scaling 'llama3' has a low_freq_factor of {low} and a high_freq_factor "
                f"of {high}, which must be more"
            )
        return Llama3Scaling(self._number("factor"), low, high, self._original_positions())

    def yarn(self) -> Scaling:
        original = self._original_positions()
        factor = self._factor(original)
        attention_factor = self._option("attention_factor", least=0)
        mscale, all_dims = self._option("mscale"), self._option("mscale_all_dim")
        if attention_factor is None and mscale and all_dims:
            attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(
                factor, all_dims
            )
        return YarnScaling(
            factor,
            original,
            self._option("beta_fast") or 32.0,
            self._option("beta_slow") or 1.0,
            attention_factor,
            bool(self._words.get("truncate", True)),
        )

    def longrope(self) -> Scaling:
        """LongRoPE has other frequencies for sequences longer than the original context."""
        if self._named == "su" and ORIGINAL not in self._words:
            raise CheckpointError(f"rotary scaling 'su' has no {ORIGINAL!r}")
        factors, _ = self._factors("short_factor"), self._factors("long_factor")
        original = self._original_positions()
        if self._limit > original:
            raise CheckpointError(
                f"rotary scaling 'longrope' turns sequences of more than {original:,} tokens "
                "another way, which cached keys cannot follow; load with "
                f"max_positions={original} (--max-positions {original})"
            )
        factor = self._factor(original, optional=True)
        attention_factor = self._option("attention_factor", least=0)
        if attention_factor is None:
            warmer = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            attention_factor = warmer
        return FactorScaling(factors, attention_factor)

    def _factor(self, original: int, optional: bool = False) -> float:
        """`factor`; where it is null, or absent and `optional`, by how much the context grew."""
        if self._words.get("factor") is None and (optional or "factor" in self._words):
            return self._decoder.max_positions / original
        return self._number("factor")

    def _factors(self, name: str) -> tuple[float, ...]:
        """A list of numbers above 0, one for each pair of dimensions."""
        values = self._words.get(name)
        if not isinstance(values, list):
            raise CheckpointError(f"rotary scaling {self.kind!r} has no list {name!r}")
        pairs = (self._dims() or self._decoder.head_dim) // 2
        if len(values) != pairs:
            raise CheckpointError(
                f"rotary scaling {self.kind!r} has a {name} of {len(values)} numbers for {pairs} "
                "pairs of dimensions"
            )
        if not all(map(is_positive, values)):
            raise CheckpointError(f"rotary scaling {self.kind!r}: {name} is not all numbers over 0")
        return tuple(map(float, values))

    def _option(self, name: str, least: float = -math.inf) -> float | None:
        """A number that may be absent or null."""
        value = self._words.get(name)
        if value is None:
            return None
        if not is_number(value) or value < least:
            raise CheckpointError(
                f"rotary scaling {self.kind!r}: {name} is {shown(value)}, no number"
            )
        return float(value)

    def _number(self, name: str, what: str | None = None) -> float:
        """A number more than 0."""
        value = self._words.get(name)
        what = what or f"rotary scaling {self.kind!r}"
        if name not in self._words:
            raise CheckpointError(f"{what} has no number {name!r}")
        if not is_positive(value):
            raise CheckpointError(f"{what}: {name} is {shown(value)}, no number over 0")
        return float(value)

    def _original_positions(self) -> int:
        value = self._words.get(ORIGINAL, self._decoder.max_positions)
        if value is not None:
            value = self._words.get(BESIDE, value)
        tokens = int(value) if is_number(value) and value == int(value) else value
        if not is_size(tokens):
            raise CheckpointError(f"rotary scaling {self.kind!r}: {size_error(ORIGINAL, value)}")
        return tokens


SCALINGS: dict[str, Callable[[_Reader], Scaling | None]] = {
    "default": _Reader.unscaled,
    "dynamic": _Reader.dynamic,
    "linear": _Reader.linear,
    "llama3": _Reader.llama3,
    "yarn": _Reader.yarn,
    "longrope": _Reader.longrope,
}
