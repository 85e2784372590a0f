"""What a report's page and tables hold, as tests compare it."""

from __future__ import annotations

import base64

import numpy as np

from qkov_dist.report.table import Table


def numbers(text: str, dtype: str = "<f4") -> np.ndarray:
    """Numbers as they travel in the page."""
    return np.frombuffer(base64.b64decode(text), dtype)


def records(table: Table) -> list[dict[str, object]]:
    """The rows of a table by column."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]
