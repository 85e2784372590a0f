"""What scoring one large layer takes: heads of 128 x 4096, as of an 8B model, with random factors.

    python tests/benchmarks/heads.py [--samples 64] [--tokens 256] [--rounds 3] [--against CHECKOUT]

Scores all pairs of 64 + 64 samples at the 32 heads of Q and O and the 8 of K and V by the compiled kernel, each round
in a process of its own; with ``--against`` in turns with another checkout of this package. Prints processor and wall
seconds, the rate of all products, and the ratio. Takes 3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qkov_dist.capture.sinks import Factors
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import Batch
from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve
from qkov_dist.memory import kept_heap
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.fisher import by_task, fisher_steps, fisher_weights
from qkov_dist.scoring.influence_records import mean_weights
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import LayerTiles, Selection, make_tile_plan

ROOT = Path(__file__).parents[2]
HAS_KERNEL = find_spec("qkov_dist.scoring.native_kernel") is not None  # not every checkout has one


def main() -> None:
    """Time in turns and print."""
    options = _arguments()
    if options.alone:
        print(json.dumps(_timed(options.samples, options.tokens)))
        return
    trees = {"this": ROOT, **({"other": options.against.resolve()} if options.against else {})}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(options.rounds):
        for name in sorted(trees, reverse=bool(number % 2)):
            found[name].append(_in_a_process(trees[name], options))
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, rounds in found.items():
        seconds = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        rate = seconds["flops"] / seconds["wall"] / 1e9
        print(f"{name}: {seconds['wall']:.2f} s, processor {seconds['cpu']:.2f} s, {rate:.0f} GFLOP/s")
    if options.against:
        for key in ("wall", "cpu"):
            ratios = sorted(b[key] / a[key] for a, b in zip(found["this"], found["other"], strict=True))
            print(f"other / this, {key}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 64), ("tokens", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(tree: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", f"--samples={options.samples}", f"--tokens={options.tokens}"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _timed(num: int, tokens: int) -> dict[str, float]:
    """Seconds of scoring all pairs, and the operations of its products."""
    layer = _layer(2 * num)
    roles = _roles(num)
    store = _factors(layer, 2 * num, tokens)
    cpu, wall = time.process_time(), time.perf_counter()
    with kept_heap(torch.device("cpu")):
        blocks = score_layer(layer, store, roles, ScoreSettings(compile=HAS_KERNEL))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"wall": wall, "cpu": cpu, "flops": sum(block.flops for block in blocks.values())}


def _layer(num_samples: int) -> LayerTiles:
    """The tiles of one layer of an 8B model."""
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1, intermediate_size=64,
        vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        layout = resolve(LlamaForCausalLM(config))
    return make_tile_plan(layout, Selection(), include_bias=False, num_samples=num_samples).layers[0]


def _roles(num: int) -> Roles:
    steps = fisher_steps((num, num), batch_size=8, scope="pooled")
    weights = by_task(fisher_weights(steps, 2 * num, estimator="mean", decay=0.99), [0] * num + [1] * num, 2)
    every = slice(0, 2 * num)
    means = mean_weights(np.ones(2 * num, bool), (num, num))
    return Roles(tuple(range(2 * num)), weights, every, every, means, (num, num))


def _factors(layer: LayerTiles, num: int, tokens: int) -> FactorStore:
    """Random X and D at every projection; Q, K and V share their X."""
    store, generator = FactorStore(2**34, lengths=(tokens,) * num), torch.Generator().manual_seed(0)
    shapes = {tile.site: (0, 0) for tile in layer.slices}
    for tile in layer.slices:
        rows, cols = shapes[tile.site]
        shapes[tile.site] = max(rows, tile.rect.row_end), max(cols, tile.rect.col_end)
    inputs: dict[str, tuple[Site, torch.Tensor]] = {}
    ids = torch.ones(num, tokens, dtype=torch.int64)
    with store.batch(Batch(tuple(range(num)), tuple(map(str, range(num))), ids, ids, ids, ids)):
        for site, (rows, cols) in shapes.items():
            kind = "o" if site.module.endswith("o_proj") else "qkv"
            if kind not in inputs:
                inputs[kind] = site, torch.randn(num * tokens, cols, generator=generator)
            x_site, x = inputs[kind]
            store.add(Factors(site, x_site, x, torch.randn(num * tokens, rows, generator=generator)))
    return store


if __name__ == "__main__":
    main()
