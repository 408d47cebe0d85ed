"""Codecs that are fitted to a model: what its keys and values are like, and the file of a codec."""

from __future__ import annotations

from models.calibration.codec_file import load_codec, read_codec, write_codec
from models.calibration.fitting import fit
from models.calibration.recipes import Recipe, ladder, recipe_of
from models.calibration.samples import Samples, key_frequencies, sample

__all__ = [
    "Recipe",
    "Samples",
    "fit",
    "key_frequencies",
    "ladder",
    "load_codec",
    "read_codec",
    "recipe_of",
    "sample",
    "write_codec",
]
