"""Is what a step does to the other task what effects predict? Both optimizers, three sizes.

    python tests/studies/steps.py WHEEL     # writes tests/studies/results/steps.md; WHEEL as in freezing.py

40 heads of the last ten layers of SmolLM2-135M, 16 + 16 samples of ``freezing.py``: predicted on 8 samples of A,
measured on the other 8 and on the same. Near A's optimum: after eight AdamW steps on those 16 samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from freezing import LAYERS, RESULTS, SUMS, samples, upper_part
from tabulate import tabulate

from qkov_dist.layout.resolve import resolve
from qkov_dist.verification.agreement import agreements
from qkov_dist.verification.criteria import heatmap_of
from qkov_dist.verification.effects import HELD_OUT, measure
from qkov_dist.verification.examined_model import ExaminedModel
from qkov_dist.verification.head_targets import sample_targets
from qkov_dist.verification.trajectories import Training, attention_weights, kept, trained
from qkov_dist.verification.validate import number, slope_rows

NUM_HEADS, NUM_SAMPLES, RESAMPLES = 40, 16, 300
SIZES = {"adam": (1e-4, 1e-3, 5e-3), "sgd": (1e-3, 1e-2, 1e-1)}
CASES = {"far from": 0, "near": 8}
STEP = 8 * 2e-4  # of all heads at once


def page(wheel: Path) -> str:
    """Ranks within blocks and slopes of every case, as Markdown."""
    torch.set_num_threads(1)
    model, tokenizer = upper_part(LAYERS)
    a, b = (samples(task, tokenizer, wheel)[:NUM_SAMPLES] for task in SUMS)
    examined = ExaminedModel(model, resolve(model), a, b, tuple(range(LAYERS)), estimator="mean")
    parts = ["# Steps in one head", (__doc__ or "").rpartition("\n\n")[2].strip(), f"A = {SUMS[0]}, B = {SUMS[1]}"]
    for case, warmup in CASES.items():
        with kept(attention_weights(examined)):
            if warmup:
                trained(examined, a, Training(warmup, 2e-4, 4), 0)
            parts += [f"## The whole of attention, {case} A's optimum", totals(examined)]
            for optimizer in SIZES:
                print(case, optimizer, flush=True)
                parts += [f"## {optimizer}, {case} A's optimum", *tables(examined, optimizer)]
    return "\n\n".join(parts) + "\n"


def totals(examined: ExaminedModel) -> str:
    """First and second order of one step of adam in all heads: by the diagonal of A's Fisher, and by all of it."""
    heatmap = heatmap_of(examined)
    harm, diagonal = heatmap.harm(step=STEP, optimizer="adam").total, heatmap.total_effect("adam").curvature["a"]
    orders = {
        "first": harm["first"],
        "second, diagonal": STEP**2 * diagonal,
        "second, along the step": harm["second"],
    }
    return f"Step {STEP:g}: " + ", ".join(f"{name} {value:+.2g}" for name, value in orders.items()) + "."


def tables(examined: ExaminedModel, optimizer: str) -> list[str]:
    sizes = SIZES[optimizer]
    effects = measure(examined, sample_targets(examined, NUM_HEADS, 0), sizes, optimizer=optimizer, seed=0)
    ranks, slopes = agreements(effects, sizes, resamples=RESAMPLES, seed=0)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in (row for row in ranks if row.samples == HELD_OUT):
        names = {"measured": row.measured, "predictor": row.predictor.replace("||", "‖")}
        shown = rows.setdefault((row.measured, row.predictor), names)
        shown[f"size {row.size:g}"] = number(row.within, row.within_interval)
    tables = (list(rows.values()), slope_rows(slopes))
    return [tabulate(table, headers="keys", tablefmt="github", disable_numparse=True) for table in tables]


if __name__ == "__main__":
    (RESULTS / "steps.md").write_text(page(Path(sys.argv[1])), encoding="utf-8")
