"""A small heatmap with what is awkward: layers of different head counts, one without V, non-ASCII ids and texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import FISHER_KEYS, SampleTable, cross_of_pooled, mean_over_pairs

LAYERS = (2, 5, 7)
HEADS = (0, 1, 2, 3, 4, 5)
KV_HEADS = (0, 1, 2)
GROUPS = np.array([3, 2, 2])
NUM_HEADS = np.array([6, 6, 4])
NUM_A, NUM_B = 4, 3
ATTRIBUTES = {
    "run_id": "run-1",
    "score": "interference",
    "config": '{"metric": {"score": "interference"}}',
    "versions": {"torch": "2.6", "numpy": "1.26"},
    "seeds": {"statistics": 0},
    "warnings": ["ridge exceeds I on 60% of Q 5.1", "é <b>"],
    "notes": [],
    "loss_factor": 1.5,
    "num_ranks": 2,
    "resumed": False,
}


def present(block: str) -> np.ndarray:
    if block in "QO":
        return np.array(HEADS)[None] < NUM_HEADS[:, None]
    there = np.array(KV_HEADS)[None] < (NUM_HEADS // GROUPS)[:, None]
    return there & (np.array(LAYERS)[:, None] != 7) if block == "V" else there


def make_table(task: str, count: int) -> SampleTable:
    return SampleTable(
        tuple(f"{task}/é-{i}" for i in range(count)),
        np.arange(3, 3 + count),
        np.linspace(0.5, 2.5, count),
        tuple("λ <script>" * i for i in range(count)),
    )


def make_heatmap(**changes: Any) -> Heatmap:
    rng = np.random.default_rng(0)
    masks = {block: present(block) for block in "QKVO"}
    pooled = {}
    for block, mask in masks.items():
        scores = rng.gamma(1.0, size=(*mask.shape, NUM_A + NUM_B, NUM_A + NUM_B)).astype(np.float32)
        scores[~mask] = np.nan
        pooled[block] = scores
    cross = cross_of_pooled(pooled, NUM_A)
    shared_cross = rng.gamma(1.0, size=(len(LAYERS), NUM_A, NUM_B)).astype(np.float32)
    fields: dict[str, Any] = {
        "task_a": "math",
        "task_b": "cøde",
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "groups": GROUPS,
        "samples_a": make_table("a", NUM_A),
        "samples_b": make_table("b", NUM_B),
        "mean": mean_over_pairs(cross),
        "present": masks,
        "fisher": {
            block: {key: np.where(mask, rng.random(mask.shape), np.nan) for key in FISHER_KEYS}
            for block, mask in masks.items()
        },
        "cross": cross,
        "pooled": pooled,
        "shared": {"O_bias": {"cross": shared_cross, "mean": shared_cross.mean((1, 2), dtype=np.float64)}},
        "attributes": ATTRIBUTES,
    }
    return Heatmap(**(fields | changes))


def make_statistics() -> dict[str, Any]:
    """Shaped like what the statistics give: arrays by statistic and block, and JSON values."""
    rng = np.random.default_rng(1)
    names = ("statistic", "p_value", "q_value")
    tests: dict[str, Any] = {
        statistic: {
            block: {name: np.where(present(block), rng.random(present(block).shape), np.nan) for name in names}
            for block in "QKVO"
        }
        for statistic in ("cross_mean", "overlap")
    }
    tests["overlap"]["Q"]["interval"] = np.stack([np.full(present("Q").shape, x) for x in (0.1, 0.9)], axis=-1)
    tests["overlap"]["Q"]["significant"] = present("Q")
    tests["cross_mean"]["num_undefined"] = 3
    tests["fdr_corrected"] = {"Q": [{"layer": 2, "head": 1, "q_value": 0.01}], "K": []}
    tests["settings"] = {"alpha": 0.05, "exact": True}
    return tests


def heatmap_with_tests(**changes) -> Heatmap:
    rng = np.random.default_rng(2)
    statistics = make_statistics()
    for name in ("cross_mean", "overlap"):
        for block in "QKVO":
            arrays = statistics[name][block]
            arrays |= {"ci_low": arrays["statistic"] - 0.1, "ci_high": arrays["statistic"] + 0.1}
            there = np.where(np.isnan(arrays["statistic"]), np.nan, 1.0)
            arrays |= {"null_mean": 0.0625 * there, "null_low": -0.5 * there, "null_high": 0.75 * there}
            shape = present(block).shape
            drawn = {
                "effect_size": rng.normal(size=shape),
                **{key: rng.random(shape) for key in ("p_greater", "p_less", "p_max", "q_value_by")},
            }
            arrays |= {key: np.where(present(block), values, np.nan) for key, values in drawn.items()}
    statistics["settings"] = {"statistic": "overlap", "alternative": "two-sided", "fdr_alpha": 0.3, "confidence": 0.95}
    statistics["notes"] = ["few <labellings>"]
    return make_heatmap(**changes).with_statistics(statistics)


def large_heatmap(num_layers: int = 80, num_heads: int = 64) -> Heatmap:
    """All four blocks at full resolution, tested, with long texts."""
    rng = np.random.default_rng(0)
    shape, num_samples = (num_layers, num_heads), 4
    cross = {b: rng.gamma(1.0, size=(*shape, num_samples, num_samples)).astype(np.float32) for b in "QKVO"}
    keys = ("statistic", "p_value", "p_greater", "p_less", "q_value", "q_value_by", "p_max", "ci_low", "ci_high")
    tests = {
        name: {b: {key: rng.random(shape) for key in keys} | {"effect_size": rng.normal(size=shape)} for b in "QKVO"}
        for name in ("cross_mean", "overlap")
    }
    table = SampleTable(
        tuple(f"sample-{i}" for i in range(num_samples)),
        np.full(num_samples, 9000),
        np.ones(num_samples),
        ("語 " * 500_000,) * num_samples,
    )
    return Heatmap(
        "math",
        "code",
        tuple(range(num_layers)),
        tuple(range(num_heads)),
        tuple(range(num_heads)),
        np.ones(num_layers, np.int64),
        table,
        table,
        {b: scores.mean((-2, -1), dtype=np.float64) for b, scores in cross.items()},
        {b: np.ones(shape, bool) for b in "QKVO"},
        {b: {key: rng.random(shape) for key in FISHER_KEYS} for b in "QKVO"},
        cross,
        shared={"O_bias": {"mean": rng.random(num_layers)}},
        statistics={**tests, "settings": {"statistic": "overlap", "alternative": "two-sided", "fdr_alpha": 0.3}},
        attributes={"run_id": "large", "score": "interference"},
    )


def signed_heatmap() -> Heatmap:
    """Heads of every finding of signed scores: means of both signs, on both sides of their null."""
    heatmap = heatmap_with_tests(attributes={"run_id": "signed", "score": "signed"})
    mean = {block: values - np.nanmedian(values) for block, values in heatmap.mean.items()}
    statistics = {**heatmap.statistics, "settings": {**heatmap.statistics["settings"], "statistic": "cross_mean"}}
    del statistics["overlap"]
    return dataclasses.replace(heatmap, mean=mean, statistics=statistics)
