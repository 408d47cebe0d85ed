"""Tables as text, as Markdown, and without what a clock decides."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from experiments.harness.tables import (
    Column,
    print_table,
    significant,
    table_of,
    times_as,
    to_markdown,
)

TABLE = table_of(
    "A [title]",
    [Column("name", numeric=False), Column("tokens"), Column("ms", timed=True)],
    [("a|b [x]", "1", "2.5")],
    [("c\nd", "2", "3.5")],
    notes=["a note [y]"],
    timed_notes=["2 s"],
)


def test_a_terminal_shows_everything_and_takes_nothing_for_markup():
    console = Console(file=io.StringIO(), width=80)
    print_table(console, TABLE)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("A [title]", "a|b [x]", "2.5", "a note [y]", "2 s"):
        assert part in text
    assert "├" in text  # a line between the sections


def test_markdown_escapes_what_would_end_a_cell():
    assert to_markdown(TABLE) == (
        "**A [title]**\n\n| name | tokens | ms |\n| --- | ---: | ---: |\n"
        "| a\\|b [x] | 1 | 2.5 |\n| c d | 2 | 3.5 |\n\na note [y]\n\n2 s\n"
    )


def test_columns_of_a_clock_can_be_left_out():
    assert TABLE.untimed().rows == [("a|b [x]", "1"), ("c\nd", "2")]
    assert [column.heading for column in TABLE.untimed().columns] == ["name", "tokens"]
    assert (TABLE.untimed().notes, TABLE.untimed().timed_notes) == (("a note [y]",), ())


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.012345, "0.0123"), (123.4, "123"), (12345.6, "12,346")]
)
def test_three_digits_are_enough(value: float | None, text: str):
    assert significant(value) == text
    assert times_as(2.494) == "2.49x"
