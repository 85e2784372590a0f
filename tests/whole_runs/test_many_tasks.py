"""A run of more than two tasks: every pair against dense autograd under the Fisher of all, in its file."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import oracle
import pytest
import yaml
from influences import records_of
from running import qkov
from samples import mixed_samples, write_task
from zoo import VOCAB

from qkov_dist import load_heatmap, load_matrix
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.influences import Samples
from qkov_dist.scoring.influence_records import OPTIMIZERS, SUMS

SIZES = {"math": 5, "code": 3, "law": 4, "chat": 2, "poems": 3}
RELATIVE = 1e-3


def many_config(config, tmp_path, sizes):
    """A configuration of the first tasks of SIZES, and their samples."""
    raw, samples = yaml.safe_load(config.read_text()), {}
    for seed, (name, num) in enumerate(sizes.items(), start=1):
        samples[name] = mixed_samples(num, VOCAB, seed=seed)
        write_task(tmp_path / f"{name}.jsonl", samples[name])
    raw["tasks"] = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in sizes]
    raw["fisher"] = {"estimator": "mean"}
    config.write_text(yaml.safe_dump(raw))
    return samples


def expected(entry, samples):
    """layer -> block -> per head: gradients [N, p] of all samples, task after task, and R under the Fisher of all."""
    model, pooled = entry.build(), [s for of_task in samples.values() for s in of_task]
    gradients, _ = oracle.per_sample_gradients(model, [(s.input_ids, s.labels) for s in pooled])
    found = {}
    for layer in resolve(model).layers:
        heads = [oracle.heads_of_layer(model, entry.family, layer.module, g) for g in gradients]
        found[layer.index] = {}
        for block in BLOCKS:
            of_heads = [np.stack([h[block][n].numpy() for h in heads]) for n in range(len(heads[0][block]))]
            fishers = [(g**2).mean(0) for g in of_heads]
            ridge = RELATIVE * np.concatenate(fishers).mean()
            found[layer.index][block] = [(g, f + ridge) for g, f in zip(of_heads, fishers, strict=True)]
    return found


def close(found, wanted, rtol=1e-4):
    largest = np.nanmax(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * largest)


def parts_of(samples):
    edges = np.cumsum([0, *map(len, samples.values())])
    return {name: slice(*edges[n : n + 2]) for n, name in enumerate(samples)}


def assert_every_pair_is_right(path, samples, dense):
    """Scores, changes, curvatures and influences of every pair, and the matrix."""
    matrix, parts = load_matrix(path), parts_of(samples)
    assert matrix.tasks == tuple(samples)
    for block in BLOCKS:
        scores = {
            (layer, h): (g**2 / r) @ np.abs(g).T
            for layer, blocks in dense.items()
            for h, (g, r) in enumerate(blocks[block])
        }
        layers, heads = len(dense), len(dense[0][block])
        means = np.zeros((len(parts), len(parts), layers, heads))
        for (layer, h), of_head in scores.items():
            np.fill_diagonal(of_head, np.nan)
            for t, rows in enumerate(parts.values()):
                for u, cols in enumerate(parts.values()):
                    means[t, u, layer, h] = np.nanmean(of_head[rows, cols])
        close(matrix.values[block]["mean"], means)
        for (t, a), (u, b) in combinations(enumerate(parts), 2):
            heatmap = load_heatmap(path, (a, b))
            cross = np.stack([[scores[n, h][parts[a], parts[b]] for h in range(heads)] for n in range(layers)])
            close(heatmap.cross[block], cross)
            within = means[t, t] * means[u, u]
            with np.errstate(divide="ignore", invalid="ignore"):  # samples of two tokens have no gradient of Q and K
                overlap = 0.5 * np.log(means[t, u] * means[u, t] / within)
            overlap[~np.isfinite(overlap)] = np.nan
            np.testing.assert_allclose(matrix.values[block]["overlap"][t, u], overlap, rtol=0, atol=2e-4)
            tested = heatmap.statistics["overlap"][block]["statistic"]  # of none that some labelling leaves without
            np.testing.assert_allclose(tested, np.where(np.isnan(tested), np.nan, overlap), rtol=0, atol=2e-4)
            assert_effects(matrix, heatmap, block, parts, (a, b), dense)


def assert_effects(matrix, heatmap, block, parts, pair, dense):
    both = [*range(*parts[pair[0]].indices(99)), *range(*parts[pair[1]].indices(99))]
    num_a = len(heatmap.samples_a)
    is_a = np.arange(len(both)) < num_a
    records = np.stack(
        [
            [records_of(g[both], r, Samples(is_a, ~is_a), num_a) for g, r in blocks[block]]
            for _, blocks in sorted(dense.items())
        ]
    )
    t, u = (matrix.tasks.index(name) for name in pair)
    for place, optimizer in enumerate(OPTIMIZERS):
        effects, of_optimizer = heatmap.effects[block][optimizer], records[:, :, place]
        close(heatmap.influences[block][:, :, place], of_optimizer[..., len(SUMS) :])
        close(effects["curvature_a"], of_optimizer[..., 0])
        close(effects["curvature_b"], of_optimizer[..., 1])
        for task, at, num in ((t, 2, num_a), (u, 3, len(both) - num_a)):
            own = (num * of_optimizer[..., at] + of_optimizer[..., at + 2]) / (num - 1)
            close(effects["own_a" if at == 2 else "own_b"], own, 1e-3)
            close(matrix.values[block][f"change_{optimizer}"][task, task], own, 1e-3)
        for other in ((t, u), (u, t)):
            np.testing.assert_array_equal(matrix.values[block][f"change_{optimizer}"][other], effects["change"])


@pytest.mark.parametrize("num", [3, 5])
def test_every_pair_of_many_tasks_equals_dense_autograd_under_the_fisher_of_all(config, entry, tmp_path, num):
    sizes = dict(list(SIZES.items())[:num])
    samples = many_config(config, tmp_path, sizes)
    assert qkov("run", config, "--quiet") == 0
    path = tmp_path / "out" / "heatmap.h5"
    assert_every_pair_is_right(path, samples, expected(entry, samples))
