"""Jinja's sandbox, in which operators, calls, filters and tests are charged before they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import generate_lorem_ipsum
from markupsafe import EscapeFormatter, Markup

from models.template_limits.budget import ITEM, breadth, charge, extent, made_units, pay, pay_made
from models.template_limits.growth import COMPARED, FILTERS, METHODS, TESTS, numbers, operator_units
from models.template_limits.metering import PAYING_FILTERS, Metering, look_in

CALL = 60

AT_ONCE = {"startswith", "endswith", "get", "keys", "items", "values"}
"""Methods that read their arguments, and not all of their object."""

SHALLOW = {"batch", "list", "map", "reject", "rejectattr", "reverse", "select"}
SHALLOW |= {"selectattr", "slice"}
"""Filters that do not look into the items."""
PER_ITEM = SHALLOW | {"groupby", "join", "max", "min", "sort", "sum", "unique"}
"""Filters that use their arguments for each item."""
NO_ITEMS = {"attr", "count", "d", "default", "first", "items", "last", "length", "random"}

COMPARING = {"eq", "==", "equalto", "ne", "!=", "gt", ">", "greaterthan", "ge", ">=", "lt", "<"}
COMPARING |= {"lessthan", "le", "<=", "lower", "upper"}


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates are bounded within `limited`.

    `limit_filters` is called once all filters are there.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        super().__init__(optimized=False, **options)  # folding would charge once, when compiled

    def limit_filters(self) -> None:
        self.filters = {n: _filter(n, function) for n, function in self.filters.items()}
        self.filters |= PAYING_FILTERS
        self.tests = {name: _test(name, function) for name, function in self.tests.items()}
        self.globals["lipsum"] = _lipsum

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> Any:
        tree = Metering().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        charge(operator_units(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __called: Any, *args: Any, **named: Any) -> Any:
        charge(CALL + ITEM * (len(args) + len(named)))
        if not isinstance(__called, Macro | BlockReference | LoopContext):  # whose bodies pay
            each = made_units(getattr(__called, "__self__", None))  # which join() puts between
            args = tuple(_counted(arg, each) if _is_lazy(arg) else arg for arg in args)
            _pay_call(__called, args, named)
        return pay_made(super().call(__context, __called, *args, **named))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # whose hash is of all that is in it
            pay(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"
        markup = isinstance(text, Markup)
        formatter = _EscapeFormatter(self, escape=text.escape) if markup else _Formatter(self)

        def run(*args: Any, **named: Any) -> str:
            if by_map and (named or len(args) != 1):
                raise TypeError("format_map() takes one mapping")
            pay(text)
            values = ((), args[0]) if by_map else (args, named)
            return type(text)(formatter.vformat(text, *values))

        return run


class _Formatter(SandboxedFormatter):
    """Of `str.format`, which looks up fields, and widths in them, as it goes."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        pay(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        charge(ITEM + numbers(format_spec) + pay(value))
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, EscapeFormatter):
    pass


def _is_lazy(value: Any) -> bool:
    """Whether its items are not there yet; those of a loop, which has more to it, are counted."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def _counted(values: Iterator[Any], each: int) -> Iterator[Any]:
    """The values, which pay as they come, and `each` units for what is done with them."""
    for value in values:
        charge(each)
        pay(value)
        yield value


def _pay_call(called: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    pay(args)
    pay(named)
    owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
    if isinstance(owner, list | tuple):  # whose methods compare items
        pay(owner)
    elif name not in AT_ONCE:
        charge(made_units(owner))
    if isinstance(owner, str | bytes | int):
        if name not in AT_ONCE:  # and some compare all with all
            charge(made_units(owner) * sum(map(made_units, (*args, *named.values()))) // COMPARED)
        if name in METHODS:
            charge(METHODS[name](owner, *args, **named))


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # which is Jinja's own
    growth = FILTERS.get(name)

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        value, rest = args[first], args[first + 1 :]
        given = pay(rest) + pay(named) if rest or named else 0
        if name not in NO_ITEMS:
            if _is_lazy(value):
                value = _counted(value, given)
                if name == "sum":  # to which it matters how many there are
                    value = list(value)
            elif name in PER_ITEM:
                charge(breadth(value) * (ITEM + given))
            if name not in SHALLOW:  # and some compare all with all
                charge(pay(value) * given // COMPARED)
        if growth is not None:
            charge(growth(value, *rest, **named))
        return pay_made(function(*args[:first], value, *rest, **named))

    return run


def _test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name != "in" and name not in COMPARING and name not in TESTS:
        return function

    def run(*values: Any) -> Any:
        pay(values[0])
        for value in values[1:]:
            look_in(value) if name == "in" else pay(value)
        if name in TESTS:
            charge(TESTS[name](*values))
        return function(*values)

    return run


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    charge(ITEM * extent(n) * (extent(max) + 1))
    return generate_lorem_ipsum(n, html, min, max)
