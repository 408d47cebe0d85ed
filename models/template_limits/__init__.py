"""Bounds on the time and memory that a chat template takes: it is a stranger's program.

A render has a budget (`budget`) and pays before a thing is done: for what is read or made, for a
call, and for each node of the template's syntax in a body that is entered, with the text that
stands in it. What grows faster than what it is given pays for what it would make (`growth`):
products and powers, widths and precisions, indents and separators. What a unit costs is bounded,
and so is the whole.

Bodies pay by a statement put in front of each; what is written, compared or sliced, by filters put
around it (`metering`); all else where Jinja's sandbox passes by: operators, calls, filters and
tests (`environment`).

Each unit takes well under a microsecond and about ten bytes. Not bounded by it: the time to compile
a template, which is bounded by its length; and Python's own recursion, by Python's own limit.
"""

from __future__ import annotations

from models.template_limits.budget import limited
from models.template_limits.environment import LimitedEnvironment

__all__ = ["LimitedEnvironment", "limited"]
