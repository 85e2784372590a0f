"""A heatmap as a notebook shows it: the answer, a small picture, and a table of its blocks. Every text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from .verdict import Verdict


def as_html(summary: str, verdict: Verdict | None, picture: bytes | None, rows: Sequence[Sequence[str]]) -> str:
    """What there is to show, as markup without scripts.

    Args:
        summary: What the heatmap is of.
        verdict: The answer, where the file knows it.
        picture: A PNG, where it can be drawn.
        rows: Of the table, its head first.
    """
    parts = [f"<p>{html.escape(summary)}</p>"]
    if verdict is not None:
        first, *others = map(html.escape, verdict.sentences)
        parts.append(f"<p><b>{first}</b> {' '.join(others)}</p>")
    if picture is not None:
        parts.append(f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>')
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(("th", *("td",) * (len(rows) - 1)), rows, strict=True)
    )
    return "".join([*parts, "<table>", *(f"<tr>{row}</tr>" for row in (head, *body)), "</table>"])
