"""Bounds on the time and memory that a chat template takes, since it is untrusted code.

A render has a budget of units (`budget`). It is charged, or "pays", before each operation: for the
values that are read or made, for a call, and for each node of the template's syntax in a body that
is entered, including literal text. An operation whose result grows faster than its arguments pays
for the result (`growth`): products and powers, widths and precisions, indents and separators. The
time and memory of a unit are bounded, so those of a render are bounded.

Charges are made in two ways. Statements put in front of bodies, and filters put around what is
written, compared or sliced, are added to the template's syntax (`metering`). Operators, calls,
filters and tests are charged in the hooks of Jinja's sandbox (`environment`).

A unit takes well under a microsecond and about ten bytes. Two things are bounded otherwise: the
time to compile a template, by its length, and recursion in Python, by Python's own limit.
"""

from __future__ import annotations

from models.template_limits.budget import limited
from models.template_limits.environment import LimitedEnvironment

__all__ = ["LimitedEnvironment", "limited"]
