"""Runs the calibration study, and writes its page and figure.

bash launch/calibrate.sh            # writes tests/studies/results/calibration.{json,md} and the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import calibration
import numpy as np
import torch
from calibration import ALPHA, ALTERNATIVES, BINS, study
from pool import IMAGES, RESULTS
from tabulate import tabulate

NOTE = (
    f"Level {ALPHA:g}. Shares: ± standard error over splits, or [95% Clopper-Pearson interval]. FDR is the share of "
    "splits with a significant head in a block, averaged over blocks (in brackets: most of any block). KS p: one head "
    "drawn from each split; worst head: smallest of all heads' KS p, times their number."
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    parts = ["# Calibration on halves of one task", "", (calibration.__doc__ or "").split("\n\n", 1)[1]]
    for name in ("overlap", "cross_mean"):
        for exact, title in ((True, "exactly exchangeable"), (False, "not exactly exchangeable")):
            chosen = [row for row in rows if row["exact"] == exact]
            parts += [f"## `{name}`, labels {title}", "", "Two-sided, the default:", ""]
            parts += [tabulate([_row(row, name) for row in chosen], headers="keys", tablefmt="github"), ""]
            parts += ["One-sided:", ""]
            parts += [tabulate([_one_sided(row, name) for row in chosen], headers="keys", tablefmt="github"), ""]
    return "\n".join([*parts, NOTE, ""])


def _row(row: Mapping[str, Any], name: str) -> dict[str, str]:
    found = row[name]["two-sided"]
    shares = [share["share"] for share in found["false_discovery"].values()]
    family = found["family_wise"]
    return {
        "model, samples: Fisher": row["title"],
        "splits": str(row["splits"]),
        "p <= .05": _percent(found["rejected_low"]),
        "p > .95": _percent(found["rejected_high"]),
        "KS p": f"{found['ks_p']:.2g}",
        "worst head": f"{found['ks_worst_head_bonferroni_p']:.2g}",
        "FDR (most)": f"{np.mean(shares):.1%} ({max(shares):.1%})",
        "FWER": f"{family['share']:.1%} [{family['low']:.1%}, {family['high']:.1%}]",
    }


def _one_sided(row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {"model, samples: Fisher": row["title"]} | dict(_sides(row[name]))


def _sides(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for alternative in ALTERNATIVES[1:]:
        of = found[alternative]
        yield f"{alternative}: p <= .05", _percent(of["rejected_low"])
        yield f"{alternative}: KS p", f"{of['ks_p']:.2g}"
        yield f"{alternative}: FWER", f"{of['family_wise']['share']:.1%}"


def _percent(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.1%} ± {value['error']:.1%}"


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Histograms of the two-sided p-values of ``overlap``."""
    import matplotlib.pyplot as plt

    ordered = [row for row in rows if row["exact"]] + [row for row in rows if not row["exact"]]
    columns = 5
    num_rows = -(-len(ordered) // columns)
    shown, axes = plt.subplots(num_rows, columns, figsize=(15, 2.6 * num_rows), sharex=True, sharey=True)
    for axis in axes.flat[len(ordered) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, ordered, strict=False):
        found = row["overlap"]["two-sided"]
        density, error = (np.array(found["histogram"][key]) for key in ("density", "error"))
        edges = np.linspace(0, 1, BINS + 1)
        axis.stairs(density, edges, fill=True, color="#4c78a8" if row["exact"] else "#e45756", alpha=0.75)
        axis.errorbar(edges[:-1] + 0.5 / BINS, density, 2 * error, fmt="none", ecolor="black", elinewidth=0.7)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(row["title"].replace(": ", "\n"), fontsize=8)
        low, family = found["rejected_low"]["mean"], found["family_wise"]["share"]
        axis.text(0.5, 0.93, f"p ≤ .05: {low:.1%}   FWER {family:.1%}", fontsize=7, ha="center", va="top",
                  transform=axis.transAxes)  # fmt: skip
    axes.flat[0].set_ylim(0, 2.5)
    caption = "two-sided p-value of overlap over random splits of one task (blue: labels exactly exchangeable)"
    shown.supxlabel(caption, fontsize=9)
    shown.supylabel("density (bars: 2 standard errors)", fontsize=9)
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=130)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)  # the matrices are small: threads would wait for each other
    rows = study()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "calibration.json").write_text(json.dumps({"alpha": ALPHA, "conditions": rows}, indent=1) + "\n")
    (RESULTS / "calibration.md").write_text(markdown(rows))
    figure(rows, IMAGES / "calibration.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
