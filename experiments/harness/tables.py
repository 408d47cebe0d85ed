"""Tables as data: printed on a terminal, written as Markdown, compared between two runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """Attributes:
    numeric: its cells stand at the right.
    timed: its cells depend on a clock, so that two runs with one seed may differ in them.
    """

    heading: str
    numeric: bool = True
    timed: bool = False


@dataclass(frozen=True)
class ResultTable:
    """Attributes:
    sections: rows, in groups with a line between two of them.
    notes: sentences that stand below.
    timed_notes: those that depend on a clock, which stand below them.
    """

    title: str
    columns: tuple[Column, ...]
    sections: tuple[tuple[Row, ...], ...]
    notes: tuple[str, ...] = ()
    timed_notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        return [row for section in self.sections for row in section]

    def untimed(self) -> ResultTable:
        """Without the columns and notes that depend on a clock."""
        kept = [index for index, column in enumerate(self.columns) if not column.timed]
        return replace(
            self,
            columns=tuple(self.columns[index] for index in kept),
            sections=tuple(
                tuple(tuple(row[index] for index in kept) for row in section)
                for section in self.sections
            ),
            timed_notes=(),
        )


def table_of(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *more: Iterable[Sequence[str]],
    notes: Sequence[str] = (),
    timed_notes: Sequence[str] = (),
) -> ResultTable:
    """A table of one section of rows, or of several."""
    sections = tuple(tuple(tuple(row) for row in section) for section in (rows, *more))
    return ResultTable(title, tuple(columns), sections, tuple(notes), tuple(timed_notes))


def print_table(console: Console, table: ResultTable) -> None:
    """The table and its notes; text in brackets is not taken for markup."""
    headed = any(column.heading for column in table.columns)
    shown = Table(title=Text(table.title), title_justify="left", show_header=headed)
    for column in table.columns:
        justify = "right" if column.numeric else "left"
        shown.add_column(Text(column.heading), justify=justify, overflow="fold")
    for section in table.sections:
        for row in section:
            shown.add_row(*map(Text, row))
        shown.add_section()
    console.print(shown)
    for note in (*table.notes, *table.timed_notes):
        console.print(note, markup=False)
    console.print()


def to_markdown(table: ResultTable) -> str:
    """The table with its title above and its notes below, ending with a newline."""
    lines = [f"**{_cell(table.title)}**", ""]
    lines.append(_line(column.heading for column in table.columns))
    lines.append(_line("---:" if column.numeric else "---" for column in table.columns))
    lines += [_line(row) for row in table.rows]
    for note in (*table.notes, *table.timed_notes):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def format_bytes(count: float) -> str:
    """`count` in the largest binary unit that keeps it at one or more: `1.50 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def significant(value: float | None) -> str:
    """Three significant digits, whole numbers from a thousand up; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times_as(value: float | None) -> str:
    """A ratio: `2.49x`."""
    return "" if value is None else f"{value:.2f}x"
