"""Weights and pool over a mesh of devices, by nothing but their logical axes."""

from __future__ import annotations

import os
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

ON_TWO_DEVICES = """
import jax, numpy as np
from flax import nnx
import models
from jax_chunkattn.device.programs import Invocation, Programs
from models.dense_attention import empty_pool, run_dense

def logits(model):
    tokens = np.array([5, 200, 17, 17, 3], np.int32)
    pool = empty_pool(model.cache_spec, 8)
    return run_dense(*nnx.split(model), tokens, np.arange(5, dtype=np.int32), pool)[0]

mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
whole = models.load("random:tiny").model
for unroll in (False, True):
    split = models.load("random:tiny", mesh=mesh, unroll=unroll).model
    state = dict(nnx.to_flat_state(nnx.state(split)))
    shards = {
        "/".join(map(str, path)): leaf.get_value().addressable_shards[0].data.shape
        for path, leaf in state.items()
    }
    halves = {"qkv": (64, 1, 4, 16), "attention_out": (2, 16, 64), "down": (64, 64)}
    for name, shape in halves.items():
        if unroll:
            assert shards[f"blocks/1/{name}"] == shape, shards
        else:
            assert shards[f"blocks/{name}"] == (2, *shape), shards
    assert shards["embedding"] == (128, 64)
    assert shards["final_norm"] == (64,)
    np.testing.assert_allclose(logits(split), logits(whole), atol=1e-5)

def negative(x):
    return -x

programs = Programs()
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp"))
for place in (*jax.devices(), rows, rows):
    x = jax.device_put(np.arange(4.0, dtype=np.float32), place)
    program, seconds = programs.compiled(Invocation(negative, None, (x,)))
    program([], x)
    compiled = seconds > 0
assert not compiled
print("equal")
"""


def test_a_decoder_split_over_two_devices_computes_the_same():
    flags = "--xla_force_host_platform_device_count=2"
    finished = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "equal\n"


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
