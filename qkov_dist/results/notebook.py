"""A heatmap, or a matrix of tasks, as a notebook shows it: the answer, a picture, a table. All text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence


def as_html(summary: str, sentences: Sequence[str], picture: bytes | None, rows: Sequence[Sequence[str]]) -> str:
    """What there is to show, as markup without scripts.

    Args:
        summary: What is shown.
        sentences: The answer; none where the file does not know it.
        picture: A PNG, where it can be drawn.
        rows: Of the table, its head first.
    """
    parts = [f"<p>{html.escape(summary)}</p>"]
    if sentences:
        first, *others = map(html.escape, sentences)
        parts.append(f"<p><b>{first}</b> {' '.join(others)}</p>")
    if picture is not None:
        parts.append(f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>')
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(("th", *("td",) * (len(rows) - 1)), rows, strict=True)
    )
    return "".join([*parts, "<table>", *(f"<tr>{row}</tr>" for row in (head, *body)), "</table>"])
