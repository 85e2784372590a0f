"""What effects add to the time of scoring: the same factors scored with and without them, in turns, in one process.

    python tests/benchmarks/effects.py [--samples 32] [--tokens 96] [--rounds 9] [--layers 3] [--own-shares]

Prints processor seconds (medians) and their ratio, for scores of all pairs and of A x B; takes SmolLM2-135M. With
``--own-shares`` the same of what intervals of overlap need, which is formed with scores of all pairs alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from real import smollm2

from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric
from qkov_dist.data.samples import Sample
from qkov_dist.memory import kept_heap


def main() -> None:
    """Time both and print."""
    arguments = _arguments()
    metric = collected(arguments.layers, arguments.samples, arguments.tokens)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    what = "own shares" if arguments.own_shares else "effects"
    for pairs in ("all",) if arguments.own_shares else ("all", "cross"):
        seconds = _in_turns(metric, pairs, arguments.rounds, what)
        without, having = (statistics.median(of_one) for of_one in seconds)
        ratios = [one / other for other, one in zip(*seconds, strict=True)]
        print(
            f"pairs {pairs}, {arguments.samples} + {arguments.samples} samples of {arguments.tokens} tokens, "
            f"{arguments.layers} layers: {without:.2f} s without {what}, {having:.2f} s with, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def collected(num_layers: int, samples: int, tokens: int) -> QKOVInterferenceMetric:
    """The metric over the first layers of SmolLM2, with so many samples of two made tasks collected."""
    model = smollm2(num_layers).model
    collector = FisherCollector(gradient_memory_mb=4000, layers=list(range(num_layers)))
    for task, seed in (("a", 1), ("b", 2)):
        collector.collect_fisher(model, _samples(samples, tokens, seed), task)
    return QKOVInterferenceMetric(QKOVConfig.from_model(model), collector)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("samples", 32), ("tokens", 96), ("rounds", 9), ("layers", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--own-shares", action="store_true")
    return parser.parse_args()


def _samples(count: int, tokens: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(f"{seed}-{n}", ids := rng.integers(10, 40000, tokens), ids, "") for n in range(count)]


def _in_turns(metric: QKOVInterferenceMetric, pairs: str, rounds: int, what: str) -> tuple[list[float], list[float]]:
    """Processor seconds of scoring without effects, or own shares, and with."""
    seconds: tuple[list[float], list[float]] = ([], [])
    numbers = metric.collector.samples_of("a"), metric.collector.samples_of("b")
    roles = metric._chosen(("a", "b"), numbers).roles(metric.scope, pooled=pairs == "all")
    both = [replace(roles, means=None), roles]
    if what == "own shares":
        both = [roles, replace(roles, own_shares=True)]
    tile_plan = metric._tile_plan(None, None, len(roles.members))
    for number in range(rounds + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            with kept_heap(torch.device("cpu")):
                metric._scored(tile_plan, both[place])
            if number:  # the first warms up
                seconds[place].append(time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()
