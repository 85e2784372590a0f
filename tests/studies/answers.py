"""README's picture: the heads in which sums answered in digits and sums answered in words pull against each other.

qkov run configs/answers.yaml && python tests/studies/answers.py     # writes .github/images/conflict.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from qkov_dist.report.figures import BLUE_ORANGE
from qkov_dist.report.findings import findings, found
from qkov_dist.results.block_view import HEAD_DIM
from qkov_dist.results.heatmap_file import load_heatmap

IMAGE = Path(__file__).parents[2] / ".github" / "images" / "conflict.png"
COLOURS = LinearSegmentedColormap.from_list("blue-orange", BLUE_ORANGE)


def main(folder: str = "runs/answers") -> None:
    """Draw layer x head by block: the mean score about 0, and a mark on every head in conflict."""
    heatmap = load_heatmap(folder)
    conflict = [finding.name for finding in findings(heatmap)].index("conflict") + 1
    most = max(-float(np.nanmin(mean)) for mean in heatmap.mean.values())
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1 + len(heatmap.natives(block)) for block in heatmap.blocks])
    for axis, block in zip(axes, heatmap.blocks, strict=True):
        shown = axis.imshow(heatmap.mean[block], cmap=COLOURS, vmin=-most, vmax=most, aspect="auto", origin="lower")
        layers, heads = np.nonzero(found(heatmap, block) == conflict)
        axis.scatter(heads, layers, s=26, marker="v", facecolors="white", edgecolors="black", linewidths=0.8)
        axis.set_title(f"{block}: {len(layers)} of {heatmap.present[block].sum()}")
        axis.set_xlabel(HEAD_DIM[block].replace("_", " "))
        axis.set_xticks(range(len(heatmap.natives(block))))
    axes[0].set_ylabel("layer")
    figure.suptitle("Heads in conflict (marked): sums answered in digits against sums answered in words, SmolLM2-135M")
    figure.colorbar(shown, ax=axes, extend="both", label="mean signed score; below 0 the two tasks pull apart")
    figure.savefig(IMAGE, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
