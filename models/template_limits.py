"""Bounds on the time and memory that a chat template takes: it is a stranger's program.

A render has a budget, and pays before a thing is done: one unit for a character that is read or
made, `ITEM` for an item of a list or a mapping, `CALL` for a call, and `NODE` for each node of the
template's syntax in a body that is entered, with the text that stands in it. What grows faster than
what it is given pays for what it would make: products and powers, widths and precisions, indents
and separators. A value that occurs in another several times is weighed as often: of a list that
holds a list twice, that holds a list twice, and so on, no text of a gigabyte is made. What a unit
costs is bounded, and so is the whole.

Bodies pay by a statement put in front of each; what is written, compared or sliced, by filters put
around it; all else where Jinja's sandbox passes by: operators, calls, filters and tests.

Each unit takes well under a microsecond and about ten bytes. Not bounded by it: the time to compile
a template, which is bounded by its length; and Python's own recursion, by Python's own limit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer
from markupsafe import EscapeFormatter, Markup

BASE_UNITS = 20_000_000
UNITS_PER_UNIT = 40
"""A render may take the first, and this many for each unit that the messages weigh; templates of
published models take 3 to 5."""

ITEM, NODE, CALL = 10, 3, 60
MOST_BITS = 4096  # of an integer that a template makes
MOST_NESTED = 500  # values in one another; hash() of a deeper tuple runs out of the C stack
COMPARED = 64  # characters that are compared for a unit


class Budget:
    """What a render may still take."""

    def __init__(self, units: int):
        self.units = self.left = units

    def charge(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise ValueError(f"it takes more than {self.units:,} steps and characters")


_BUDGET: ContextVar[Budget] = ContextVar("budget of the template that is rendered")


@contextlib.contextmanager
def limited(given: Any) -> Iterator[None]:
    """Templates of a `LimitedEnvironment` are compiled and rendered in here, with what is given."""
    weight, _ = _weigh(given, None)
    token = _BUDGET.set(Budget(BASE_UNITS + UNITS_PER_UNIT * weight))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _charge(units: int) -> None:
    _BUDGET.get().charge(units)


def _weigh(value: Any, most: int | None) -> tuple[int, int]:
    """Units of a value with all that is in it, and how many are in one another.

    Stops as soon as there are more than `most`.
    """
    total, depth, level = 0, 0, [value]
    while level:
        depth += 1
        total += ITEM * len(level)
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is str or kind is bytes:
                total += len(each)
            elif kind is int:
                total += each.bit_length() >> 3
            elif kind not in _SIMPLE:
                if most is not None and total + ITEM * (len(below) + _breadth(each)) > most:
                    return most + 1, depth
                if isinstance(each, str | range):
                    total += len(each) if isinstance(each, str) else ITEM * len(each)
                else:
                    below += _inside(each)
        if most is not None and total > most:
            break
        if depth > MOST_NESTED and below:
            raise ValueError(f"it nests values more than {MOST_NESTED} deep")
        level = below
    return total, depth


_SIMPLE = {bool, float, type(None)}


def _inside(value: Any) -> Collection[Any]:
    if type(value) is dict:
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):  # which shows only what a template put there
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, Collection) else ()


def _pay(value: Any) -> int:
    """For all that is in a value."""
    budget = _BUDGET.get()
    if type(value) is str:
        weight = ITEM + len(value)
    elif value is None or value == () or type(value) in (bool, float):
        weight = ITEM
    else:
        weight, _ = _weigh(value, budget.left)
    budget.charge(weight)
    return weight


def _breadth(value: Any) -> int:
    """How many characters or items a value has; 0 where it cannot be told."""
    return len(value) if type(value) is str or isinstance(value, Collection) else 0


def _pay_made(value: Any) -> Any:
    """For a value that has just been made of others, but not for those."""
    if type(value) is int and value.bit_length() > MOST_BITS:
        raise ValueError(f"it makes an integer of more than {MOST_BITS:,} bits")
    if units := _made_units(value):
        _charge(units)
    return value


def _is_lazy(value: Any) -> bool:
    """Whether its items are not there yet; those of a loop, which has more to it, are counted."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def _counted(values: Iterator[Any], each: int) -> Iterator[Any]:
    for value in values:
        _charge(each)
        _pay(value)
        yield value


# Growth: what a thing makes, or does, that what it is given does not pay for.


def _width(value: Any) -> int:
    """Of an argument that is a number of spaces, or them."""
    return abs(value) if isinstance(value, int) else _breadth(value)


def _padded(text: Any, width: Any = 80, /, *_: Any, **named: Any) -> int:
    return _width(named.get("width", named.get("length", width)))


def _tabbed(text: Any, tabsize: Any = 8) -> int:
    return _breadth(text) * _width(tabsize)


def _replaced(text: Any, old: Any = "", new: Any = "", /, *_: Any, **named: Any) -> int:
    old, new = named.get("old", old), named.get("new", new)
    found = text.count(old) if type(text) is type(old) is str else _breadth(text) + 1
    return found * _breadth(new)


def _joined(values: Any = (), between: Any = "", /, *_: Any, **named: Any) -> int:
    return _breadth(values) * _breadth(named.get("d", between))


def _translated(text: Any, /, *table: Any) -> int:
    return len(text) * _pay(table)


def _split(text: Any, part: Any = None, /, *_: Any, **named: Any) -> int:
    part = named.get("sep", part)
    pieces = text.count(part) if part else len(text) // 2
    return ITEM * pieces + _searched(text, part)


def _words(text: Any, /, *_: Any, **__: Any) -> int:
    return ITEM * _breadth(text)


def _searched(text: Any, part: Any = None, /, *_: Any, **named: Any) -> int:
    """From the right, and for each of some characters: Python compares all with all."""
    return _breadth(text) * _breadth(named.get("chars", part)) // COMPARED


def _coded(text: Any, name: Any = "utf-8", /, *_: Any, **named: Any) -> int:
    plain = named.get("encoding", name) in ("utf-8", "utf8", "ascii", "latin-1")
    return 0 if plain else len(text) ** 2  # which punycode takes


def _squared(value: Any, /, *given: Any, **named: Any) -> int:
    """Where it is not worth knowing more."""
    return (_pay(value) + _pay(given) + _pay(named)) ** 2 // COMPARED


_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")


def _percent(form: Any, values: Any) -> int:
    """Of `form % values`."""
    if isinstance(form, bytes):
        form = form.decode("latin-1")
    if not isinstance(form, str):
        return 0
    found = _CONVERSION.findall(form)
    widths = [width for pair in found for width in pair if width]
    many = values if isinstance(values, tuple) else (values,)
    stars = sum(abs(value) for value in many if isinstance(value, int)) if "*" in widths else 0
    return _numbers(" ".join(widths)) + len(found) * (stars + _pay(values))


def _numbers(text: str) -> int:
    """All numbers in a text; of more digits than 20, the first."""
    return sum(int(digits[:20]) for digits in re.findall(r"\d+", text))


def _formatted(form: Any, /, *values: Any, **named: Any) -> int:
    return _percent(form, named or values)


def _indented(text: Any, width: Any = 4, /, *_: Any, **named: Any) -> int:
    lines = text.count("\n") + 1 if isinstance(text, str) else _breadth(text)
    return lines * _width(named.get("width", width))


def _json(
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> int:
    weight, depth = _weigh(value, _BUDGET.get().left)
    between = sum(map(_breadth, separators)) if isinstance(separators, list | tuple) else 0
    return weight // ITEM * (between + _width(indent) * depth)


def _parts(values: Any, count: Any = 1, /, *_: Any, **named: Any) -> int:
    return ITEM * _width(named.get("linecount", named.get("slices", count)))


def _rounded(value: Any, precision: Any = 0, /, *_: Any, **named: Any) -> int:
    return _width(named.get("precision", precision)) ** 2


def _summed(values: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, int | float) else _breadth(values) * _pay(values)


_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    "expandtabs": _tabbed,
    "replace": _replaced,
    "join": lambda between, values=(): _joined(values, between),
    "translate": _translated,
    **dict.fromkeys(("split", "rsplit"), _split),
    "splitlines": _words,
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"), _searched),
    **dict.fromkeys(("encode", "decode"), _coded),
    "striptags": _squared,
}
"""Of methods of text, bytes and integers."""

_AT_ONCE = {"startswith", "endswith", "get", "keys", "items", "values"}
"""Methods that look at their arguments, and not at all of what they are methods of."""

_FILTERS: dict[str, Callable[..., int]] = {
    "batch": _parts,
    "slice": _parts,
    "center": _padded,
    "format": _formatted,
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "round": _rounded,
    "sum": _summed,
    "title": _words,
    "tojson": _json,
    "trim": _searched,
    "wordcount": _words,
    **dict.fromkeys(("pprint", "striptags", "urlize", "wordwrap", "xmlattr"), _squared),
}
_OF_ITEMS = {"batch", "join", "list", "map", "reject", "rejectattr", "reverse", "select"}
_OF_ITEMS |= {"selectattr", "slice", "sort", "sum", "unique", "groupby", "min", "max"}
"""Filters that use their arguments for each item."""
_SHALLOW = {"batch", "list", "map", "reject", "rejectattr", "reverse", "select"}
_SHALLOW |= {"selectattr", "slice"}
"""Filters that do not look into the items."""
_NO_ITEMS = {"attr", "count", "d", "default", "first", "items", "last", "length", "random"}

_COMPARING = {"eq", "==", "equalto", "ne", "!=", "gt", ">", "greaterthan", "ge", ">=", "lt", "<"}
_COMPARING |= {"lessthan", "le", "<=", "lower", "upper"}
_DIVIDING = {"odd": 2, "even": 2, "divisibleby": None}
"""Tests that compute `value % number`, also of a text."""


_PASSED: dict[str, Callable[[Any], Any]] = {
    "context": lambda context: context,
    "eval_context": lambda context: context.eval_ctx,
    "environment": lambda context: context.environment,
}
"""What a filter is given first, that asks for it."""


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = getattr(function, "jinja_pass_arg", None)
    first = None if passed is None else _PASSED[passed.name]
    takes_items, per_item = name not in _NO_ITEMS, name in _OF_ITEMS
    looks_inside = name not in _SHALLOW
    growth = _FILTERS.get(name)

    @pass_context
    def run(context: Any, value: Any, /, *args: Any, **named: Any) -> Any:
        given = (_pay(args) if args else 0) + (_pay(named) if named else 0)
        if takes_items:
            if _is_lazy(value):
                value = _counted(value, given)
            elif per_item:
                _charge(_breadth(value) * (ITEM + given))
            if looks_inside:
                _pay(value)
        if growth is not None:
            _charge(growth(value, *args, **named))
        if first is not None:
            args = (value, *args)
            value = first(context)
        return _pay_made(function(value, *args, **named))

    return run


def _test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name in _COMPARING:

        def run(*values: Any) -> Any:
            for value in values:
                _pay(value)
            return function(*values)

    elif name == "in":

        def run(*values: Any) -> Any:
            _pay(values[0])
            _pay_looked_in(values[-1])
            return function(*values)

    elif name in _DIVIDING:

        def run(*values: Any) -> Any:
            _charge(_percent(values[0], _DIVIDING[name] or values[-1]))
            return function(*values)

    else:
        return function
    return run


def _pay_looked_in(value: Any) -> Any:
    """For what something is looked for in."""
    if isinstance(value, Mapping):
        _charge(ITEM)
    else:
        _pay(value)
    return value


def _read(value: Any) -> Any:
    _pay(value)
    return value


def _enter(units: int) -> bool:
    _BUDGET.get().charge(units)
    return True


ENTER, READ, LOOK_IN, MADE = "enter:", "read:", "look in:", "made:"
"""Filters that no template can spell."""
_OWN_FILTERS = {ENTER: _enter, READ: _read, LOOK_IN: _pay_looked_in, MADE: _pay_made}


class _Formatter(SandboxedFormatter):
    """Of `str.format`, which looks up fields, and widths in them, as it goes."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(_read(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        _charge(ITEM + _numbers(format_spec))
        return super().format_field(_read(value), format_spec)


class _EscapeFormatter(_Formatter, EscapeFormatter):
    pass


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates are bounded within `limited`.

    `limit_filters` is called once all filters are there.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        super().__init__(optimized=False, **options)  # what pays is not constant

    def limit_filters(self) -> None:
        self.filters = {n: _filter(n, function) for n, function in self.filters.items()}
        self.filters |= _OWN_FILTERS
        self.tests = {name: _test(name, function) for name, function in self.tests.items()}
        self.globals["lipsum"] = _lipsum

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> Any:
        tree = _Metering().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge(_operator_units(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __called: Any, *args: Any, **named: Any) -> Any:
        if isinstance(__called, MethodType | BuiltinMethodType | type):
            each = _made_units(getattr(__called, "__self__", None))  # which join() puts between
            args = tuple(_counted(arg, each) if _is_lazy(arg) else arg for arg in args)
        _charge(_call_units(__called, args, named))
        return _pay_made(super().call(__context, __called, *args, **named))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # whose hash is of all that is in it
            _pay(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        is_method = isinstance(value, MethodType | BuiltinMethodType)
        if not is_method or value.__name__ not in ("format", "format_map"):
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"
        if not isinstance(text, str):
            return None
        markup = isinstance(text, Markup)
        formatter = _EscapeFormatter(self, escape=text.escape) if markup else _Formatter(self)

        def run(*args: Any, **named: Any) -> str:
            if by_map and (named or len(args) != 1):
                raise TypeError("format_map() takes one mapping")
            _pay(text)
            values = ((), args[0]) if by_map else (args, named)
            return type(text)(formatter.vformat(text, *values))

        return run


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    _charge(ITEM * _width(n) * (_width(max) + 1))
    return generate_lorem_ipsum(n, html, min, max)


def _operator_units(operator: str, left: Any, right: Any) -> int:
    """Refuses integers that are too long to compute with."""
    numbers = [value for value in (left, right) if isinstance(value, int)]
    bits = [value.bit_length() for value in numbers]
    if len(numbers) == 2:
        made = {"*": sum(bits), "**": bits[0] * abs(right)}.get(operator, 0)
        if max(*bits, made) > MOST_BITS:
            raise ValueError(f"it makes an integer of more than {MOST_BITS:,} bits")
        return ITEM
    if operator == "*" and numbers:
        times, value = (left, right) if isinstance(left, int) else (right, left)
        return max(times, 0) * _made_units(value)
    if operator == "%":
        return _percent(left, right)
    if operator == "-":  # of the keys of mappings
        return _pay(left) + _pay(right)
    return ITEM + _made_units(left) + _made_units(right)


def _made_units(value: Any) -> int:
    if value is None or type(value) is bool:
        return 0
    return len(value) if isinstance(value, str | bytes) else ITEM * _breadth(value)


def _call_units(called: Any, args: tuple[Any, ...], named: dict[str, Any]) -> int:
    units = CALL + ITEM * (len(args) + len(named))
    if isinstance(called, Macro | BlockReference | LoopContext):
        return units
    if isinstance(called, type) and issubclass(called, Namespace | Cycler | Joiner):
        return units
    _pay(args)
    _pay(named)
    owner = getattr(called, "__self__", None)
    if not isinstance(called, MethodType | BuiltinMethodType):
        return units
    name = called.__name__
    if isinstance(owner, list | tuple) and name != "copy":  # which compare items
        _pay(owner)
    elif name not in _AT_ONCE:
        units += _made_units(owner)
    if isinstance(owner, str | bytes | int) and name in _METHODS:
        units += _METHODS[name](owner, *args, **named)
    return units


_BODIES: dict[type[nodes.Node], tuple[str, ...]] = {
    nodes.For: ("body", "else_", "test"),
    nodes.If: ("body", "else_"),
    nodes.Macro: ("body",),
    nodes.CallBlock: ("body",),
    nodes.Block: ("body",),
}


def _syntax_units(node: nodes.Node) -> int:
    """Of a statement or an expression, without the bodies in it, which pay for themselves."""
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
    units = NODE + (len(text) if isinstance(text, str) else 0)
    children = node.iter_child_nodes(exclude=_BODIES.get(type(node), ()))
    return units + sum(map(_syntax_units, children))


def _filtered(node: nodes.Expr, name: str) -> nodes.Expr:
    if isinstance(node, nodes.Const | nodes.TemplateData):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _entering(units: int, line: int) -> nodes.Filter:
    return nodes.Filter(nodes.Const(units, lineno=line), ENTER, [], [], None, None, lineno=line)


class _Metering(NodeTransformer):
    """Puts into a template's syntax what pays."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        units = {
            field: sum(map(_syntax_units, getattr(node, field)))
            for field in _BODIES.get(type(node), ())
            if isinstance(getattr(node, field), list) and getattr(node, field)
        }
        test = getattr(node, "test", None)
        test_units = _syntax_units(test) if isinstance(node, nodes.For) and test else 0
        node = super().generic_visit(node, *args, **kwargs)
        for field, cost in units.items():
            first = nodes.ExprStmt(_entering(cost, node.lineno), lineno=node.lineno)
            getattr(node, field).insert(0, first)
        if test_units:
            enter = _entering(test_units, node.lineno)
            node.test = nodes.And(enter, node.test, lineno=node.lineno)  # pyright: ignore
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(each, READ) for each in node.nodes]
        return node

    visit_Concat = visit_Output

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(each.expr for each in node.ops)]
        in_all = all(each.op in ("eq", "ne") for each in node.ops)
        if in_all and any(isinstance(each, nodes.Const) for each in operands):
            return node  # as long as the shortest takes
        node.expr = _filtered(node.expr, READ)
        for each in node.ops:
            each.expr = _filtered(each.expr, LOOK_IN if "in" in each.op else READ)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filtered(node.key, READ)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node
