"""What is said of a comparison: which heads moved, how alike the runs rank heads, in what they differ."""

from __future__ import annotations

import numpy as np

from .comparison_data import ComparisonData, Quantity

NAMES = {
    "change_adam": "change by adam",
    "change_sgd": "change by sgd",
    "relative_adam": "change by adam, free of scale",
    "relative_sgd": "change by sgd, free of scale",
    "overlap": "overlap",
    "cross_mean": "effect size of cross_mean",
    "score_mean": "mean score",
}


def words(comparison: ComparisonData) -> list[str]:
    """The answer: what moved, rank correlations, what differs."""
    tested = [name for name, of in comparison.quantities.items() if of.moves is not None]
    runs = comparison.runs
    ends = f"from {runs[0].name} to {runs[-1].name}"
    said = [_moved(comparison, tested[0], ends), _others(comparison, tested[1:])] if tested else [_only_ranks(ends)]
    said.append(_ranks(comparison))
    differs = "; ".join(comparison.differs) or "nothing that the files say"
    return [*filter(None, said), f"The runs differ in: {differs}."]


def _moved(comparison: ComparisonData, name: str, ends: str) -> str:
    num, quantity = comparison.num_moved(name), comparison.quantities[name]
    how = "paired by sample" if quantity.paired else "unpaired"
    count = f"{num:,} of {comparison.num_heads:,} heads" if num else f"None of {comparison.num_heads:,} heads"
    said = f"{count} moved {ends} (q <= {comparison.alpha:g}, {NAMES[name]}, {how})"
    named = comparison.most_moved(name)
    more = f" and {num - len(named):,} more" if num > len(named) else ""
    family = sum(int((of["p_max"] <= comparison.alpha).sum()) for of in (quantity.moves or {}).values())
    held = f" {family:,} of them also over all heads of all blocks (family-wise)." if num else ""
    return said + (f": {', '.join(named)}{more}." if named else ".") + held


def _others(comparison: ComparisonData, names: list[str]) -> str:
    counted = [f"{NAMES[name]} {comparison.num_moved(name):,}" for name in names]
    return f"Moved by other quantities: {'; '.join(counted)}." if counted else ""


def _only_ranks(ends: str) -> str:
    return f"Whether heads moved {ends} was not tested: only ranks are compared."


def _ranks(comparison: ComparisonData) -> str:
    name = comparison.leading
    quantity = comparison.quantities[name]
    parts = [f"{block} {_bracket(quantity, block)}" for block in comparison.blocks]
    over = {"samples": "jackknife over samples", "heads": "bootstrap over heads"}.get(quantity.interval_by, "")
    how = f" [{comparison.confidence:.0%} interval, {over}]" if over else ""
    ends = "" if len(comparison.runs) == 2 else " of the last run with the first"
    return f"Rank correlation{ends}, {NAMES[name]}: {', '.join(parts)}{how}."


def _bracket(quantity: Quantity, block: str) -> str:
    value, low, high = (float(of[block][0, -1]) for of in (quantity.correlation, quantity.low, quantity.high))
    if np.isnan(value):
        return "-"
    return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")
