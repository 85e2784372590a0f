"""How often do the intervals of a test hold the true value, where samples' gradients differ in size?

Gradients of one head's weights are drawn for two tasks, g = s x w: s the sample's size (log-normal, log-sd 0, 0.6 or
1.0), x standard normal, w the task's own scale of each weight (log-normal, log-sd 1; the other task's differs from it
by another log-normal factor). Scores are those of ``interference``; tests and intervals are the product's. The true
overlap and cross_mean are those of infinitely many pairs of samples, known in closed form; the true effect size (of
overlap) is the mean over draws of as many samples, since an effect size grows with their number.

    tasks differ, Fisher given     I is that of the two tasks themselves: what the intervals are made for
    more weights                   the same with 256 weights in place of 64: overlap varies less
    tasks alike                    the other task's scales are the same: the true overlap is 0, and its estimate is of
                                   second order in the samples, whose variance the jackknife doubles: near 0 intervals
                                   of overlap go by half of it (with all of it they held 98.7 to 99.9%)
    tasks nearly alike             between the two: the true overlap is about -0.04
    Fisher of the pool             I is the mean over the very samples that are scored, as in a run
    ... many weights               the same with 1024 weights: each sample's own share of I moves overlap off the value
                                   that it has under the Fisher of the tasks; intervals do not know of that

"Off" is how far the middles of overlap's intervals lie from the truth, on average over draws. Intervals are shorter on
the side of 0, which moves their middles away from it.

bash launch/calibrate.sh           # writes tests/studies/results/coverage.{json,md}, too
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pool import RESULTS
from tabulate import tabulate

from qkov_dist.stats.head_tests import head_tests
from qkov_dist.stats.statistics import QKOVStatistics

SPREADS, SIZES = (0.0, 0.6, 1.0), (8, 16, 32)
WORLDS, DRAWS, PERMUTATIONS = 10, 100, 200  # heads with weights of their own; draws of samples for each
LEAST, MOST = 0.92, 0.98  # of the coverage of overlap, with the Fisher given
ENDS = {"overlap": ("ci_low", "ci_high"), "cross_mean": ("ci_low", "ci_high"), "effect": ("effect_low", "effect_high")}


@dataclass(frozen=True)
class World:
    """How gradients come about."""

    title: str
    num_weights: int = 64
    difference: float = 0.7  # log-sd of the factor between the tasks' scales of a weight
    pooled_fisher: bool = False


WORLDS_STUDIED = (
    World("tasks differ, Fisher given"),
    World("more weights", num_weights=256),
    World("tasks alike", difference=0.0),
    World("tasks nearly alike", difference=0.2),
    World("Fisher of the pool", pooled_fisher=True),
    World("Fisher of the pool, many weights", num_weights=1024, pooled_fisher=True),
)


def draw(
    world: World, size: int, spread: float, draws: int, seed: Sequence[int]
) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [draws, 2 size, 2 size] of one head, and the true values of overlap and cross_mean."""
    rng = np.random.default_rng(seed)
    first = np.exp(rng.normal(size=world.num_weights))
    second = first * np.exp(world.difference * rng.normal(size=world.num_weights))
    scales = np.repeat(np.stack([first, second]), size, axis=0)
    sizes = np.exp(spread * rng.normal(size=(draws, 2 * size, 1)))
    gradients = sizes * rng.normal(size=(draws, 2 * size, world.num_weights)) * scales
    squares, sides = np.exp(2 * spread**2), np.exp(spread**2 / 2) * np.sqrt(2 / np.pi)  # means of s^2 and |s x|
    of_a, of_b = squares * first**2, squares * second**2
    given = (of_a + of_b) / 2
    fisher = (gradients**2).mean(1, keepdims=True) if world.pooled_fisher else given
    scores = (gradients**2 / fisher) @ np.abs(gradients).swapaxes(1, 2)
    ab, ba, aa, bb = (
        float((left / given * sides * right).sum())
        for left, right in ((of_a, second), (of_b, first), (of_a, first), (of_b, second))
    )
    return scores, {"overlap": 0.5 * np.log(ab * ba / (aa * bb)), "cross_mean": ab}


def covered(world: World, size: int, spread: float, worlds: int = WORLDS, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """By statistic, which intervals hold the true value, bool [worlds, draws]; and "off", overlap's middles - truth."""
    design = QKOVStatistics(n_permutations=PERMUTATIONS).design(size, size)
    hits: dict[str, list[np.ndarray]] = {name: [] for name in (*ENDS, "off")}
    for number in range(worlds):
        scores, truth = draw(world, size, spread, draws, (number, size, round(10 * spread), world.num_weights))
        tests, _ = head_tests({"Q": torch.from_numpy(scores)}, design)
        truth["effect"] = float(tests["Q"]["overlap"].arrays["effect_size"].mean())
        for name, (low, high) in ENDS.items():
            arrays = tests["Q"]["overlap" if name == "effect" else name].arrays
            hits[name].append((arrays[low] <= truth[name]) & (truth[name] <= arrays[high]))
        arrays = tests["Q"]["overlap"].arrays
        hits["off"].append((arrays["ci_low"] + arrays["ci_high"]) / 2 - truth["overlap"])
    return {name: np.stack(found) for name, found in hits.items()}


def study() -> Iterator[dict[str, Any]]:
    """Every world, spread and number of samples."""
    for world in WORLDS_STUDIED:
        for spread in SPREADS:
            for size in SIZES:
                found = covered(world, size, spread)
                off = float(found.pop("off").mean())
                rates = {name: float(hits.mean()) for name, hits in found.items()}
                error = {name: float(hits.mean(1).std(ddof=1) / len(hits) ** 0.5) for name, hits in found.items()}
                print(world.title, spread, size, rates, off, flush=True)
                yield {**asdict(world), "spread": spread, "size": size, "coverage": rates, "error": error, "off": off}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    parts = ["# Coverage of 95% intervals", "", (__doc__ or "").split("\n\n", 1)[1]]
    for world in WORLDS_STUDIED:
        chosen = [row for row in rows if row["title"] == world.title]
        table = [
            {"log-sd of sizes": f"{row['spread']:g}", "samples a task": row["size"]}
            | {name: f"{row['coverage'][name]:.1%} ± {row['error'][name]:.1%}" for name in ENDS}
            | {"overlap off": f"{row['off']:+.3f}"}
            for row in chosen
        ]
        parts += [
            f"## {world.title}",
            "",
            tabulate(table, headers="keys", tablefmt="github", disable_numparse=True),
            "",
        ]
    parts.append(f"±: standard error over {WORLDS} heads with weights of their own, {DRAWS} draws of samples each.")
    return "\n".join([*parts, ""])


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    rows = list(study())
    (RESULTS / "coverage.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "coverage.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
