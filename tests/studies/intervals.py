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
    Fisher of the pool             I is the mean over the very samples that are scored, as in a run: each sample's own
                                   share of I moves overlap off the value that it has under the Fisher of the tasks,
                                   and each sample moves the scores of all others through it. Intervals know of both
                                   by the sums that a run forms beside scores
    ... many weights               the same with 1024 weights
    ... tasks alike                the same with 1024 weights, where the true overlap is 0

Real gradients: heads of SmolLM2 (every third of three layers), and as many samples drawn from 192 + 192 of 48 tokens.
The true overlap is that of all 384 samples under their Fisher. "Fisher given" has intervals under that Fisher; "shares
left in" has those under the Fisher of the drawn samples as intervals were before.

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
from pool import RESULTS, head_gradients, small_real_model, task_samples
from tabulate import tabulate

from qkov_dist.scoring.own_share_records import known
from qkov_dist.scoring.own_shares import CHOSEN, Chosen, OwnShares, Shares, chosen
from qkov_dist.stats.head_tests import head_tests
from qkov_dist.stats.statistics import QKOVStatistics

SPREADS, SIZES = (0.0, 0.6, 1.0), (8, 16, 32)
WORLDS, DRAWS, PERMUTATIONS = 20, 100, 200  # heads with weights of their own; draws of samples for each
SEED: tuple[int, ...] = ()  # before that of every draw
LEAST, MOST = 0.92, 0.98  # of the coverage of overlap, with the Fisher given
POPULATION, LAYERS, REAL_DRAWS, RIDGE = 192, (4, 14, 24), 60, 1e-3  # of real gradients
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
    World("Fisher of the pool, many weights, tasks alike", num_weights=1024, difference=0.0, pooled_fisher=True),
)
REAL = "Real gradients, Fisher of the pool"


def draw(
    world: World, size: int, spread: float, draws: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Gradients [draws, 2 size, weights] of one head, their Fisher, and the true values of overlap and cross_mean."""
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
    ab, ba, aa, bb = (
        float((left / given * sides * right).sum())
        for left, right in ((of_a, second), (of_b, first), (of_a, first), (of_b, second))
    )
    return gradients, fisher, {"overlap": 0.5 * np.log(ab * ba / (aa * bb)), "cross_mean": ab}


def scores_of(gradients: np.ndarray, fisher: np.ndarray) -> np.ndarray:
    """Of ``interference``, [draws, N, N]."""
    scores: np.ndarray = (gradients**2 / fisher) @ np.abs(gradients).swapaxes(-1, -2)
    return scores


def known_of(
    gradients: np.ndarray, fisher: np.ndarray, size: int, ridge: float = 0.0, elements: Chosen | None = None
) -> np.ndarray:
    """What samples do through the Fisher, [draws, KNOWN, N], of gradients [draws, N, weights] and it, as in a run.

    It looks at all elements, or at those that are chosen of one draw.
    """
    draws, num, weights = gradients.shape
    shares = Shares.of(torch.eye(2, dtype=torch.float64).repeat_interleave(size, 1) / num, (size, size))
    sums = OwnShares(shares, draws, "interference", 0.0, [ridge])
    in_a_row = torch.from_numpy(gradients).transpose(0, 1).reshape(num, -1)
    looked_at = elements or Chosen(torch.arange(draws * weights), None)
    sums.add(sums.kept(in_a_row, looked_at), torch.from_numpy(fisher).flatten()[looked_at.places])
    return known(sums.records().numpy(), size)


def covered(world: World, size: int, spread: float, worlds: int = WORLDS, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """By statistic, which intervals hold the true value, bool [worlds, draws]; and "off", overlap's middles - truth."""
    design = QKOVStatistics(n_permutations=PERMUTATIONS).design(size, size)
    hits: dict[str, list[np.ndarray]] = {name: [] for name in (*ENDS, "off")}
    for number in range(worlds):
        seed = (*SEED, number, size, round(10 * spread), world.num_weights)
        gradients, fisher, truth = draw(world, size, spread, draws, seed)
        shares = {"Q": torch.from_numpy(known_of(gradients, fisher, size))} if world.pooled_fisher else None
        tests, _ = head_tests({"Q": torch.from_numpy(scores_of(gradients, fisher))}, design, shares)
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


def real_study() -> Iterator[dict[str, Any]]:
    """Heads of a real model: coverage of overlap by the number of samples and by what intervals know."""
    loaded, kinds = small_real_model(), ("Fisher given", "Fisher of the pool", "shares left in")
    samples = [s for task in ("python", "arithmetic") for s in task_samples(loaded, task, POPULATION, 48)]
    rng = np.random.default_rng((*SEED, 7))
    drawn = {
        size: np.stack([np.r_[draw_of(rng, size), POPULATION + draw_of(rng, size)] for _ in range(REAL_DRAWS)])
        for size in SIZES
    }
    found: dict[int, dict[str, list[tuple[float, float]]]] = {size: {kind: [] for kind in kinds} for size in SIZES}
    for rect, of_head in head_gradients(loaded.model, samples, LAYERS, every=3):
        gradients, elements = of_head.double().numpy(), chosen([rect], [-(-rect.area // CHOSEN)], "cpu")
        for size in SIZES:
            of_size = real_intervals(gradients, drawn[size], size, elements)
            for kind, one in zip(kinds, of_size, strict=True):
                found[size][kind].append(one)
    for size, of_size in found.items():
        rates = {kind: np.array(of_kind) for kind, of_kind in of_size.items()}
        coverage = {kind: float(of[:, 0].mean()) for kind, of in rates.items()}
        off = {kind: float(of[:, 1].mean()) for kind, of in rates.items()}
        print(REAL, size, coverage, off, flush=True)
        yield {"title": REAL, "size": size, "heads": len(rates[kinds[0]]), "coverage": coverage, "off": off}


def draw_of(rng: np.random.Generator, size: int) -> np.ndarray:
    """Some of a task's samples."""
    return rng.permutation(POPULATION)[:size]


def real_intervals(
    gradients: np.ndarray, draws: np.ndarray, size: int, elements: Chosen | None
) -> Iterator[tuple[float, float]]:
    """Of one head, given the Fisher, without own shares of the draw's, and with them: coverage, and how far off."""

    def ridged(fisher: np.ndarray) -> np.ndarray:
        return fisher + RIDGE * fisher.mean()

    design = QKOVStatistics(n_permutations=PERMUTATIONS).design(size, size)
    given = ridged((gradients**2).mean(0))
    population = scores_of(gradients, given)
    parts = slice(0, POPULATION), slice(POPULATION, None)
    (aa, ab), (ba, bb) = (
        [(population[p, q].sum() - (population[p, q].trace() if p == q else 0.0)) for q in parts] for p in parts
    )
    truth = 0.5 * np.log(ab * ba / (aa * bb)) + np.log((POPULATION - 1) / POPULATION)
    own, under_given, shares = [], [], []
    for of_draw in draws:
        drawn = gradients[of_draw]
        fisher = (drawn**2).mean(0)
        under_given.append(scores_of(drawn, given))
        own.append(scores_of(drawn, ridged(fisher)))
        ridge = RIDGE * float(fisher.mean())
        shares.append(known_of(drawn[None], fisher[None, None], size, ridge, elements)[0])
    of_shares = {"Q": torch.from_numpy(np.stack(shares))}
    for scores, of_samples in ((under_given, None), (own, of_shares), (own, None)):
        tests, _ = head_tests({"Q": torch.from_numpy(np.stack(scores))}, design, of_samples)
        low, high = (tests["Q"]["overlap"].arrays[name] for name in ENDS["overlap"])
        yield float(((low <= truth) & (truth <= high)).mean()), float(((low + high) / 2 - truth).mean())


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
    real = [row for row in rows if row["title"] == REAL]
    if real:
        table = [
            {"samples a task": row["size"]}
            | {kind: f"{rate:.1%}, off {row['off'][kind]:+.3f}" for kind, rate in row["coverage"].items()}
            for row in real
        ]
        words = f"Overlap; means over {real[0]['heads']} heads, {REAL_DRAWS} draws that all heads share: ± 2%."
        tabled = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
        parts += [f"## {REAL}", "", tabled, "", words, ""]
    parts.append(f"±: standard error over {WORLDS} heads with weights of their own, {DRAWS} draws of samples each.")
    return "\n".join([*parts, ""])


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    rows = [*study(), *real_study()]
    (RESULTS / "coverage.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "coverage.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
