"""What the README shows works as shown."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import models
from experiments.cli import main
from models.parity import markdown_table
from models.prefixes import PrefixArrays, save_prefix
from tests.models.parity.golden import FOLDER, Golden

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_library_example_runs(smollm2_path, capsys):
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    paris, cold, decision = capsys.readouterr().out.strip().splitlines()
    assert "Paris" in paris
    assert "cold" in cold
    assert re.match("shared|unshared", decision)


@pytest.mark.slow
def test_the_example_of_rollouts_runs(capsys):
    exec(compile(EXAMPLES[1], "README.md", "exec"), {})
    scored, sampled = map(float, capsys.readouterr().out.split())
    assert scored < -1
    assert scored == pytest.approx(sampled, abs=1e-4)


def test_the_example_of_replicas_runs(capsys):
    exec(compile(EXAMPLES[2], "README.md", "exec"), {})
    *lines, stats = capsys.readouterr().out.splitlines()
    homes, found = zip(*(line.split() for line in lines), strict=True)
    assert found == ("0", "0", "192", "192")
    assert homes[:2] == homes[2:]
    assert "matched=2" in stats


@pytest.mark.slow
def test_the_example_of_a_mesh_runs(capsys):
    [example] = [one for one in EXAMPLES if "mesh=mesh" in one]
    exec(compile(example, "README.md", "exec"), {})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 8


def test_the_example_of_learned_prefixes_runs(tmp_path, monkeypatch, capsys):
    [example] = [one for one in EXAMPLES if "load_prefix" in one]
    monkeypatch.chdir(tmp_path)
    Golden.read(FOLDER / "llama.npz").write_checkpoint(tmp_path / "Llama-3.2-1B-Instruct")
    spec = models.load("Llama-3.2-1B-Instruct").model.cache_spec
    shape = 2, spec.num_layers, spec.num_kv_heads, 32, spec.head_dim
    for seed, name in enumerate(("formal", "friendly")):
        arrays = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        save_prefix(tmp_path / "prefixes" / name, PrefixArrays(*arrays))
    exec(compile(example, "README.md", "exec"), {})
    formal, friendly = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert len(formal) == len(friendly) == 8
    assert formal != friendly


def test_every_experiment_has_a_row_and_every_row_an_experiment(capsys):
    shown = set(re.findall(r"\| `python -m experiments ([\w-]+)", README))
    with pytest.raises(SystemExit):
        main(["--help"])
    [listed] = re.findall(r"usage: .*?\{([\w,-]+)\}", capsys.readouterr().out, flags=re.DOTALL)
    assert shown == set(listed.split(","))


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_architectures_is_what_was_measured():
    assert markdown_table() in README
