"""Decoders for the engine: one Flax decoder for many architectures, checkpoints, tokenizers."""

from __future__ import annotations

from models.config import DecoderConfig
from models.decoder import Decoder
from models.download import cache_dir, fetch_smollm2
from models.errors import CheckpointError, DownloadError, HeadPatternError, LayerFileError
from models.loading import LoadedModel, load
from models.presets import PRESETS, preset
from models.weight_reading import stored_weights
from models.weights import num_parameters

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "DownloadError",
    "HeadPatternError",
    "LayerFileError",
    "LoadedModel",
    "cache_dir",
    "fetch_smollm2",
    "load",
    "num_parameters",
    "preset",
    "stored_weights",
]
