"""Weights and pool over a mesh of devices, by nothing but their logical axes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import models
from jax_chunkattn.device.logical_axes import AXIS_RULES, logical_sharding
from jax_chunkattn.device.pool import ChunkPool
from models.weights import decoder_weights


@pytest.mark.slow
@pytest.mark.thorough
def test_on_two_devices_weights_and_pool_are_split_and_numbers_the_same():
    """Logits, decoded tokens, and where programs run; the module says what."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.models.on_two_devices"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("preset", models.PRESETS)
def test_every_axis_of_every_weight_is_known(preset):
    config = models.preset(preset)
    sizes = {
        "layers": config.num_layers,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "positions": config.max_positions,
    }
    for name, weight in decoder_weights(config).by_name().items():
        for axis, size in zip(weight.axes, weight.shape, strict=True):
            assert axis is None or sizes[axis] == size, name
    assert set(AXIS_RULES) <= set(sizes)


def test_rules_name_axes_of_the_mesh_and_the_rest_stays_whole():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    pool = logical_sharding(ChunkPool.AXES, (2, 4, 8, 16, 16), mesh)
    assert pool.spec == PartitionSpec(None, "tp", None, None, None)
    other = logical_sharding(("embed", None, "mlp"), (8, 2, 12), mesh, {"mlp": "data"})
    assert other.spec == PartitionSpec(None, None, None)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_split_is_named():
    class TwoDevices:
        shape = {"tp": 2}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"kv_heads \(3\) cannot be split over the 2 devices"):
        logical_sharding(("kv_heads",), (3,), TwoDevices())  # pyright: ignore[reportArgumentType]
