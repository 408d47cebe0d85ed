"""The `smollm2_path` fixture: real weights, or a skip that says why there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
from pallas_kernels.cache_folder import CACHE_VARIABLE

CACHE = models.cache_dir()  # of the user, whatever a test sets later


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Path of the SmolLM2-135M GGUF file, fetched into the user's cache folder on first use."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_VARIABLE, str(CACHE))
            return models.fetch_smollm2()
    except models.DownloadError as error:
        pytest.skip(f"no SmolLM2 weights: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path):
    """SmolLM2-135M in float32, loaded once for the whole run (540 MB)."""
    return models.load(smollm2_path)
