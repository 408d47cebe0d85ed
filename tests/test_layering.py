"""Imports go one way: experiments -> models -> jax_chunkattn -> pallas_kernels -> jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["pallas_kernels", "jax_chunkattn", "models", "experiments"]


def imported_packages(path: Path) -> set[str]:
    """Top-level packages a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_those_below_it(package):
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | {"tests"}
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {str(path): found for path in modules if (found := imported_packages(path) & above)}
    assert wrong == {}


def test_kernels_know_jax_and_numpy_only():
    allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        assert imported_packages(path) <= allowed, path


def test_importing_the_library_loads_no_extras():
    """What flax itself brings in (rich, say) is not the library's doing."""
    code = """
import sys
import flax.nnx, jax, jaxtyping
before = set(sys.modules)
import jax_chunkattn, pallas_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"rich", "matplotlib", "tyro", "tokenizers", "jinja2", "gguf", "models"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
