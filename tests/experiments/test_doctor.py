"""`python -m experiments doctor`: what it finds here, and what it says of other machines."""

from __future__ import annotations

import json
import logging
from typing import Any

import jax
import pytest

from experiments.cli import main
from experiments.doctor.checks import next_command
from pallas_kernels.cache_folder import cache_dir
from pallas_kernels.native import library


def test_it_says_what_runs_here_and_why_not_the_rest(
    capsys: pytest.CaptureFixture[str],
):
    cache = cache_dir()
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"][0]["platform"] == "cpu"
    assert found["implementations"]["xla"] is None
    assert found["implementations"]["native"] == library.problem()
    assert "needs an NVIDIA GPU" in found["implementations"]["pallas_triton"]
    assert "gpu" in found["problems"]
    assert found["extras"]["experiments"] == []
    assert found["cache"]["smollm2"] is None
    assert found["memory_total_bytes"] > found["memory_free_bytes"] > 0
    assert found["next"][0] == "python -m experiments generate"
    assert [path.name for path in cache.iterdir()] == ["native"]

    (cache / "models").mkdir()
    (cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"x" * 2048)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("2.0 KiB", "next: python -m experiments generate", f"jax {jax.__version__}"):
        assert part in text


def test_what_jax_says_of_a_plugin_is_told_instead_of_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def devices(platform: str | None = None) -> list[Any]:
        if platform is None:
            try:
                raise RuntimeError("Unable to load cuDNN")
            except RuntimeError:
                logging.getLogger("jax._src.xla_bridge").exception("plugin error")
        raise RuntimeError("nothing\nhere")

    monkeypatch.setattr(jax, "devices", devices)
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "failed: JAX finds no device; see what it says above\n"
    found = json.loads(captured.out)
    assert found["problems"] == {
        "device": "nothing here",
        "plugin 1": "plugin error: Unable to load cuDNN",
    }
    assert found["next"][0] == "pip install --upgrade jax"


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "devices": [{"platform": "cpu"}],
        "extras": {"experiments": []},
        "cache": {"smollm2": "file"},
    } | changes


def test_the_next_command_fits_the_machine():
    assert "here" in next_command(summary())[1]
    assert "98 MB" in next_command(summary(cache={"smollm2": None}))[1]
    missing = next_command(summary(extras={"experiments": ["rich"]}))
    assert missing == ("pip install -e '.[experiments]'", "not installed: rich")
    gpu = [{"platform": "gpu"}, {"platform": "cpu"}]
    assert next_command(summary(devices=gpu))[0] == "python -m experiments gpu"
