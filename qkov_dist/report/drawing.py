"""What the paper figures share: a figure that says its model, tasks and samples, and the marks of findings.

Marks tell the side by their shape alone; coloured ones also hold over all heads of all blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.results.block_view import Ints
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_plot import as_plain

from .findings import Finding

FORMATS = ("pdf", "png")
_PNG_DPI = 200
MARKERS = {"up": "^", "down": "v", "square": "s", "diamond": "D", "dot": "o"}
MARK_FILLS = {"above": "#ff8f52", "below": "#7cc6ff", None: "#c9ced6"}
MARK_EDGES = {"above": "#c2370a", "below": "#0b5fae", None: "#1c1f24"}


def files_of(
    makers: Mapping[str, Callable[[Any], Any]], shown: Any, kinds: Collection[str] = FORMATS
) -> Iterator[tuple[str, bytes]]:
    """File name and content of each figure, as PDF whose text stays text, and as PNG.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context({"pdf.fonttype": 42, "font.size": 8, "svg.fonttype": "none"}):
        for name, make in makers.items():
            figure = make(shown)
            for kind in kinds:
                metadata = {"CreationDate": None} if kind == "pdf" else {}
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=_PNG_DPI, metadata=metadata)
                figure.set_layout_engine("none")  # all lies there in the next format, too
                yield f"{name}.{kind}", content.getvalue()


def new_figure(heatmap: Heatmap, width: float, height: float) -> Any:
    """A matplotlib Figure with room for a legend, under the name of what it shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 5.0), height + 0.2), layout="constrained")
    figure.suptitle(as_plain(heatmap.title))
    return figure


def mark_heads(axis: Any, known: Iterable[Finding], codes: Ints, family: npt.NDArray[np.bool_]) -> None:
    """Mark one block's heads in its heatmap: codes are 1 + places among the known findings, 0 for no mark."""
    for code, finding in enumerate(known, 1):
        for is_family in (False, True):
            layers, heads = np.nonzero((codes == code) & (family == is_family))
            axis.scatter(heads, layers, **marker(finding, is_family))


def marker(finding: Finding, is_family: bool) -> dict[str, Any]:
    """How a finding's mark is scattered."""
    face, edge = MARK_FILLS[finding.side] if is_family else "white", MARK_EDGES[finding.side]
    return {"s": 6, "marker": MARKERS[finding.mark], "facecolors": face, "edgecolors": edge, "linewidths": 0.4}


def add_legend(figure: Any, known: Iterable[Finding], title: str) -> None:
    """What the marks say, below the drawings."""
    handles = [
        figure.axes[0].scatter([], [], **marker(finding, is_family=True), label=f"{finding.name}: {finding.meaning}")
        for finding in known
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, title=title, alignment="left")
