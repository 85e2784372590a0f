"""A small matrix of tasks with what is awkward: absent heads, a non-ASCII name, pairs in conflict and in synergy."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np
from heatmaps import GROUPS, HEADS, KV_HEADS, LAYERS, present
from influences import heatmap_with_effects, with_made_effects

from qkov_dist.finish import with_tested_effects
from qkov_dist.results.effects import counted_samples, untested_effects
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import FISHER_KEYS, SampleTable
from qkov_dist.results.influences import without_self_pairs
from qkov_dist.results.matrix_data import MATRIX_KEYS
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.scoring.influence_records import SUMS, of_samples
from qkov_dist.stats.statistics import QKOVStatistics

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


def matrix_of_camps(
    camps: str = "++--0", names: tuple[str, ...] = (), num_samples: int = 12, num_layers: int = 4, num_heads: int = 6
) -> TaskMatrix:
    """Tasks whose mean gradients agree within a camp (``+`` or ``-``) and oppose the other's, in every second head.

    Those of camp ``0`` have to do with nobody. All numbers come of one draw of gradients, so that matrices, effects and
    own changes agree with each other.
    """
    rng, size = np.random.default_rng(1), 16
    signs = np.array([{"+": 1.0, "-": -1.0, "0": 0.0}[camp] for camp in camps])
    named = {"+": "plus", "-": "minus", "0": "none"}
    tasks = names or tuple(f"{named[camp]}{place}" for place, camp in enumerate(camps))
    layers, heads, kv_heads = (tuple(range(number)) for number in (num_layers, num_heads, num_heads // 2))
    tables = tuple(
        SampleTable(
            tuple(f"{task}-{n}" for n in range(num_samples)),
            np.full(num_samples, 20),
            rng.uniform(1, 3, num_samples),
            tuple(f"{task}: text {n}" for n in range(num_samples)),
            tuple(f"{task}/{n}" for n in range(num_samples)),
        )
        for task in tasks
    )
    values: dict[str, dict[str, Any]] = {}
    records: dict[str, Any] = {}
    for block in "QKVO":
        natives = heads if block in "QO" else kv_heads
        shape = (num_layers, len(natives))
        common = rng.normal(size=(*shape, 1, 1, size)) * 0.5 * (np.arange(len(natives)) % 2)[:, None, None, None]
        alone = rng.normal(size=(*shape, len(tasks), 1, size)) * 0.3
        drawn = rng.normal(size=(*shape, len(tasks), num_samples, size))
        gradients = drawn + alone + common * signs[:, None, None]
        values[block], records[block] = _of_gradients(gradients)
    attributes = {
        "run_id": "camps",
        "score": "interference",
        "model_type": "toy",
        "config": {
            "tasks": [{"name": task} for task in tasks],
            "output": {"dir": "runs/camps"},
            "metric": {"loss_reduction": "mean"},
        },
        "versions": {"torch": "2.6"},
        "warnings": ["ridge exceeds I on 60% of Q 2.1"],
        "notes": [],
    }
    where = {block: np.ones(of["mean"].shape[2:], bool) for block, of in values.items()}
    groups = np.full(num_layers, 2)
    matrix = TaskMatrix(tasks, layers, heads, kv_heads, groups, tables, where, values, {}, attributes)
    heatmaps = {pair: _pair_of(matrix, pair, records, rng) for pair in matrix.pairs}
    return dataclasses.replace(matrix, heatmaps=heatmaps)


def _of_gradients(gradients: np.ndarray) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Matrices of one block from [layer, head, task, n, p]; by optimizer what records of pairs are made of."""
    squares = (gradients**2).mean(3)
    fisher, sizes = squares.mean(2) * 1.001, np.abs(gradients).mean(3)
    mean = np.einsum("lhtp,lhup->tulh", squares / fisher[:, :, None], sizes)
    own = mean[range(len(mean)), range(len(mean))]
    overlap = 0.5 * np.log(mean * mean.swapaxes(0, 1) / (own[:, None] * own[None]))
    matrices, found = {"mean": mean, "overlap": overlap}, []
    for name, scale in (("sgd", np.ones_like(fisher)), ("adam", fisher**-0.5)):
        means, scaled = gradients.mean(3), gradients.mean(3) * scale[:, :, None]
        influences = -np.einsum("lhtnp,lhup->lhtnu", gradients, scaled)
        change = influences.mean(3).transpose(2, 3, 0, 1).copy()
        norm = np.einsum("lhtp,lhp->tlh", squares, scale)
        for task in range(len(change)):
            change[task, task] = without_self_pairs(change[task, task], norm[task], gradients.shape[3])
        matrices[f"change_{name}"] = change
        curvature = 0.5 * np.einsum("lhtp,lhup->tulh", squares, scaled**2)
        own_change = -np.einsum("lhtp,lhtp->tlh", means, scaled)
        found.append({"influences": influences, "curvature": curvature, "own": own_change, "norm": norm})
    return matrices, found


def _pair_of(matrix: TaskMatrix, pair: tuple[str, str], records: dict[str, Any], rng: np.random.Generator) -> Heatmap:
    a, b = (matrix.tasks.index(task) for task in pair)
    shapes = {block: of["mean"].shape[2:] for block, of in matrix.values.items()}
    counted = counted_samples(matrix.samples[a].contents, matrix.samples[b].contents)
    of_pair = {}
    for block, shape in shapes.items():
        rows = []
        for of in records[block]:
            sums = {
                "curvature_a": of["curvature"][a, b],
                "curvature_b": of["curvature"][b, a],
                **{f"{key}_{name}": of[key][task] for key in ("own", "norm") for name, task in (("a", a), ("b", b))},
            }
            influences = [of["influences"][:, :, a, :, b], of["influences"][:, :, b, :, a]]
            rows.append(np.concatenate([*(sums[name][..., None] for name in SUMS), *influences], axis=-1))
        of_pair[block] = np.stack(rows, axis=2)
        assert of_pair[block].shape[:2] == shape
    tests = {
        block: {
            "statistic": matrix.values[block]["overlap"][a, b],
            "p_value": rng.random(shape),
            "q_value": rng.random(shape),
            "p_max": rng.random(shape),
            "effect_size": rng.normal(size=shape),
        }
        for block, shape in shapes.items()
    }
    num = len(matrix.samples[a])
    cross = {block: rng.gamma(1.0, size=(*shape, num, num)).astype(np.float32) for block, shape in shapes.items()}
    fisher = {block: {key: rng.random(shape) for key in FISHER_KEYS} for block, shape in shapes.items()}
    heatmap = Heatmap(
        *pair,
        *(matrix.layers, matrix.heads, matrix.kv_heads, matrix.groups, matrix.samples[a], matrix.samples[b]),
        {block: of["mean"][a, b] for block, of in matrix.values.items()},
        dict(matrix.present),
        fisher,
        cross,
        statistics={"overlap": tests, "settings": {"statistic": "overlap", "alternative": "two-sided"}},
        attributes={**matrix.attributes, "tasks": list(matrix.tasks)},
        influences={block: of_samples(of_block) for block, of_block in of_pair.items()},
        effects={block: untested_effects(of_block, counted) for block, of_block in of_pair.items()},
    )
    return with_tested_effects(heatmap, QKOVStatistics(n_permutations=100))
