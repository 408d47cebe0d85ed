"""A Hugging Face checkpoint's config.json as a `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.architectures import ARCHITECTURES
from models.architectures.declaration import REQUIRED, Architecture, Key
from models.config import DecoderConfig, field_kinds
from models.errors import CheckpointError
from models.hf_layers import SLIDING, layer_types, rotating_layers
from models.hf_rope import read_ropes
from models.sizes import (
    MOST_HEAD_DIM,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_PARAMETERS,
    MOST_SIZE,
    is_positive,
    is_size,
    shown,
    size_error,
)
from models.weights import num_parameters

MOST = {"num_layers": MOST_LAYERS, "head_dim": MOST_HEAD_DIM} | dict.fromkeys(
    ("num_heads", "num_kv_heads"), MOST_HEADS
)
"""The bounds of sizes that are not `MOST_SIZE`."""


def find_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """The architecture that config.json names.

    Raises:
      CheckpointError: when it is not in the table, which the message lists; or when the weights are
        quantised.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {names!r}, expected a list of names")
    known = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if known is None:
        named = ", ".join(map(repr, names)) or f"(model_type {config.get('model_type')!r})"
        raise CheckpointError(
            f"{where}: architecture {named} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise CheckpointError(
            f"{where}: the weights are quantised ({method or 'quantization_config'}), which is not "
            "supported; use the original checkpoint, or a GGUF file"
        )
    return known


def read_config(
    config: Mapping[str, Any],
    architecture: Architecture,
    where: Path,
    max_positions: int | None = None,
) -> DecoderConfig:
    """The decoder that config.json describes, for sequences of at most `max_positions` tokens.

    None is as many as the model has.

    Raises:
      CheckpointError: a key is missing, or its value is not supported; the message names it.
    """
    for key, supported in architecture.must_be.items():
        value = config.get(key)
        if isinstance(supported, Key):
            supported = config.get(supported.name)
        if value is not None and value != supported:
            raise CheckpointError(
                f"{where}: {key} is {shown(value)}; of {architecture.class_name}, only "
                f"{shown(supported)} is supported"
            )
    try:
        fields = {
            name: _value(config, name, source)
            for name, source in architecture.fields.by_name().items()
        }
        if fields["num_kv_heads"] is None:
            fields["num_kv_heads"] = fields["num_heads"]
        if fields["intermediate_size"] is None:
            fields["intermediate_size"] = 4 * fields["hidden_size"]
        if fields["head_dim"] is None:
            fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
        if architecture.rotary is None:
            fields |= {"rope": None, "learned_positions": True}
        decoder = DecoderConfig(**fields)
        if (count := num_parameters(decoder)) > MOST_PARAMETERS:
            raise CheckpointError(f"{count:,} parameters; at most {MOST_PARAMETERS:,} are read")
        if architecture.rotary is not None:
            ropes = read_ropes(config, architecture, architecture.rotary, decoder, max_positions)
            decoder = replace(decoder, rope=ropes)
        decoder = _limited(decoder, max_positions)
        return replace(decoder, sliding_window=_windows(config, architecture, decoder))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a valid decoder: {error}") from error


def _value(config: Mapping[str, Any], field: str, source: Any) -> Any:
    """The value of a field of `DecoderConfig`."""
    if not isinstance(source, Key):
        return source
    value = config.get(source.name, source.default)
    if value is None and not source.nullable:
        value = source.default
    if value is REQUIRED:
        raise CheckpointError(f"{source.name!r} is missing")
    if value is None:
        return value
    kinds = field_kinds()[field]
    if int in kinds and not is_size(value, most=MOST.get(field, MOST_SIZE)):
        raise CheckpointError(size_error(source.name, value, most=MOST.get(field, MOST_SIZE)))
    if float in kinds and not is_positive(value):
        raise CheckpointError(f"{source.name} is {shown(value)}, no number over 0")
    if bool in kinds and not isinstance(value, bool):
        raise CheckpointError(f"{source.name} is {shown(value)}, expected true or false")
    try:
        return value if source.convert is None else source.convert(value)
    except (KeyError, TypeError):
        raise CheckpointError(f"{source.name} {shown(value)} is not supported") from None


def _windows(
    config: Mapping[str, Any], architecture: Architecture, decoder: DecoderConfig
) -> tuple[int | None, ...] | None:
    """The window of each layer, None where it sees all that its sequences can have."""
    if architecture.windows is None:
        return None
    window = config.get("sliding_window", architecture.windows.default)
    rotates = rotating_layers(config, architecture.rotary, decoder.num_layers)
    kinds = layer_types(config, architecture.windows, rotates)
    if window is None or SLIDING not in kinds:
        return None
    if not is_size(window):
        raise CheckpointError(size_error("sliding_window", window))
    if window >= decoder.max_positions:
        return None
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _limited(decoder: DecoderConfig, max_positions: int | None) -> DecoderConfig:
    if max_positions is None or max_positions == decoder.max_positions:
        return decoder
    if max_positions > decoder.max_positions or decoder.learned_positions:
        what = "learned, and cannot be limited" if decoder.learned_positions else "all it has"
        raise CheckpointError(
            f"max_positions={max_positions}: the model's {decoder.max_positions:,} "
            f"positions are {what}"
        )
    return replace(decoder, max_positions=max_positions)
