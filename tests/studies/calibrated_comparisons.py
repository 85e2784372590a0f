"""Do comparisons of runs hold their level: how often has a head moved that did not, by each quantity?

Per-sample gradients of 40 heads of 12 weights, g = s (m + x): s the sample's size, the same in all heads (log-normal,
log-sd 0, 0.6 or 1.0), m a task's mean gradient in a head, x normal noise on weights of unlike scales for each task. R
is the mean square of a run's own samples. Two runs are made heatmaps of one block, compared by ``compare_runs``:

    halves        other samples of the same distribution: unpaired
    same samples  sizes and means of the first, noise that is nine tenths the first's and as large: paired

In neither has any head moved in truth. Of the same halves: how often 95% intervals of the rank correlation of
change_adam hold its median over the draws.

python tests/studies/calibrated_comparisons.py    # writes tests/studies/results/comparisons.{json,md}, in minutes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pool import RESULTS
from tabulate import tabulate

from qkov_dist.results.comparison import Comparison
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import FISHER_KEYS, SampleTable
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.stats.comparison import TESTED, compare_runs

HEADS, WEIGHTS, STRENGTH, RIDGE, ALIKE = 40, 12, 0.4, 1.001, 0.9
SPREADS, SIZES, DRAWS, ALPHA = (0.0, 0.6, 1.0), (8, 16, 32), 200, 0.05
KINDS = ("halves", "same samples")


def made_run(of_samples: np.ndarray, tag: str) -> Heatmap:
    """A heatmap of one layer and one block, by the definitions of scores and influences."""
    num = of_samples.shape[1] // 2
    regularised = (of_samples**2).mean(axis=1) * RIDGE
    pooled = np.einsum("hip,hjp->hij", of_samples**2 / regularised[:, None], np.abs(of_samples))[None]
    influences = np.empty((1, HEADS, len(OPTIMIZERS), 2 * num))
    a, b = slice(0, num), slice(num, 2 * num)
    for place, scale in enumerate((np.ones_like(regularised), regularised**-0.5)):
        for own, other in ((a, b), (b, a)):
            step = scale * of_samples[:, other].mean(axis=1)
            influences[0, :, place, own] = -np.einsum("hnp,hp->hn", of_samples[:, own], step)
    tables = [
        SampleTable(names, np.ones(num, np.int64), np.ones(num), names, names)
        for names in (tuple(f"{tag}{task}{n}" for n in range(num)) for task in "ab")
    ]
    off = ~np.eye(num, dtype=bool)
    cross, back = pooled[..., a, b].mean((-2, -1)), pooled[..., b, a].mean((-2, -1))
    within = pooled[..., a, a][..., off].mean(-1) * pooled[..., b, b][..., off].mean(-1)
    return Heatmap(
        "a",
        "b",
        (0,),
        tuple(range(HEADS)),
        (0,),
        np.full(1, HEADS),
        tables[0],
        tables[1],
        {"Q": cross},
        {"Q": np.ones((1, HEADS), bool)},
        {"Q": {key: np.ones((1, HEADS)) for key in FISHER_KEYS}},
        {"Q": pooled[..., a, b]},
        {"Q": pooled},
        statistics={"overlap": {"Q": {"statistic": 0.5 * np.log(cross * back / within)}}},
        attributes={"score": "interference"},
        influences={"Q": influences},
    )


def compared(kind: str, seed: int, num: int, spread: float) -> Comparison:
    """Two runs without any head that moved."""
    rng = np.random.default_rng((seed, num, int(10 * spread)))
    means, scales = STRENGTH * rng.normal(size=(HEADS, 2, WEIGHTS)), np.exp(0.5 * rng.normal(size=(HEADS, 2, WEIGHTS)))
    means, scales = (np.repeat(of_task, num, axis=1) for of_task in (means, scales))
    noise = rng.normal(size=(2, HEADS, 2 * num, WEIGHTS))
    sizes = np.exp(spread * rng.normal(size=(2, 1, 2 * num, 1)))
    if kind == "same samples":
        sizes[1], noise[1] = sizes[0], ALIKE * noise[0] + (1 - ALIKE**2) ** 0.5 * noise[1]
    of_runs = sizes * (means + scales * noise)
    tags = ("one", "two" if kind == "halves" else "one")
    runs = [made_run(of_run, tag) for of_run, tag in zip(of_runs, tags, strict=True)]
    return compare_runs(runs, num_draws=200, alpha=ALPHA)


def outcome(kind: str, num: int, spread: float, draws: int) -> dict[str, Any]:
    """Rates by quantity: of heads with p, of draws with a q, and with a family-wise p at or below the level."""
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in TESTED}
    ranks: list[tuple[float, float, float]] = []
    for seed in range(draws):
        found = compared(kind, seed, num, spread)
        for name in TESTED:
            moves = found.quantities[name].moves
            assert moves is not None
            small = [moves["Q"][key] <= ALPHA for key in ("p_value", "q_value", "p_max")]
            rates[name].append((float(small[0].mean()), float(small[1].any()), float(small[2].any())))
        quantity = found.quantities["change_adam"]
        ranks.append(tuple(float(of["Q"][0, 1]) for of in (quantity.correlation, quantity.low, quantity.high)))
    value, low, high = np.array(ranks).T
    usual = np.median(value)
    return {
        "kind": kind,
        "samples": num,
        "spread": spread,
        "draws": draws,
        **{name: np.mean(of_draws, axis=0).tolist() for name, of_draws in rates.items()},
        "rank": {
            "median": float(usual),
            "held": float(((low <= usual) & (usual <= high)).mean()),
            "half width": float((high - low).mean() / 2),
            "sd": float(value.std()),
        },
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The study's page."""
    parts = ["# Calibration of comparisons", "", str(__doc__).partition("\n\n")[2]]
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        parts += [
            f"## {kind}",
            "",
            "Of heads p / of draws any q / any family-wise p at or below 5%, and rank correlation:",
            "",
        ]
        headers = ["log-sd of sizes", "samples a task", *TESTED, "median", "held", "half width", "sd"]
        cells = [
            [row["spread"], row["samples"]]
            + [" / ".join(f"{100 * rate:.1f}%" for rate in row[name]) for name in TESTED]
            + [f"{row['rank'][key]:.2f}" for key in ("median", "held", "half width", "sd")]
            for row in of_kind
        ]
        parts += [tabulate(cells, headers=headers, tablefmt="github"), ""]
    draws = rows[0]["draws"]
    return "\n".join(
        [
            *parts,
            f"{draws} draws a row: a rate of draws of 5% is known to {3 * (0.0475 / draws) ** 0.5:.1%} (3 sd).",
            "",
        ]
    )


def main() -> None:
    """Run it, and write its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS)
    draws = parser.parse_args().draws
    rows = [outcome(kind, num, spread, draws) for kind in KINDS for spread in SPREADS for num in SIZES]
    (RESULTS / "comparisons.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "comparisons.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
