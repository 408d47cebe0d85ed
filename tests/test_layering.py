"""Imports go one way: experiments -> models -> jax_chunkattn -> pallas_kernels -> jax.

Inside a package too: no two of its modules import each other, directly or through others.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
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


def module_name(path: Path, root: Path) -> str:
    """The name that a file below `root` is imported by; a package has that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: Collection[str]) -> set[str]:
    """Those of `modules` that a file imports, anywhere in it: in a function, or for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            names = [f"{package}.{alias.name}" for alias in node.names]
            found.update(name if name in modules else package for name in names)
    return found & set(modules)


def import_circle(package: Path) -> list[str]:
    """Modules of a package, each imported by the next, the last being the first; [] for none."""
    modules = {module_name(path, package.parent): path for path in package.rglob("*.py")}
    imports = {name: imported_modules(path, modules) for name, path in modules.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_those_below_it(package):
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | {"tests"}
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {str(path): found for path in modules if (found := imported_packages(path) & above)}
    assert wrong == {}


@pytest.mark.parametrize("package", LAYERS)
def test_no_modules_import_each_other(package):
    circle = import_circle(ROOT / package)
    assert not circle, " is imported by ".join(circle)


@pytest.mark.parametrize(
    "last", ["import room.a", "from room import a", "from room.a import A", "from room import A"]
)
@pytest.mark.parametrize("where", ["", "if TYPE_CHECKING:\n    ", "def f():\n    "])
def test_a_circle_through_other_modules_is_found(last, where, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text("from room.a import A\n")
    (room / "a.py").write_text("import room.b\n")
    (room / "b.py").write_text("from room import c\n")
    (room / "c.py").write_text("")
    assert import_circle(room) == []
    (room / "c.py").write_text(f"{where}{last}\n")
    assert {"room.a", "room.b", "room.c"} <= set(import_circle(room))


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
print(sorted(new & {"rich", "matplotlib", "tyro", "tokenizers", "jinja2", "gguf", "models",
    "starlette", "uvicorn", "pydantic", "prometheus_client"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_importing_kernels_has_nothing_traced_again():
    """Modules of kernels are imported when first used, maybe within a program that is traced."""
    code = """
import pallas_kernels, jax
traces = []
double = jax.jit(lambda x: traces.append(x) or 2 * x)
double(1.0)
import pallas_kernels.chunk_attention.pallas_triton
import pallas_kernels.chunk_attention.pallas_mosaic_gpu
double(1.0)
print(len(traces))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "1"
