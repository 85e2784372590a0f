"""Are p-values uniform, and are errors at their level, where labels mean nothing?

Samples of one kind are split at random into two halves that are called A and B, again and again, and every split is
tested as a run is. Nothing is to be found, so each p-value must be uniform, a block may have any significant head at
all in at most alpha of the splits (under the complete null the false discovery rate is that share), and some head of
any block may have p_max <= alpha in alpha of them.

A split is a relabelling. Under a plain mean over the pool the Fisher does not know the labels: the pool is scored once
and every split reorders the same matrix. Any other Fisher weights a sample by its place or task, so that every split is
scored anew, as a run with these two halves would be; what such a Fisher costs is what the study measures.

Drawn p-values lie on a grid of 1 / (1 + K); a uniform share of one step, taken off, makes them exactly uniform under
the null. Heads of one split are correlated, splits are not: the Kolmogorov-Smirnov test takes one head drawn anew from
each split, and standard errors are over splits. The default test, two-sided, comes first; the one-sided ones show which
of its sides errs where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pool import FisherRule, Pool, Scores, pooled, reordered, small_real_model, task_samples, tested
from samples import mixed_samples
from scipy.stats import binomtest, kstest
from zoo import TINY, VOCAB

from qkov_dist.stats.permutation import Alternative
from qkov_dist.stats.statistics import QKOVStatistics

ALPHA, BINS = 0.05, 20
ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "greater", "less")  # the default first
MEAN, EMA = FisherRule(), FisherRule("ema")


@dataclass(frozen=True)
class Condition:
    """One study: which model and samples, which Fisher, how they are split."""

    model: str
    rule: FisherRule
    num_a: int
    num_b: int
    splits: int
    permutations: int
    rescored: bool
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether the Fisher leaves labels exactly exchangeable."""
        return self.rule.estimator == "mean" and self.rule.scope == "pooled"

    @property
    def title(self) -> str:
        rule = self.rule
        fisher = rule.estimator if rule.estimator == "mean" else f"ema {rule.decay:g}, batches of {rule.batch_size}"
        return f"{self.model}, {self.num_a} + {self.num_b}: {fisher}, {rule.scope}"


@dataclass
class Outcome:
    """What the splits of one condition gave, for one statistic and alternative."""

    p: list[np.ndarray] = field(default_factory=list)  # [split][head], randomised within one step of the grid
    discovered: dict[str, list[bool]] = field(default_factory=dict)  # block -> [split]: any q <= alpha
    family: list[bool] = field(default_factory=list)  # [split]: any p_max <= alpha

    def add(
        self, blocks: Mapping[str, Mapping[str, np.ndarray]], num_labellings: int, rng: np.random.Generator
    ) -> None:
        p = np.concatenate([arrays["p_value"] for arrays in blocks.values()])
        self.p.append(p - rng.random(p.shape) / num_labellings)
        for block, arrays in blocks.items():
            self.discovered.setdefault(block, []).append(bool((arrays["q_value"] <= ALPHA).any()))
        self.family.append(any(bool((arrays["p_max"] <= ALPHA).any()) for arrays in blocks.values()))

    def summary(self, rng: np.random.Generator) -> dict[str, Any]:
        p = np.array(self.p)
        one_head = p[np.arange(len(p)), rng.integers(p.shape[1], size=len(p))]
        drawn = kstest(one_head, "uniform")
        by_head = [kstest(column, "uniform") for column in p.T]
        worst = min(test.pvalue for test in by_head) * len(by_head)
        return {
            "num_heads": p.shape[1],
            "rejected_low": _mean_and_error(p <= ALPHA),
            "rejected_high": _mean_and_error(p > 1 - ALPHA),
            "ks_distance": float(drawn.statistic),
            "ks_p": float(drawn.pvalue),
            "ks_worst_head_bonferroni_p": float(min(worst, 1.0)),
            "ks_pooled_distance": float(kstest(p.ravel(), "uniform").statistic),
            "false_discovery": {block: _share(found) for block, found in self.discovered.items()},
            "family_wise": _share(self.family),
            "histogram": _histogram(p),
        }


def run_condition(
    condition: Condition, pool: Pool, seed: int = 0, split: Callable[[Scores, Sequence[int]], Scores] = reordered
) -> dict[str, dict[Alternative, dict[str, Any]]]:
    """Statistic -> alternative -> summary over the splits of one condition."""
    counts = (condition.num_a, condition.num_b)
    rng, ties = (np.random.default_rng((seed, *counts, condition.splits, use)) for use in range(2))
    outcomes: dict[str, dict[Alternative, Outcome]] = {}
    once = None if condition.rescored else pool.scores(condition.rule, range(pool.num_samples), condition.num_a)
    for number in range(condition.splits):
        order = rng.permutation(pool.num_samples).tolist()
        scores = split(once, order) if once else pool.scores(condition.rule, order, condition.num_a)
        for alternative in ALTERNATIVES:
            tests = QKOVStatistics(n_permutations=condition.permutations, seed=number, alternative=alternative)
            design = tests.design(*counts)
            for name, blocks in tested(scores, design).items():
                outcome = outcomes.setdefault(name, {}).setdefault(alternative, Outcome())
                outcome.add(blocks, design.labels.a.shape[1], ties)
    return {
        name: {alternative: outcome.summary(ties) for alternative, outcome in found.items()}
        for name, found in outcomes.items()
    }


def conditions() -> Iterator[tuple[list[Condition], Callable[[], Any]]]:
    """Groups of conditions that share one captured pool."""

    def tiny(name: str, *which: Condition) -> tuple[list[Condition], Callable[[], Any]]:
        samples = mixed_samples(24, VOCAB, seed=11)
        return list(which), lambda: pooled(TINY[name].build(), samples)

    for name in ("gpt2", "falcon_new"):
        yield tiny(name, Condition(f"tiny {name}", MEAN, 12, 12, 400, 399, False))
    fast_ema = FisherRule("ema", decay=0.5, batch_size=2)
    yield tiny(
        "llama",
        Condition("tiny llama", MEAN, 12, 12, 400, 399, False),
        Condition("tiny llama", MEAN, 18, 6, 400, 399, False),
        Condition("tiny llama", EMA, 12, 12, 400, 399, True, "a moving average"),
        Condition("tiny llama", EMA, 18, 6, 400, 399, True, "a moving average, unequal tasks"),
        Condition("tiny llama", fast_ema, 12, 12, 400, 399, True, "a moving average that forgets"),
        *(Condition("tiny llama", FisherRule("mean", x), 12, 12, 400, 399, True, "one task's Fisher") for x in "ab"),
    )
    loaded = small_real_model()
    samples = task_samples(loaded, "python", 32)
    one_kind = "SmolLM2, Python"
    yield (
        [Condition(one_kind, MEAN, 16, 16, 250, 1999, False)],
        lambda: pooled(loaded.model, samples, tuple(range(0, 30, 3))),
    )
    yield (
        [
            Condition(one_kind, EMA, 16, 16, 200, 399, True, "a moving average"),
            Condition(one_kind, EMA, 24, 8, 200, 399, True, "a moving average, unequal tasks"),
            *(Condition(one_kind, FisherRule("mean", x), 16, 16, 200, 399, True, "one task's Fisher") for x in "ab"),
        ],
        lambda: pooled(loaded.model, samples, (15,)),
    )


def study() -> list[dict[str, Any]]:
    """Every condition with its results."""
    rows = []
    for group, make in conditions():
        with make() as pool:
            for condition in group:
                results = run_condition(condition, pool)
                low = results["overlap"]["two-sided"]["rejected_low"]["mean"]
                print(f"{condition.title}: two-sided p <= {ALPHA} in {low:.1%} of tests", flush=True)
                rows.append({**asdict(condition), "title": condition.title, "exact": condition.exact, **results})
    return rows


def _mean_and_error(hits: np.ndarray) -> dict[str, float]:
    """Share of [split, head], and its standard error over splits."""
    by_split = hits.mean(axis=1)
    return {"mean": float(by_split.mean()), "error": float(by_split.std(ddof=1) / len(by_split) ** 0.5)}


def _share(found: Sequence[bool]) -> dict[str, float]:
    interval = binomtest(sum(found), len(found)).proportion_ci(0.95)
    return {"share": sum(found) / len(found), "low": float(interval.low), "high": float(interval.high)}


def _histogram(p: np.ndarray) -> dict[str, list[float]]:
    """Density of all p-values in bins, and its standard error over splits."""
    places = np.clip((p * BINS).astype(int), 0, BINS - 1)
    shares = np.stack([(places == place).mean(axis=1) for place in range(BINS)], axis=1) * BINS
    return {
        "density": shares.mean(axis=0).tolist(),
        "error": (shares.std(axis=0, ddof=1) / len(shares) ** 0.5).tolist(),
    }
