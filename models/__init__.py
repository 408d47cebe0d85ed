"""Decoders for the engine: a Flax Llama decoder, GGUF checkpoints, tokenizer and download."""

from __future__ import annotations

from models.config import PRESETS, DecoderConfig, preset
from models.decoder import Decoder
from models.download import cache_dir, fetch_smollm2
from models.errors import CheckpointError, DownloadError
from models.loading import LoadedModel, load

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "DownloadError",
    "LoadedModel",
    "cache_dir",
    "fetch_smollm2",
    "load",
    "preset",
]
