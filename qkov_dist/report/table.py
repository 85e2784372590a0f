"""A table as text: CSV for spreadsheets, Markdown for papers.

A spreadsheet runs text that begins like a formula, some also behind whitespace or with full-width signs: such cells get
an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

Cell = str | int | float | None


MOST_MARKDOWN_ROWS = 400
MOST_MARKDOWN_TEXT = 90


_FORMULA = re.compile(r"^[\s\0\u200b\ufeff]*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#&~$])")


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells; None is an empty cell."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """Comma-separated, numbers in full precision, text that a spreadsheet would run with an apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # else a lone \r ends a row
        writer.writerow(map(_csv_cell, self.columns))
        writer.writerows([_csv_cell(cell) for cell in row] for row in self.rows)
        return out.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table: numbers with four digits, long text cut, nothing left to be read as markup."""
        rows = [[_markdown_cell(cell) for cell in row] for row in self.rows[:MOST_MARKDOWN_ROWS]]
        lines = [[_markdown_cell(name) for name in self.columns], ["---"] * len(self.columns), *rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if more := len(self.rows) - len(rows):
            text += f"\n{more} more rows are in {self.name}.csv.\n"
        return text


def _csv_cell(cell: Cell) -> Cell:
    if isinstance(cell, str):
        clean = cell.encode("utf-8", "backslashreplace").decode()
        return f"'{clean}" if _FORMULA.match(clean) else clean
    return "" if cell is None else cell


def _markdown_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    text = _on_one_line(str(cell))
    return _escaped(text if len(text) <= MOST_MARKDOWN_TEXT else f"{text[: MOST_MARKDOWN_TEXT - 1]}…")


def as_plain_markdown(text: str) -> str:
    """Text on one line, nothing of it left to be read as markup."""
    return _escaped(_on_one_line(text))


def _on_one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)
