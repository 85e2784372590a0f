"""What a run of five tasks costs, beside the ten runs of two that it takes the place of, in one process.

    python tests/benchmarks/tasks.py [--samples 24] [--tokens 96] [--layers 10] [--tasks 5] [--rounds 1]

Prints the seconds of each phase, on the clock and without loading the model; takes SmolLM2-135M, whose last layers are
scored. ``beyond scoring`` is what is not scoring, in units of the run's own capture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import qkov_dist.run
from qkov_dist.commands.demo import demo_model
from qkov_dist.config_file import from_dict
from qkov_dist.planning.measured import Measured

PHASES = ("capture", "scoring", "combining")


def main() -> None:
    """Run both, and print."""
    arguments = _arguments()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [task_of(Path(folder), n, arguments.samples, arguments.tokens) for n in range(arguments.tasks)]
        layers = f"{30 - arguments.layers}-29"
        for turn in range(arguments.rounds):
            whole = _print(f"one run of {len(tasks)} tasks", [run_of(folder, f"all-{turn}", tasks, layers)])
            pairs = list(combinations(tasks, 2))
            runs = [run_of(folder, f"{n}-{turn}", pair, layers) for n, pair in enumerate(pairs)]
            print(f"{_print(f'{len(pairs)} runs of two', runs) / whole:.2f} x the one run")


def _print(name: str, runs: list[dict[str, float]]) -> float:
    """Print what runs took, and return their seconds."""
    found = {phase: sum(run[phase] for run in runs) for phase in (*PHASES, "rest")}
    total = sum(found.values())
    listed = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in found.items())
    beyond = (total - found["scoring"]) / found["capture"]
    print(f"{name}: {listed}; beyond scoring {beyond:.2f} x its capture", flush=True)
    return total


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("samples", 24), ("tokens", 96), ("layers", 10), ("tasks", 5), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def task_of(folder: Path, number: int, samples: int, tokens: int) -> dict[str, str]:
    """A task of made samples, as a configuration names it."""
    rng = np.random.default_rng(number)
    path = folder / f"{number}.jsonl"
    ids = rng.integers(10, 40000, (samples, tokens)).tolist()
    path.write_text("".join(f"{json.dumps({'input_ids': row})}\n" for row in ids))
    return {"name": f"task {number}", "path": str(path)}


def run_of(folder: str, name: str, tasks: Any, layers: str) -> dict[str, float]:
    """Seconds by phase; ``rest`` is from the prepared job to the written file, but for the phases."""
    seen, begun = Measured(), []

    def prepared(*given: Any) -> Any:
        job = prepare(*given)
        begun.append(time.perf_counter())
        return job

    prepare = qkov_dist.run.prepare
    config = {
        "model": {"path": str(demo_model()), "dtype": "float32"},
        "tasks": list(tasks),
        "metric": {"layers": layers},
        "output": {"dir": f"{folder}/{name}"},
    }
    watched = mock.patch("qkov_dist.run.Measured", lambda **kept: Measured(**kept) if kept else seen)
    with watched, mock.patch("qkov_dist.run.prepare", prepared):
        qkov_dist.run.run(from_dict(config))
    whole = time.perf_counter() - begun[0]
    seconds = {phase: seen.seconds[phase] for phase in PHASES}
    return {**seconds, "rest": whole - sum(seconds.values())}


if __name__ == "__main__":
    main()
