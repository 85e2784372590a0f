"""What ``compute.matmul_precision`` changes: time and scores of the same factors, in turns, in one process.

    python tests/benchmarks/precisions.py [--samples 32] [--tokens 96] [--rounds 5] [--layers 2]

For ``highest``, ``high`` and ``medium``, and for each kind of score, prints the time of scoring as a ratio to
``highest``, and how far scores are off those in float64, of a block's largest (the worst block); takes SmolLM2-135M.
Where a processor has no units for bfloat16 (or a GPU none for TF32) all three are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from effects import collected
from tabulate import tabulate

from qkov_dist import QKOVInterferenceMetric
from qkov_dist.memory import kept_heap
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings

PRECISIONS = ("highest", "high", "medium")


def main() -> None:
    """Score in turns and print."""
    arguments = _arguments()
    metric = collected(arguments.layers, arguments.samples, arguments.tokens)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    rows = []
    for score in KINDS:
        scored = replace(metric, score=score)
        exact, _ = _scored(scored, replace(scored._settings(), dtype=torch.float64))
        seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        off = {}
        for turn in range(arguments.rounds + 1):
            for precision in sorted(PRECISIONS, reverse=bool(turn % 2)):
                settings = replace(scored._settings(), matmul_precision=precision)
                found, took = _scored(scored, settings)
                off[precision] = _deviation(found, exact)
                if turn:  # the first warms up
                    seconds[precision].append(took)
        for precision in PRECISIONS:
            pairs = zip(seconds[precision], seconds["highest"], strict=True)
            ratios = [one / other for one, other in pairs]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append({"score": score, "precision": precision, "time": spread, "off": f"{off[precision]:.1e}"})
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 32), ("tokens", 96), ("rounds", 5), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def _scored(metric: QKOVInterferenceMetric, settings: ScoreSettings) -> tuple[list[torch.Tensor], float]:
    """Each block's scores of all pairs in float64, and the seconds that they took."""
    numbers = metric.collector.samples_of("a"), metric.collector.samples_of("b")
    roles = metric._chosen(("a", "b"), numbers).roles(metric.scope, pooled=True)
    tile_plan, store = metric._tile_plan(None, None, len(roles.members)), metric.collector.collection.store
    start = time.perf_counter()
    with kept_heap(torch.device("cpu")):
        layers = [score_layer(layer, store, roles, settings) for layer in tile_plan.layers]
    seconds = time.perf_counter() - start
    return [block.scores.double() for blocks in layers for block in blocks.values()], seconds


def _deviation(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The most that a score is off, of its block's largest."""
    of_blocks = ((one - other).abs().max() / other.abs().max() for one, other in zip(found, exact, strict=True))
    return float(max(of_blocks))


if __name__ == "__main__":
    main()
