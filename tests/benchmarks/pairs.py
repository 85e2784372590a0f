"""The ways to score a tile on a GPU side by side, in one process: what ``pair_trial`` chooses among, and by how much.

    python tests/benchmarks/pairs.py [--samples 64 192 400] [--rounds 5] [--score interference]

For tiles of 8 heads of 128 x 4096 and of all heads of a layer of SmolLM2-135M (64 x 576), for float32 products and
those that may use TF32: the time of what ``torch.compile`` fuses and of each kernel in two passes, as ratios to torch's
own products in the same round (medians with their range), and how far scores are off these, of the largest. Random
gradients of one seed; effects are left out, as they take the same beside all of them. Needs a CUDA device with Triton.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate

from qkov_dist.capture.numerics import products_as
from qkov_dist.scoring.kernel import Rule
from qkov_dist.scoring.pair_kernel import PairKernel, can_use
from qkov_dist.scoring.pair_trial import largest_deviation, timed_scores
from qkov_dist.scoring.score import compiled
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.tile_gradients import Buffers

SHAPES = {"8 x 128 x 4096": (8, 128 * 4096), "15 x 64 x 576": (15, 64 * 576)}
PRECISIONS = ("highest", "high")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 192, 400])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--score", choices=list(KINDS), default="interference")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not can_use(torch.float32, device):
        sys.exit("pairs.py: expected a CUDA device and Triton, found none. Run it where torch sees a GPU.")
    print(torch.cuda.get_device_name(device))
    found = [
        row
        for precision in PRECISIONS
        for num in arguments.samples
        for name, shape in SHAPES.items()
        for row in rows(f"{name}, {num} samples", (num, *shape), arguments.score, precision, arguments.rounds, device)
    ]
    print(tabulate(found, headers="keys", tablefmt="github", disable_numparse=True))


def rows(
    title: str, shape: Sequence[int], score: Any, precision: str, rounds: int, device: torch.device
) -> Iterator[dict[str, str]]:
    """A row for each way to score all pairs of gradients of a shape [N, heads, P]."""
    (num, heads, size), everyone = shape, slice(0, shape[0])
    weights, buffers = torch.full((2, num), 0.5 / num, device=device), Buffers()
    plain = Rule(score, 0.0, (1e-3,), everyone, everyone)
    ways = {"products": plain, "torch.compile": replace(plain, fused=compiled(device.type))}
    ways |= {str(kernel.block): replace(plain, pairs=kernel) for kernel in PairKernel.candidates(precision)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    off = {}
    with products_as(precision):
        for _ in range(rounds):
            expected = None
            for name, rule in ways.items():
                scores, taken = timed_scores(rule, heads, size, weights, buffers)
                expected = expected or scores
                seconds[name].append(taken)
                off[name] = largest_deviation(scores, expected)
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["products"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rate = f"{1e9 * statistics.median(taken) / (heads * size):.2f}"
        yield {
            "tile": title,
            "precision": precision,
            "by": name,
            "x products": spread,
            "ns an element of a weight": rate,
            "off": f"{off[name]:.1e}",
        }


if __name__ == "__main__":
    main()
