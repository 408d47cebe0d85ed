"""Every annotation of the modules whose types are checked can be evaluated.

What cannot, a name that only type checkers import or a shape that lost its quotes, jaxtyping takes
for `Any`: nothing would be checked, and nothing would say so.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

PACKAGES = [
    "pallas_kernels",
    "jax_chunkattn.device",
    "jax_chunkattn.planning",
    "jax_chunkattn.sampling",
]


def module_names() -> Iterator[str]:
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield module.name


def annotations_of(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg):
            found = node.annotation
        else:
            found = node.returns if isinstance(node, ast.FunctionDef) else None
        if found is not None:
            yield found


@pytest.mark.parametrize("name", list(module_names()))
def test_annotations_can_be_evaluated(name):
    module = importlib.import_module(name)
    for annotation in annotations_of(ast.parse(inspect.getsource(module))):
        text = ast.unparse(annotation)
        try:
            eval(text, vars(module))
        except Exception as error:
            pytest.fail(f"line {annotation.lineno}: {text}: {error}")
