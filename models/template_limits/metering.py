"""Adds charges to a template's syntax: statements in front of bodies, filters around values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from models.template_limits.budget import charge, pay, pay_made

NODE = 3

BODIES: dict[type[nodes.Node], tuple[str, ...]] = {
    nodes.For: ("body", "else_", "test"),
    nodes.If: ("body", "else_"),
    nodes.Macro: ("body",),
    nodes.CallBlock: ("body",),
    nodes.Block: ("body",),
}
"""Fields whose statements, or expression, may run more than once or not at all."""

ENTER, READ, LOOK_IN, MADE = "enter:", "read:", "look in:", "made:"
"""Filters that only charge. A template that uses one itself, in `map`, is only charged more."""


def _enter(units: int) -> bool:
    charge(units)
    return True


def read(value: Any) -> Any:
    pay(value)
    return value


def look_in(value: Any) -> Any:
    """The value, in which something is searched."""
    pay(() if isinstance(value, Mapping) else value)
    return value


PAYING_FILTERS: dict[str, Callable[[Any], Any]] = {
    ENTER: _enter,
    READ: read,
    LOOK_IN: look_in,
    MADE: pay_made,
}


def _syntax_units(node: nodes.Node) -> int:
    """The units of a statement or an expression, without its bodies, which are charged apart."""
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
    units = NODE + (len(text) if isinstance(text, str) else 0)
    children = node.iter_child_nodes(exclude=BODIES.get(type(node), ()))
    return units + sum(map(_syntax_units, children))


def _filtered(node: nodes.Expr, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _read(node: nodes.Expr, name: str = READ) -> nodes.Expr:
    is_constant = isinstance(node, nodes.Const | nodes.TemplateData)
    return node if is_constant else _filtered(node, name)


class Metering(NodeTransformer):
    """Changes a template's syntax in place."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        for field in BODIES.get(type(node), ()):
            body, line = getattr(node, field), node.lineno
            if not body and field != "body":
                continue
            units = NODE + sum(map(_syntax_units, body if isinstance(body, list) else [body]))
            enter = _filtered(nodes.Const(units, lineno=line), ENTER)
            if isinstance(body, list):
                body.insert(0, nodes.ExprStmt(enter, lineno=line))
            else:
                setattr(node, field, nodes.And(enter, body, lineno=line))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_read(each) for each in node.nodes]
        return node

    visit_Concat = visit_Output

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(each.expr for each in node.ops)]
        is_pair = len(node.ops) == 1 and node.ops[0].op in ("eq", "ne")
        if is_pair and any(isinstance(each, nodes.Const) for each in operands):
            return node  # it takes as long as the shorter operand
        node.expr = _read(node.expr)
        for each in node.ops:
            each.expr = _read(each.expr, LOOK_IN if "in" in each.op else READ)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _read(node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node
