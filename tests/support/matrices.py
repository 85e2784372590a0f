"""A small matrix of tasks with what is awkward: absent heads, a non-ASCII name, pairs in conflict and in synergy."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
from heatmaps import GROUPS, HEADS, KV_HEADS, LAYERS, present
from influences import heatmap_with_effects, with_made_effects

from qkov_dist.results.matrix_data import MATRIX_KEYS
from qkov_dist.results.task_matrix import TaskMatrix

TASKS = ("math", "code", "loi française", "chat")


def made_matrix(tasks: tuple[str, ...] = TASKS) -> TaskMatrix:
    """Every pair has a heatmap with made effects; matrices are drawn at random, symmetric where they must be."""
    base, rng = heatmap_with_effects(), np.random.default_rng(0)
    heatmaps = {}
    for number, (a, b) in enumerate(combinations(tasks, 2)):
        made = with_made_effects(base, seed=number, shift=0.4 * (number % 3))
        heatmaps[a, b] = dataclasses.replace(made, task_a=a, task_b=b)
    values = {block: {name: _values(name, block, len(tasks), rng) for name in MATRIX_KEYS} for block in "QKVO"}
    for (a, b), heatmap in heatmaps.items():
        t, u = tasks.index(a), tasks.index(b)
        for block, of_block in (heatmap.effects or {}).items():
            for optimizer, arrays in of_block.items():
                values[block][f"change_{optimizer}"][t, u] = arrays["change"]
                values[block][f"change_{optimizer}"][u, t] = arrays["change"]
    samples = tuple(dataclasses.replace(base.samples_a) for _ in tasks)
    attributes = {key: value for key, value in base.attributes.items() if key != "statistics"}
    where = {block: present(block) for block in "QKVO"}
    return TaskMatrix(tasks, LAYERS, HEADS, KV_HEADS, GROUPS, samples, where, values, heatmaps, attributes)


def _values(name: str, block: str, num: int, rng: np.random.Generator) -> np.ndarray:
    mask = present(block)
    found = rng.normal(size=(num, num, *mask.shape))
    found = np.exp(found) if name == "mean" else (found + found.swapaxes(0, 1)) / 2
    if name == "overlap":
        found[range(num), range(num)] = 0.0
    if name.startswith("change"):
        found[range(num), range(num)] = -np.abs(found[range(num), range(num)])
    return np.where(mask, found, np.nan)
