"""Figures for papers: heatmaps, blocks with intervals, and the layer profile, as PDF and PNG. Needs matplotlib.

Heatmaps are drawn by ``results.heatmap_plot``; blocks have the colours of the Okabe-Ito palette. Marks of significant
heads are those of ``findings``: their shape alone tells the side of the null; coloured ones also hold over all heads of
all blocks. Text in PDFs stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qkov_dist.results.block_view import Floats, Ints
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_plot import draw_block
from qkov_dist.scoring.score_kinds import may_be_negative

from .drawing import FORMATS, MARK_EDGES, MARKERS, add_legend, files_of, mark_heads, new_figure
from .effect_figures import EFFECT_FIGURES
from .findings import counts, findings, found, is_family_wise, sidedness
from .tables import test_arrays

BLOCK_COLORS = {"Q": "#0072B2", "K": "#E69F00", "V": "#009E73", "O": "#CC79A7"}


def figures(heatmap: Heatmap, kinds: Collection[str] = FORMATS) -> Iterator[tuple[str, bytes]]:
    """File name and content of every figure, in these formats.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    known = [name for name in FIGURES if heatmap.has_tested_effects or name not in EFFECT_FIGURES]
    yield from files_of({name: FIGURES[name] for name in known}, heatmap, kinds)


def _panels(heatmap: Heatmap, height: float, xlabel: str) -> tuple[Any, list[tuple[Any, str, str]]]:
    """A figure with a row for each quantity and a column for each block: axis, block and quantity of each panel."""
    rows, blocks = _quantities(heatmap), heatmap.blocks
    figure = new_figure(heatmap, 1.9 * len(blocks), height * len(rows))
    grid, panels = figure.subplots(len(rows), len(blocks), squeeze=False), []
    for axes, (title, key) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(title)
        for axis, block in zip(axes, blocks, strict=True):
            axis.set(title=block, xlabel=xlabel)
            panels.append((axis, block, key))
    return figure, panels


def _quantities(heatmap: Heatmap) -> list[tuple[str, str]]:
    """Title and key of what is drawn: the mean score, and overlap where it was tested."""
    score = str(heatmap.attributes.get("score", "score"))
    return [(f"mean {score}", "score")] + ([("overlap", "overlap")] if "overlap" in (heatmap.statistics or {}) else [])


def _values(heatmap: Heatmap, block: str, key: str) -> Floats:
    return heatmap.mean[block] if key == "score" else test_arrays(heatmap, key, block)["statistic"]


def draw_heatmaps(heatmap: Heatmap) -> Any:
    """Layer x native head by block, with marks: the mean score, and overlap where it was tested."""
    rows, blocks = _quantities(heatmap), heatmap.blocks
    figure = new_figure(heatmap, 1.9 * len(blocks), (0.8 + 0.055 * max(len(heatmap.layers), 24)) * len(rows))
    for axes, (title, key) in zip(figure.subplots(len(rows), len(blocks), squeeze=False), rows, strict=True):
        for axis, block in zip(axes, blocks, strict=True):
            values = _values(heatmap, block, key)
            is_signed = key != "score" or may_be_negative(heatmap.attributes.get("score"))
            scale = values if key == "score" else np.concatenate([_values(heatmap, b, key) for b in blocks], axis=None)
            draw_block(axis, heatmap[block], values, title, scale if is_signed else None)
            if heatmap.tests:
                mark_heads(axis, findings(heatmap), found(heatmap, block), is_family_wise(heatmap, block))
        axes[0].set_ylabel("layer")
    _legend(figure, heatmap, f"; coloured: also family-wise p $\\leq$ {heatmap.fdr_alpha:g}")
    return figure


def _legend(figure: Any, heatmap: Heatmap, more: str = "") -> None:
    """What the marks say, below the drawings."""
    if heatmap.tests:
        test = ", ".join(filter(None, (heatmap.deciding, sidedness(heatmap))))
        add_legend(figure, counts(heatmap), f"q $\\leq$ {heatmap.fdr_alpha:g} ({test}){more}")


def draw_blocks(heatmap: Heatmap) -> Any:
    """Every head with its interval and the band of its null, sorted within its block."""
    figure, panels = _panels(heatmap, height=2.2, xlabel="heads, sorted")
    for axis, block, key in panels:
        values = _values(heatmap, block, key)
        order = np.argsort(values, axis=None)[: int(np.isfinite(values).sum())]
        tests = test_arrays(heatmap, "cross_mean" if key == "score" else key, block)
        bands = []
        if "null_mean" in tests:
            bands.append(_draw_null(axis, tests, order))
        if "ci_low" in tests:
            low, high = tests["ci_low"].flat[order], tests["ci_high"].flat[order]
            axis.vlines(np.arange(len(order)), low, high, color=BLOCK_COLORS[block], alpha=0.35, linewidth=0.6)
            bands.append((low, high))
        if bands and len(order):
            axis.set_ylim(*_frame(values.flat[order], bands))
        _draw_heads(axis, heatmap, block, values, order)
        if key != "score":
            axis.axhline(0, color="0.4", linewidth=0.6)
    fraction = (heatmap.statistics or {}).get("settings", {}).get("confidence", 0.95)
    _legend(figure, heatmap, f"; grey: middle {fraction:.0%} of each head's null, exchanged labels, and its mean")
    return figure


def _draw_null(axis: Any, tests: Mapping[str, Floats], order: Ints) -> tuple[Floats, Floats]:
    """Where each head lies under exchanged labels: a grey bar with a tick at the mean; returns the bars' ends."""
    mean, low, high = (tests[key].flat[order] for key in ("null_mean", "null_low", "null_high"))
    axis.vlines(np.arange(len(order)), low, high, color="0.8", linewidth=1.4)
    axis.plot(np.arange(len(order)), mean, "_", color="0.45", markersize=2, markeredgewidth=0.5)
    return low, high


def _draw_heads(axis: Any, heatmap: Heatmap, block: str, values: Floats, order: Ints) -> None:
    """Heads in order: significant ones by their marks, the others as dots."""
    codes = found(heatmap, block).flat[order] if heatmap.tests else np.zeros(len(order), np.int64)
    known = dict(enumerate((None, *findings(heatmap))))
    for code in (0, *reversed(range(1, len(known)))):  # the first on top: what lies above the null stays in sight
        finding, places = known[code], np.flatnonzero(codes == code)
        marker = "." if finding is None else MARKERS[finding.mark]
        color = BLOCK_COLORS[block] if finding is None else MARK_EDGES[finding.side]
        axis.plot(places, values.flat[order][places], marker, color=color, markersize=2)


def _frame(values: Floats, bands: Sequence[tuple[Floats, Floats]]) -> tuple[float, float]:
    """All values and most of the bands: a single wild one must not flatten the rest."""
    drawn = [(end, fraction) for band in bands for end, fraction in zip(band, (0.02, 0.98), strict=True)]
    most = [np.nanquantile(end, fraction) for end, fraction in drawn if not np.isnan(end).all()]
    ends = np.concatenate([values, most])
    margin = 0.05 * float(np.nanmax(ends) - np.nanmin(ends)) or 1.0
    return float(np.nanmin(ends)) - margin, float(np.nanmax(ends)) + margin


def draw_layers(heatmap: Heatmap) -> Any:
    """Mean over the heads of a layer, and their range."""
    figure, panels = _panels(heatmap, height=1.9, xlabel="layer")
    for axis, block, key in panels:
        values = _values(heatmap, block, key)
        there = np.isfinite(values).any(axis=1)
        layers, values = np.array(heatmap.layers)[there], values[there]
        low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        axis.fill_between(layers, low, high, color=BLOCK_COLORS[block], alpha=0.2, linewidth=0)
        axis.plot(layers, np.nanmean(values, axis=1), color=BLOCK_COLORS[block], linewidth=1.2)
    return figure


FIGURES: dict[str, Callable[[Heatmap], Any]] = {
    "heatmaps": draw_heatmaps,
    "blocks": draw_blocks,
    "layers": draw_layers,
    **EFFECT_FIGURES,
}
