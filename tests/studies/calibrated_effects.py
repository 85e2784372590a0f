"""Are effects of steps calibrated: do p-values hold their level, and do intervals hold the true change?

Per-sample gradients of 48 heads of 32 weights are drawn for two tasks, g = s (m + x): s the sample's size, the same in
all heads (log-normal, log-sd 0, 0.6 or 1.0), m the task's mean in a head, x noise, half of its variance common to all
heads. Tests and intervals are the product's. R is the mean square of the very samples, as in a run. The true change is
- sum_p mu_A P mu_B, with mu the true mean gradients and for ``adam`` the P of the draw. It is 0 in every head where

    no common mean         signs of A's gradients are random: a step on B does nothing to A, on average
    ... heavy tails        the same, noise of Student's t with 3 degrees of freedom
    weights of their own   both tasks have a mean gradient, each in weights where the other has none
    rare opponents         seven eighths of A's samples agree with B, one eighth opposes it seven times as much: the
                           t test's worst case, as few samples need not hold an opponent at all

and it is not in

    halves of one task     A and B have the same mean
    ... heavy tails        the same, with that noise
    a quarter in conflict  opposite means in a quarter of the heads, the same in a quarter, apart in half

Then real gradients: attention heads of three layers of SmolLM2, generated Python code and arithmetic, 64 samples each.
A draw takes some of the samples; true changes are those of all 64 (of which a draw is up to a quarter: real intervals
are a little better than with endless samples), R is that of all.

bash launch/calibrate.sh           # writes tests/studies/results/effects.{json,md}, too
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pool import RESULTS, small_real_model
from real_effects import pair_products, real_draws
from tabulate import tabulate

from qkov_dist.results.influences import Samples
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.stats.effect_tests import effect_tests, even_samples

HEADS, WEIGHTS, STRENGTH, RIDGE = 48, 32, 0.35, 1.001
SPREADS, SIZES, DRAWS, SIGNS = (0.0, 0.6, 1.0), (8, 16, 32), 200, 200
ALPHA = 0.05
Draw = tuple[np.ndarray, np.ndarray]  # influences [head, optimizer, N] and true changes [head, optimizer]


@dataclass(frozen=True)
class World:
    """How gradients come about."""

    title: str
    means: str
    heavy: bool = False

    @property
    def null(self) -> bool:
        """Whether no head has an effect."""
        return self.means in ("signs", "apart", "rare")


WORLDS = (
    World("no common mean", "signs"),
    World("no common mean, heavy tails", "signs", heavy=True),
    World("weights of their own", "apart"),
    World("rare opponents", "rare"),
    World("halves of one task", "same"),
    World("halves of one task, heavy tails", "same", heavy=True),
    World("a quarter in conflict", "mixed"),
)


def means_of(world: World, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of A's samples [head, n, p], and of the tasks [head, 1, p]."""
    of_b, other = STRENGTH * rng.normal(size=(2, HEADS, 1, WEIGHTS))
    if world.means == "signs":
        return rng.choice((-1.0, 1.0), size=(1, size, 1)) * other, 0 * of_b, of_b
    if world.means == "rare":
        return np.where(rng.random((1, size, 1)) < 1 / 8, -7.0, 1.0) * of_b, 0 * of_b, of_b
    if world.means in ("apart", "mixed"):
        kind = (np.arange(HEADS) % 4 if world.means == "mixed" else np.full(HEADS, 2))[:, None, None]
        uses_a = np.arange(WEIGHTS) % 2 == 0
        of_b, other = (
            np.where((kind > 1) & unused, 0.0, means) for means, unused in ((of_b, uses_a), (other, ~uses_a))
        )
        across = np.where(kind == 0, -of_b, np.where(kind == 1, of_b, other))
    of_a = of_b if world.means == "same" else across
    return np.repeat(of_a, size, axis=1), of_a, of_b


def draw(world: World, size: int, spread: float, rng: np.random.Generator) -> Draw:
    """Influences and true changes of one draw of samples."""

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_t(3, size=shape) / 3**0.5 if world.heavy else rng.normal(size=shape)

    each, of_a, of_b = means_of(world, size, rng)
    means = np.concatenate([each, np.repeat(of_b, size, axis=1)], axis=1)
    scattered = (noise(1, 2 * size, WEIGHTS) + noise(HEADS, 2 * size, WEIGHTS)) / 2**0.5
    gradients = np.exp(spread * rng.normal(size=(1, 2 * size, 1))) * (means + scattered)
    regularised = RIDGE * (gradients**2).mean(1, keepdims=True)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for scale in (np.ones_like(regularised), regularised**-0.5):
        a, b = gradients[:, :size], gradients[:, size:]
        influences = [-(x * scale * y.mean(1, keepdims=True)).sum(-1) for x, y in ((a, b), (b, a))]
        found.append((np.concatenate(influences, axis=1), -np.exp(spread**2) * (of_a * scale * of_b).sum((1, 2))))
    influences, truth = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    return influences, truth


def outcome(draws: Iterator[Draw], num_a: int) -> dict[str, dict[str, Any]]:
    """Optimizer -> what tests and intervals were worth over draws: means, and their errors."""
    rates: dict[str, dict[str, list[float]]] = {optimizer: {} for optimizer in OPTIMIZERS}
    for number, (influences, truths) in enumerate(draws):
        is_a = np.arange(influences.shape[-1]) < num_a
        samples = Samples(is_a, ~is_a)
        tests = effect_tests({"Q": influences[None]}, samples, num_draws=SIGNS, seed=number)["Q"]
        even = min(even_samples({"Q": influences[None]}, samples)) / num_a
        for place, optimizer in enumerate(OPTIMIZERS):
            found = {name: values[0] for name, values in tests[optimizer].items()} | {"even": np.array(even)}
            for name, value in _worth(found, truths[:, place]).items():
                rates[optimizer].setdefault(name, []).append(value)
    return {
        optimizer: {
            name: {"mean": float(np.nanmean(values)), "error": float(np.nanstd(values) / len(values) ** 0.5)}
            for name, values in found.items()
        }
        for optimizer, found in rates.items()
    }


def _worth(found: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """Of one draw: shares of heads, or whether there is any."""
    nothing = truth == 0
    significant, below = found["q_value"] <= ALPHA, found["p_value"]
    wrong = significant & (nothing | (np.sign(found["change"]) != np.sign(truth)))
    share = {
        "coverage": (found["ci_low"] <= truth) & (truth <= found["ci_high"]),
        "level 5%": below[nothing] <= ALPHA,
        "level 1%": below[nothing] <= 0.01,
        "power": significant[~nothing],
    }
    return {name: float(hits.mean()) for name, hits in share.items() if len(hits)} | {
        "family-wise": float((found["p_max"][nothing] <= ALPHA).any()),
        "false discoveries": float(wrong.sum() / max(significant.sum(), 1)),
        "even": float(found["even"]),
    }


def simulated(world: World, size: int, spread: float, draws: int = DRAWS) -> dict[str, dict[str, Any]]:
    """The outcome of one world, number of samples and spread of their sizes."""
    rng = np.random.default_rng((WORLDS.index(world), size, round(10 * spread)))
    return outcome((draw(world, size, spread, rng) for _ in range(draws)), size)


def study() -> Iterator[dict[str, Any]]:
    """Every world, spread and number of samples; then real gradients."""
    for world in WORLDS:
        for spread in SPREADS:
            for size in SIZES:
                yield {"title": world.title, "spread": spread, "size": size, **simulated(world, size, spread)}
    products = pair_products(small_real_model())
    for title, draws_of in real_draws(products).items():
        for size in SIZES[:2]:
            rng = np.random.default_rng(size)
            yield {"title": f"SmolLM2: {title}", "size": size, **outcome(_many(draws_of, size, rng), size)}


def _many(draws_of: Callable[[int, np.random.Generator], Draw], size: int, rng: np.random.Generator) -> Iterator[Draw]:
    return (draws_of(size, rng) for _ in range(DRAWS))


COLUMNS = ("level 5%", "level 1%", "family-wise", "false discoveries", "power", "coverage")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    parts = ["# Calibration of effects", "", (__doc__ or "").split("\n\n", 1)[1]]
    for title in dict.fromkeys(row["title"] for row in rows):
        table = [
            {"log-sd of sizes": f"{row['spread']:g}" if "spread" in row else "as it is", "samples a task": row["size"]}
            | {"samples alike": f"{row['sgd']['even']['mean'] * row['size']:.1f}"}
            | {name: " / ".join(_rate(row[o].get(name)) for o in OPTIMIZERS) for name in COLUMNS}
            for row in rows
            if row["title"] == title
        ]
        parts += [f"## {title}", "", tabulate(table, headers="keys", tablefmt="github", disable_numparse=True), ""]
    parts.append(
        f"Each column: sgd / adam, ± its standard error over {DRAWS} draws of samples. Levels: heads without effect "
        "with p at or below it. Family-wise: draws in which any such head has p_max <= 5%. False discoveries: share of "
        "heads with q <= 5% without effect or of the other sign; under no effect at all, of draws with any. Power: "
        "heads with an effect that have q <= 5%. Coverage: heads whose 95% interval holds the true change. Samples "
        "alike: as how many of one size a task's samples count, by the sizes of their influences (Kish)."
    )
    return "\n".join([*parts, ""])


def _rate(rate: Mapping[str, float] | None) -> str:
    return "-" if rate is None or np.isnan(rate["mean"]) else f"{rate['mean']:.1%} ± {rate['error']:.1%}"


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in study():
        print(row["title"], row.get("spread"), row["size"], {n: x["mean"] for n, x in row["adam"].items()}, flush=True)
        rows.append(row)
    (RESULTS / "effects.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "effects.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
