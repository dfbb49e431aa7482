"""What was measured as a table on the terminal, however narrow that is: figures are never broken or cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .report import MISSED, Column, Record

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

_UNLIMITED = 100_000  # characters: what a table would take if it could


@dataclass(frozen=True)
class TerminalTable:
    """A table for rich to print: a line a record, or a line a column where the terminal is too narrow for that.

    Attributes:
        columns: what to show of a record; the first one names it.
        records: at least one.
        title: a line above the table.
    """

    columns: Sequence[Column]
    records: Sequence[Record]
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the title and the table, or as many turned ones as it takes to show all records."""
        from rich.text import Text

        if self.title is not None:
            yield Text(self.title, style="table.title")
        upright = self._upright()
        if _fits(upright, console, options):
            yield upright
            return
        rest = self.records
        while rest:
            count = len(rest)
            while not _fits(turned := self._turned(rest[:count]), console, options) and count > 1:
                count -= 1
            yield turned
            rest = rest[count:]

    def _upright(self) -> Table:
        from rich.table import Table

        table = Table()
        for index, column in enumerate(self.columns):
            table.add_column(column.heading, justify="left" if index == 0 else "right")
        for record in self.records:
            table.add_row(*(_cell(column, record) for column in self.columns))
        return table

    def _turned(self, records: Sequence[Record]) -> Table:
        from rich.table import Table

        first, *others = self.columns
        table = Table()
        table.add_column(first.heading)
        for record in records:
            table.add_column(_cell(first, record), justify="right")
        for column in others:
            table.add_row(column.heading, *(_cell(column, record) for record in records))
        return table


def _cell(column: Column, record: Record) -> Text:
    """Return what a column says of a record, in red where something was missed."""
    from rich.text import Text

    text = column.cell(record)
    return Text(text, style="bold red" if MISSED in text else "")


def _fits(table: Table, console: Console, options: ConsoleOptions) -> bool:
    """Whether each line of a table can be one line of the terminal."""
    unlimited = options.update(max_width=_UNLIMITED)
    return table.__rich_measure__(console, unlimited).maximum <= options.max_width
