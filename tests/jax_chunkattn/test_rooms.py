"""The library's packages build on one another in one direction, and its face stands on all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jax_chunkattn
from tests.test_layering import imported_modules, module_name

ROOT = Path(jax_chunkattn.__file__).parent
ROOMS = (
    "tree", "tiers", "sampling", "planning", "device", "training", "engine", "replicas", "server",
    "adapters",
)  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports, anywhere in it; "" is the library's face."""
    modules = [module_name(module, ROOT.parent) for module in ROOT.rglob("*.py")]
    return {f"{module}.".split(".")[1] for module in imported_modules(path, modules)}


def test_every_module_is_in_a_room():
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
    assert sorted(path.parent.name for path in ROOT.glob("*/__init__.py")) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_below_it(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    modules = list((ROOT / room).glob("*.py"))
    assert modules
    wrong = {path.name: found - allowed for path in modules if (found := imported_rooms(path))}
    assert {name: rooms for name, rooms in wrong.items() if rooms} == {}


def test_nobody_uses_what_another_class_keeps_to_itself():
    """`object._name` is for `self`, `cls`, and for the module's own classes."""
    doors = []
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            for name in [node.name, *_assigned(node)]
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            if node.attr.startswith("_") and node.attr not in own:
                doors.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}")
    assert doors == []


def _assigned(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of fields that a class declares, or that one of its methods gives to `self`."""
    targets = [
        target
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        )
    ]
    flat = [
        part
        for target in targets
        for part in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return [part.attr for part in flat if isinstance(part, ast.Attribute)] + [
        part.id for part in flat if isinstance(part, ast.Name)
    ]
