"""`--mesh`: what is refused, what each device holds, and that answers are those of one device."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

import models
from experiments.cli import main
from experiments.models.sizes import device_share
from tests.experiments.results import lines_in
from tests.jax_chunkattn.toy import mesh_of


@pytest.mark.parametrize("command", ["generate", "serve", "models"])
@pytest.mark.parametrize("shape", ["4", "tp=0", "dp=2", "tp=2,dp=2"])
def test_what_is_no_mesh_is_one_line(command, shape, capsys):
    assert main([command, "--mesh", shape]) == 2
    assert f"--mesh takes tp=DEVICES, such as tp=4, got {shape}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_too_few_devices_are_told_with_what_makes_more(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--model", "random:tiny", "--mesh", "tp=64"]) == 2
    error = capsys.readouterr().err
    assert "--mesh tp=64 needs 64 devices, and there " in error
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=64" in error
    assert not any(tmp_path.rglob("results.jsonl"))


def test_models_that_cannot_share_are_refused_or_left_out(capsys):
    assert main(["models", "--model", "random:smollm2-135m", "--mesh", "tp=2"]) == 2
    error = capsys.readouterr().err
    assert "9 query heads and 3 KV heads cannot be split over the 2 devices" in error
    assert main(["models", "--mesh", "tp=9"]) == 0
    assert "smollm2-135m" not in capsys.readouterr().out  # its vocabulary is no multiple of 9
    assert main(["models", "--mesh", "tp=3"]) == 0
    told = capsys.readouterr().out
    assert "of each of the 3 devices" in told
    assert "smollm2-135m" in told


@pytest.mark.slow
@pytest.mark.devices(4)
def test_a_device_holds_what_is_told():
    decoder, first = models.preset("tiny"), jax.devices()[0]
    for devices in (1, 2, 4):
        model = models.load("random:tiny", mesh=mesh_of(devices)).model
        arrays = jax.tree.leaves(nnx.state(model))
        shards = [shard for array in arrays for shard in array.addressable_shards]
        held = sum(shard.data.nbytes for shard in shards if shard.device == first)
        weights, values = device_share(decoder, "float32", devices)
        assert held == weights
        assert values == 2 * 2 * 16 * (2 // min(2, devices))
        abstract = models.load("random:tiny", mesh=mesh_of(devices), abstract=True).model
        for shape, array in zip(jax.tree.leaves(nnx.state(abstract)), arrays, strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
            assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.devices(2)
@pytest.mark.parametrize("command", ["generate", pytest.param("serve", marks=pytest.mark.thorough)])
def test_a_mesh_answers_as_one_device(command, tmp_path):
    smoke = {
        "generate": ["--batch", "4", "--max-tokens", "8", "--no-compare"],
        "serve": ["--requests", "8", "--scale", "128", "--warm-up", "0"],
    }
    found = []
    for name, mesh in (("one", []), ("two", ["--mesh", "tp=2"])):
        folder = tmp_path / name
        options = ["--model", "random:tiny", *smoke[command], "--output", str(folder), *mesh]
        assert main([command, *options]) == 0
        requests = [one for one in lines_in(folder) if one["kind"] == "request"]
        found.append({(one.get("side"), one["index"]): one["tokens"] for one in requests})
    on_one, on_two = found
    assert on_one == on_two != {}
