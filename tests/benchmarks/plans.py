"""How far the times that ``qkov plan`` expects are from those that runs take on the hardware at hand.

    python tests/benchmarks/plans.py [--rounds 3]

Runs SmolLM2-135M on made samples, of several numbers, lengths and layers, and prints each phase's expected and measured
seconds (median over rounds) and their ratio. Rates are measured anew before each run, as a run does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tabulate import tabulate
from tasks import run_of, task_of

from qkov_dist.planning.hardware import measured_cpu
from qkov_dist.planning.measured import Measured, comparison_lines
from qkov_dist.planning.run_plan import RunPlan
from qkov_dist.planning.time_model import PHASES, Phase


class Case(NamedTuple):
    """One shape of a run."""

    samples: int
    tokens: int
    layers: str
    tasks: int = 2


CASES = (
    Case(16, 96, "0-29"),
    Case(32, 96, "15-29"),
    Case(64, 48, "20-29"),
    Case(8, 384, "15-29"),
    Case(12, 96, "20-29", 4),
)


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        seen = [
            [_seconds(case, f"{folder}/{number}-{turn}") for turn in range(rounds)] for number, case in enumerate(CASES)
        ]
    rows = []
    for case, of_case in zip(CASES, seen, strict=True):
        shape = f"{case.tasks} x {case.samples} x {case.tokens}, layers {case.layers}"
        for phase in PHASES:
            planned, measured = (statistics.median(one[phase][place] for one in of_case) for place in (0, 1))
            ratios = [one[phase][0] / one[phase][1] for one in of_case]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(
                {"run": shape, "phase": phase, "planned": planned, "measured": measured, "planned / measured": spread}
            )
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


def _seconds(case: Case, folder: str) -> dict[str, tuple[float, float]]:
    """By phase, seconds as planned and as measured."""
    found: dict[str, tuple[float, float]] = {}

    def compared(plan: RunPlan, phases: Sequence[Phase], measured: Sequence[Measured]) -> Any:
        found.update({phase.name: (phase.seconds, measured[0].seconds[phase.name]) for phase in phases})
        return comparison_lines(plan, phases, measured)

    Path(folder).mkdir()
    tasks = [task_of(Path(folder), number, case.samples, case.tokens) for number in range(case.tasks)]
    measured_cpu.cache_clear()
    with mock.patch("qkov_dist.run.comparison_lines", compared):
        run_of(folder, "out", tasks, case.layers)
    return found


if __name__ == "__main__":
    main()
