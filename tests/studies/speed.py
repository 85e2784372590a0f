"""How long do the tests take? As many heads as SmolLM2-135M has, with scores drawn at random.

Scores of real models range over orders of magnitude between samples and between heads; so do these. What is timed is
what a run adds when it tests: every layer's tests, their joining and their correction. It goes by the number of samples
squared, so that the tests stay a small share of the scoring that they follow.

    PYTHONPATH=tests/support .venv/bin/python tests/studies/speed.py --samples 100 --permutations 1000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from qkov_dist.stats.head_tests import LayerTests, layer_tests, threads_that_test
from qkov_dist.stats.statistics import QKOVStatistics

HEADS = {"Q": 9, "K": 3, "V": 3, "O": 9}


def random_scores(heads: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """Scores [heads, N, N] of either role's samples and of heads that differ much in size."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(heads, *shape, generator=generator)

    logs = normal(num_samples, 1) + normal(1, num_samples) + 0.7 * normal(num_samples, num_samples)
    return (logs + 4 * normal(1, 1)).exp()


def seconds(num_layers: int, num_samples: int, tests: QKOVStatistics) -> float:
    """Seconds that testing all heads takes, with ``num_samples`` samples a task."""
    generator = torch.Generator().manual_seed(0)
    total = 2 * num_samples
    layers = [{b: random_scores(n, total, generator) for b, n in HEADS.items()} for _ in range(num_layers)]
    heads = {block: tuple(range(number)) for block, number in HEADS.items()}
    attributes = {"score": "interference", "estimator": "mean", "scope": "pooled"}
    heatmap = SimpleNamespace(
        layers=tuple(range(num_layers)),
        natives=heads.__getitem__,
        present={block: np.ones((num_layers, number), bool) for block, number in HEADS.items()},
        attributes=attributes,
    )
    ids = [str(sample) for sample in range(total)]
    start = time.perf_counter()
    design = tests.design(num_samples, num_samples)
    with threads_that_test() as submit:
        begun = [layer_tests(submit, design, layer, scores, heads, ids) for layer, scores in enumerate(layers)]
        found = LayerTests.joined(wait() for wait in begun)
    tests.results(heatmap, design, found)  # type: ignore[arg-type]
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100, help="samples of each task")
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    tests = QKOVStatistics(n_permutations=given.permutations)
    times = [seconds(given.layers, given.samples, tests) for _ in range(given.repeats)]
    print(
        f"{given.layers * sum(HEADS.values())} heads, {given.samples} + {given.samples} samples, {given.permutations} "
        f"relabellings, {torch.get_num_threads()} threads: "
        f"{', '.join(f'{t:.2f}' for t in times)} s"
    )


if __name__ == "__main__":
    main()
