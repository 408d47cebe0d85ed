"""What is told of where a run took place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.harness import environment
from experiments.harness.environment import describe_host, git_commit


def test_what_changes_the_numbers_is_told(monkeypatch: pytest.MonkeyPatch):
    before = describe_host()["settings"]
    told = {"JAX_ENABLE_X64": "1", "XLA_FLAGS": "--x", "JAX_DEFAULT_MATMUL_PRECISION": "high"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for name in ("JAX_CHUNKATTN_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS", "OTHER"):
        monkeypatch.setenv(name, "1")
    assert describe_host()["settings"] == {**before, **told}
    assert {"tokenizers", "jinja2"} <= describe_host()["versions"].keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_each_state_of_the_code_is_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = tmp_path / "experiments" / "harness" / "environment.py"
    code.parent.mkdir(parents=True)
    code.write_text("1")
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "One"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(environment, "__file__", str(code))
    commit = git_commit()
    assert commit is not None
    assert len(commit) == 40
    states = []
    for content in (b"2", b"3\xff", b"2"):
        code.write_bytes(content)
        states.append(git_commit())
    assert states[0] == states[2] != states[1]
    assert all(state.startswith(f"{commit}+") for state in states)
    code.write_text("1")
    assert git_commit() == commit
