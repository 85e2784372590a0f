"""How many heads are found as samples grow, and on which side: arithmetic against Python code on SmolLM2.

One run of 32 + 32 samples is scored once, under the plain mean Fisher of all 64. Smaller studies are random subsets of
its samples, the same number of each task, tested with as many relabellings as one head among 270 needs. The default
test, two-sided on ``overlap``, comes first. A head found above its null is one whose weights the tasks share more than
random halves of the pool do; below it, less, be it by another scale alone: such a head may be above 0.

    bash launch/calibrate.sh            # writes tests/studies/results/power.{json,md} and the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from calibration import ALPHA
from pool import IMAGES, RESULTS, FisherRule, Scores, pooled, reordered, small_real_model, task_samples, tested
from tabulate import tabulate

from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.stats.head_tests import Statistic
from qkov_dist.stats.permutation import Alternative
from qkov_dist.stats.statistics import QKOVStatistics

SIZES, MOST, SUBSETS, PERMUTATIONS = (4, 8, 16, 32), 32, 5, 5400


class Question(NamedTuple):
    """Which test of which score."""

    score: str
    statistic: Statistic
    alternative: Alternative


QUESTIONS = (
    Question("interference", "overlap", "two-sided"),
    Question("interference", "overlap", "greater"),
    Question("interference", "overlap", "less"),
    Question("interference", "cross_mean", "two-sided"),
    Question("interference", "cross_mean", "greater"),
    Question("interference", "cross_mean", "less"),
    Question("signed", "cross_mean", "two-sided"),
    Question("signed", "cross_mean", "less"),
)
DEFAULT = QUESTIONS[0]


def study() -> list[dict[str, Any]]:
    """One row for each question, size and subset."""
    loaded = small_real_model()
    samples = [x for name in ("arithmetic", "python") for x in task_samples(loaded, name, MOST)]
    rule, everyone = FisherRule(), range(2 * MOST)
    with pooled(loaded.model, samples) as pool:
        scores = {
            score: pool.scores(rule, everyone, MOST, ScoreSettings(score=score))  # type: ignore[arg-type]
            for score in ("interference", "signed")
        }
    rows = []
    for size in SIZES:
        for number in range(1 if size == MOST else SUBSETS):
            chosen = _subset(size, number)
            for question in QUESTIONS:
                found = count_found(reordered(scores[question.score], chosen), size, question)
                rows.append({**question._asdict(), "size": size, "subset": number, **found})
        print(f"n = {size}: done", flush=True)
    return rows


def count_found(scores: Scores, size: int, question: Question, permutations: int = PERMUTATIONS) -> dict[str, Any]:
    """Heads that one test of ``size`` + ``size`` samples finds: by q in each block, and by p_max over all."""
    tests = QKOVStatistics(n_permutations=permutations, alternative=question.alternative)
    blocks = tested(scores, tests.design(size, size, (question.statistic,)))[question.statistic]
    above = {block: arrays["effect_size"] > 0 for block, arrays in blocks.items()}
    by_q = {block: arrays["q_value"] <= ALPHA for block, arrays in blocks.items()}
    by_family = {block: arrays["p_max"] <= ALPHA for block, arrays in blocks.items()}
    return {
        "heads": sum(map(len, by_q.values())),
        "by_block": {block: int(found.sum()) for block, found in by_q.items()},
        **_by_side("", by_q, above),
        **_by_side("_family_wise", by_family, above),
        "median_detectable": float(np.median(np.concatenate([arrays["detectable"] for arrays in blocks.values()]))),
    }


def _by_side(suffix: str, found: Mapping[str, np.ndarray], above: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many heads are found, and on which side of their null."""
    sides = {
        "found": found,
        "above": {block: found[block] & above[block] for block in found},
        "below": {block: found[block] & ~above[block] for block in found},
    }
    return {f"{side}{suffix}": sum(int(part.sum()) for part in parts.values()) for side, parts in sides.items()}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    text = (__doc__ or "").partition("\n\n    bash")[0].partition("\n\n")[2]
    note = (
        f"Heads of {rows[0]['heads']} with q <= {ALPHA:g} (Benjamini-Hochberg per block): mean over {SUBSETS} subsets "
        f"of n + n samples (least-most). {PERMUTATIONS} relabellings; n = 4 has only 70 different ones. Family-wise: "
        f"p_max <= {ALPHA:g}."
    )
    titles = {"found": "found", "above": "above the null", "below": "below it", "found_family_wise": "family-wise"}
    default = [
        {"samples a task": size} | {title: _spread(rows, DEFAULT, size, key) for key, title in titles.items()}
        for size in SIZES
    ]
    every = [
        question._asdict()
        | {f"n = {size}": _spread(rows, question, size, "found") for size in SIZES}
        | {f"above, n = {MOST}": _spread(rows, question, MOST, "above")}
        | {f"family-wise, n = {MOST}": _spread(rows, question, MOST, "found_family_wise")}
        for question in QUESTIONS
    ]
    tables = [tabulate(table, headers="keys", tablefmt="github") for table in (default, every)]
    first, second = "## The default test: overlap, two-sided", "## Every test"
    return "\n".join(["# Power", "", text, "", first, "", tables[0], "", second, "", tables[1], "", note, ""])


def _spread(rows: Sequence[Mapping[str, Any]], question: Question, size: int, key: str) -> str:
    counts = _counts(rows, question, size, key)
    return f"{np.mean(counts):.0f}" + (f" ({min(counts)}-{max(counts)})" if len(counts) > 1 else "")


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Heads found against samples a task: by the default test on either side of the null, and by every test."""
    import matplotlib.pyplot as plt

    shown, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for key, label, style in (("below", "below the null: used differently", "#4c78a8"), ("above", "above", "#e45756")):
        left.errorbar(SIZES, *_points(rows, DEFAULT, key), marker="o", capsize=3, label=label, color=style)
    for question, marker in zip(QUESTIONS, "oxsv^D<>", strict=True):
        label = f"{question.score}: {question.statistic}, {question.alternative}"
        right.errorbar(SIZES, *_points(rows, question, "found"), marker=marker, capsize=3, label=label, markersize=5)
    for axis, title in ((left, "default test: overlap, two-sided"), (right, "every test")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.axhline(rows[0]["heads"], color="grey", linewidth=0.8, linestyle="--")
        axis.text(SIZES[0], rows[0]["heads"], "all heads", fontsize=8, va="bottom", color="grey")
        axis.set_xlabel("samples of each task")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, loc="center right")
    left.set_ylabel(f"heads with q ≤ {ALPHA:g}")
    shown.suptitle("Arithmetic x Python code, SmolLM2-135M", fontsize=11)
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=130)


def _points(rows: Sequence[Mapping[str, Any]], question: Question, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Means over the subsets of each size, and the distances [2, size] of the least and the most from it."""
    counts = [_counts(rows, question, size, key) for size in SIZES]
    means = np.array([np.mean(c) for c in counts])
    return means, np.array([[m - min(c), max(c) - m] for m, c in zip(means, counts, strict=True)]).T


def _subset(size: int, number: int) -> list[int]:
    """Samples of A, then as many of B; all of them where size is the most."""
    rng = np.random.default_rng((size, number))
    parts = [np.sort(rng.choice(MOST, size, replace=False)) + start for start in (0, MOST)]
    return [int(x) for part in parts for x in part]


def _counts(rows: Sequence[Mapping[str, Any]], question: Question, size: int, key: str) -> list[int]:
    return [
        int(row[key])
        for row in rows
        if row["size"] == size and all(row[name] == value for name, value in question._asdict().items())
    ]


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)  # the matrices are small: threads would wait for each other
    rows = study()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "power.json").write_text(json.dumps({"alpha": ALPHA, "rows": rows}, indent=1) + "\n")
    (RESULTS / "power.md").write_text(markdown(rows))
    figure(rows, IMAGES / "power.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
