"""Heads chosen from a heatmap, most harmful first, and where each lies: what is acted on.

As JSON, one entry for each rectangle of a head (a head may own several):

    {"by": "change_adam", "settings": {...},
     "heads": [{"block": "Q", "layer": 14, "head": 2, "value": 0.031, "q_value": 0.004,
                "parameter": "model.layers.14.self_attn.q_proj.weight", "rows": [128, 192]}]}

``rows`` or ``cols`` are those of the parameter as it is stored, half-open; further keys may stand beside these.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from qkov_dist.errors import QkovError, is_whole, wrong_argument
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.values import readable, written

from .criteria import Criterion, Judged
from .head_slices import Axis, HeadRange, Heads


@dataclass(frozen=True)
class SelectedHead:
    """One head that was chosen.

    Attributes:
        block: Q, K, V or O.
        layer: The model's layer number.
        head: Native head: a query head for Q and O, a kv head for K and V.
        value: What it was ranked by.
        q_value: Of the test of it; None where there is none.
        ranges: Where it lies; empty where the heatmap's file does not say.
    """

    block: str
    layer: int
    head: int
    value: float
    q_value: float | None
    ranges: tuple[HeadRange, ...]


@dataclass(frozen=True)
class Selection:
    """Heads, most harmful first.

    Attributes:
        by: What they were ranked by, one of ``criteria.CRITERIA``.
        heads: The heads.
        settings: What else was asked for, as JSON values.
    """

    by: str
    heads: tuple[SelectedHead, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.heads)

    def __str__(self) -> str:
        return tabulate(self.rows(), headers="keys", tablefmt="simple") if self.heads else "no head"

    def _repr_html_(self) -> str:
        title = html.escape(f"{len(self)} heads by {self.by}")
        return f"<p>{title}</p>{tabulate(self.rows(), headers='keys', tablefmt='html')}"

    def rows(self) -> list[dict[str, str]]:
        """One row of text a head, with the same columns as everywhere, the value under the criterion's name."""
        return [
            {
                "block": head.block,
                "layer": str(head.layer),
                "head": str(head.head),
                self.by: f"{head.value:.3g}",
                "q_value": "" if head.q_value is None else f"{head.q_value:.2g}",
                "weights": ", ".join(map(_as_index, head.ranges)),
            }
            for head in self.heads
        ]

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """The selection as JSON values, written to ``path`` where one is given.

        Raises:
            QkovError: where the heatmap's file does not say where its heads lie.
        """
        self.check_ranges()
        entries = [
            {
                "block": head.block,
                "layer": head.layer,
                "head": head.head,
                "value": head.value,
                "q_value": head.q_value,
                "parameter": piece.parameter,
                piece.axis: [piece.start, piece.stop],
            }
            for head in self.heads
            for piece in head.ranges
        ]
        values = {"by": self.by, "settings": dict(self.settings), "heads": entries}
        if path is not None:
            Path(path).write_text(as_text(values) + "\n", encoding="utf-8")
        return values

    @staticmethod
    def from_json(path: str | Path) -> Selection:
        """The selection in a file that :meth:`to_json` or ``qkov heads --format json`` wrote.

        Raises:
            QkovError: naming the file, for anything that is not such a selection.
        """
        try:
            return _read(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise QkovError(
                str(path),
                expected="heads as `qkov heads --format json` writes them",
                got=f"{type(error).__name__}: {written(str(error))}",
                remedy="Write the file again with `qkov heads DIR --format json --output FILE`.",
            ) from error

    def check_ranges(self) -> None:
        """Raise unless it is known where every head lies.

        Raises:
            QkovError: for a heatmap that was written before files said so.
        """
        if any(not head.ranges for head in self.heads):
            remedy = "Run again; every run writes it."
            raise QkovError("heatmap", expected="where each head lies", got="a file without `slices`", remedy=remedy)


def as_text(values: Mapping[str, Any]) -> str:
    """A selection's JSON values as text, one entry a line."""
    head = json.dumps({name: value for name, value in values.items() if name != "heads"})
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in values["heads"])
    return f'{head[:-1]}, "heads": [\n{entries}\n]}}'


def select(
    criterion: Criterion,
    found: Mapping[str, Judged],
    axes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ranges: Heads,
    *,
    top: int | None,
    share: float | None,
    alpha: float | None,
) -> Selection:
    """Rank heads and take the first.

    Args:
        criterion: By what.
        found: Block -> its values, for the blocks that are chosen from.
        axes: Block -> layer numbers and native head numbers.
        ranges: Where heads lie.
        top: How many.
        share: Which part of all heads of these blocks, above 0 and up to 1; at least one head.
        alpha: Take those on the harmful side with q at or below this.

    Raises:
        QkovError: for more than one way to choose, or one out of range, and for ``alpha`` where there are no tests.
    """
    if sum(way is not None for way in (top, share, alpha)) > 1:
        raise wrong_argument("top, share, significant", "one of them", "several")
    heads = [head for block, part in found.items() for head in _heads(block, part, axes[block], ranges, alpha)]
    heads.sort(key=lambda head: (-head.value, head.layer, BLOCKS.index(head.block), head.head))
    chosen = heads[: _count(len(heads), top, share)]
    how = {"top": top, "share": share, "significant": alpha}
    settings = {**criterion.settings, "blocks": [*found], **{k: v for k, v in how.items() if v is not None}}
    return Selection(criterion.by, tuple(chosen), settings)


def _heads(
    block: str, part: Judged, axes: tuple[Sequence[int], Sequence[int]], ranges: Heads, alpha: float | None
) -> Iterable[SelectedHead]:
    """A block's heads that have a value; with ``alpha``, those that are significant on the harmful side."""
    taken = np.isfinite(part.values)
    if alpha is not None:
        taken &= _significant(part, alpha)
    for place, column in np.argwhere(taken).tolist():
        layer, head = int(axes[0][place]), int(axes[1][column])
        q = np.nan if part.q_values is None else float(part.q_values[place, column])
        known = ranges.get((block, layer, head), ())
        yield SelectedHead(block, layer, head, float(part.values[place, column]), q if np.isfinite(q) else None, known)


def _significant(part: Judged, alpha: float) -> npt.NDArray[np.bool_]:
    if part.q_values is None or part.harmful is None:
        raise QkovError(
            "significant",
            expected="a criterion with q-values: change_adam or change_sgd, or interference or overlap once tested",
            got="values without a test",
            remedy="Take the first ones by top= (--top) or share= (--share), or choose another criterion.",
        )
    return part.harmful & (np.nan_to_num(part.q_values, nan=1.0) <= alpha)


def _count(num: int, top: int | None, share: float | None) -> int:
    if top is not None:
        if not is_whole(top, 1):
            raise wrong_argument("top", "a whole number of at least 1", top)
        return min(int(top), num)
    if share is not None:
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
            raise wrong_argument("share", "a number above 0 and up to 1", share)
        return max(round(share * num), 1)
    return num


def chosen_blocks(blocks: str | Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Blocks as a caller names them, ``"Q,K"`` or a list, in the order Q, K, V, O; None is all.

    Raises:
        QkovError: for none, or one that there is not.
    """
    if blocks is None:
        return tuple(known)
    names = blocks.split(",") if isinstance(blocks, str) else [*blocks]
    wanted = {str(name).strip().upper() for name in names}
    if not wanted or not wanted <= set(known):
        raise wrong_argument("blocks", f"some of {', '.join(known)}", written(blocks))
    return tuple(block for block in known if block in wanted)


def _as_index(piece: HeadRange) -> str:
    """Where a range is, as Python would index it."""
    band = f"{piece.start}:{piece.stop}"
    return f"{readable(piece.parameter)}[{band}]" if piece.axis == "rows" else f"{readable(piece.parameter)}[:, {band}]"


def _read(raw: Mapping[str, Any]) -> Selection:
    def key(entry: Mapping[str, Any]) -> tuple[str, int, int]:
        return str(entry["block"]), _number(entry["layer"]), _number(entry["head"])

    heads = []
    for (block, layer, head), group in groupby(raw["heads"], key=key):
        entries = list(group)
        if block not in BLOCKS:
            raise ValueError(f"block {block!r}")
        q, ranges = entries[0].get("q_value"), tuple(map(_range, entries))
        heads.append(
            SelectedHead(block, layer, head, float(entries[0]["value"]), None if q is None else float(q), ranges)
        )
    return Selection(str(raw["by"]), tuple(heads), dict(raw.get("settings", {})))


def _range(entry: Mapping[str, Any]) -> HeadRange:
    axes: list[Axis] = [axis for axis in ("rows", "cols") if axis in entry]
    (axis,) = axes
    start, stop = map(_number, entry[axis])
    if not (isinstance(entry["parameter"], str) and start < stop):
        raise ValueError(f"{written(entry)} for a range of a parameter")
    return HeadRange(entry["parameter"], axis, start, stop)


def _number(raw: object) -> int:
    if type(raw) is not int or not 0 <= raw < 2**31:
        raise ValueError(f"{written(raw)} for a whole number from 0")
    return raw
