"""How many heads are found as samples grow: arithmetic against Python code on SmolLM2.

One run of 32 + 32 samples is scored once, under the plain mean Fisher of all 64. Smaller studies are random subsets of
its samples, the same number of each task, tested with as many relabellings as one head among 270 needs.

    bash launch/calibrate.sh            # writes tests/studies/results/power.{json,md} and the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from calibration import ALPHA, IMAGES, RESULTS
from pool import FisherRule, Scores, pooled, reordered, small_real_model, task_samples, tested
from tabulate import tabulate

from qkov_dist.engine import ScoreSettings
from qkov_dist.head_tests import Statistic
from qkov_dist.permutation import Alternative
from qkov_dist.statistics import QKOVStatistics

SIZES, MOST, SUBSETS, PERMUTATIONS = (4, 8, 16, 32), 32, 5, 5400


class Question(NamedTuple):
    """Which test of which score."""

    score: str
    statistic: Statistic
    alternative: Alternative


QUESTIONS = (
    Question("interference", "overlap", "greater"),
    Question("interference", "overlap", "less"),
    Question("interference", "cross_mean", "greater"),
    Question("interference", "cross_mean", "less"),
    Question("signed", "cross_mean", "less"),
)


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
    tests = QKOVStatistics(n_permutations=permutations, n_bootstrap=0, alternative=question.alternative)
    blocks = tested(scores, tests.design(size, size, (question.statistic,)))[question.statistic]
    by_block = {block: int((arrays["q_value"] <= ALPHA).sum()) for block, arrays in blocks.items()}
    family = sum(int((arrays["p_max"] <= ALPHA).sum()) for arrays in blocks.values())
    heads = sum(len(arrays["q_value"]) for arrays in blocks.values())
    detectable = np.concatenate([arrays["detectable"] for arrays in blocks.values()])
    return {
        "heads": heads,
        "found": sum(by_block.values()),
        "by_block": by_block,
        "found_family_wise": family,
        "median_detectable": float(np.median(detectable)),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    table = []
    for question in QUESTIONS:
        line = {"score": question.score, "statistic": question.statistic, "alternative": question.alternative}
        for size in SIZES:
            counts = _counts(rows, question, size, "found")
            spread = f" ({min(counts)}-{max(counts)})" if len(counts) > 1 else ""
            line[f"n = {size}"] = f"{np.mean(counts):.0f}{spread}"
        line[f"family-wise, n = {MOST}"] = str(_counts(rows, question, MOST, "found_family_wise")[0])
        table.append(line)
    text = (__doc__ or "").partition("\n\n    bash")[0].partition("\n\n")[2]
    note = (
        f"Heads of {rows[0]['heads']} with q <= {ALPHA:g} (Benjamini-Hochberg per block): mean over {SUBSETS} subsets "
        f"of n + n samples (least-most). {PERMUTATIONS} relabellings; n = 4 has only 70 different ones."
    )
    return "\n".join(["# Power", "", text, "", tabulate(table, headers="keys", tablefmt="github"), "", note, ""])


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Heads found against samples a task."""
    import matplotlib.pyplot as plt

    shown, axis = plt.subplots(figsize=(7, 4.2))
    for question, marker in zip(QUESTIONS, "osv^D", strict=True):
        counts = [_counts(rows, question, size, "found") for size in SIZES]
        means = np.array([np.mean(c) for c in counts])
        spread = np.array([[m - min(c), max(c) - m] for m, c in zip(means, counts, strict=True)]).T
        label = f"{question.score}: {question.statistic}, {question.alternative}"
        axis.errorbar(SIZES, means, spread, marker=marker, capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    axis.axhline(rows[0]["heads"], color="grey", linewidth=0.8, linestyle="--")
    axis.text(SIZES[0], rows[0]["heads"], "all heads", fontsize=8, va="bottom", color="grey")
    axis.set_xlabel("samples of each task")
    axis.set_ylabel(f"heads with q ≤ {ALPHA:g}")
    axis.set_title("Arithmetic x Python code, SmolLM2-135M", fontsize=10)
    axis.legend(fontsize=7)
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=130)


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
    rows = study()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "power.json").write_text(json.dumps({"alpha": ALPHA, "rows": rows}, indent=1) + "\n")
    (RESULTS / "power.md").write_text(markdown(rows))
    figure(rows, IMAGES / "power.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
