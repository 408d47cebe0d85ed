"""Strictness that holds for every test: no silent promotion of rank or dtype, shapes checked."""

from __future__ import annotations

import jax
from hypothesis import settings
from jaxtyping import install_import_hook

pytest_plugins = ["tests.fixtures_weights", "tests.interpreted"]

settings.register_profile("long")  # tests that can go on for longer ask for its name

install_import_hook(
    [
        "pallas_kernels.chunk_attention.api",
        "pallas_kernels.kv_write",
        "pallas_kernels.prefill_attention.api",
    ],
    "beartype.beartype",
)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
