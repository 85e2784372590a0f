"""The long run: thousands of hostile inputs for every reader, a table of what came of them, and the failures saved.

    python tests/fuzz/fuzz.py [--inputs 12000] [--seed 0] [--readers config,task] [--replay FOLDER]

Exit code 1 where an input had no clear answer; the inputs are then in a folder whose path is printed, with what
happened beside them. ``--replay`` gives one of these folders to its reader again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_config
import fuzz_hdf5
import fuzz_tasks
import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from tabulate import tabulate
from watchdog import FAILURES, KINDS, Files, Outcome, Watchdog, place_files

BATCH = 100  # of inputs drawn at once, and held in memory
MOST_SAVED = 3  # inputs that fail alike

INPUTS: dict[str, st.SearchStrategy[dict[str, bytes]]] = {
    "config": fuzz_config.inputs,
    "task": fuzz_tasks.inputs,
    "partial": fuzz_hdf5.partial_inputs,
    "resume": fuzz_hdf5.resume_inputs,
    "carry": fuzz_hdf5.gather_inputs,
    "gather": fuzz_hdf5.gather_inputs,
    "merge": fuzz_hdf5.merge_inputs,
    "frame": fuzz_hdf5.frame_inputs,
    "heatmap": fuzz_hdf5.heatmap_inputs,
    "page": fuzz_hdf5.shown_inputs,
    "report": fuzz_hdf5.shown_inputs,
    "stats": fuzz_hdf5.shown_inputs,
}
WEIGHTS = {"report": 0.06, "stats": 0.5, "page": 0.6, "merge": 0.6}  # of slow readers; the others have 1


@dataclass
class Tally:
    """Outcomes of one reader, and the inputs that failed, by what they have in common."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[Files, Outcome]]] = field(default_factory=dict)

    def add(self, files: Files, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts[outcome.kind] += 1
        if outcome.kind in FAILURES:
            alike = self.failures.setdefault(f"{outcome.kind}: {outcome.place}", [])
            if len(alike) < MOST_SAVED:
                alike.append((files, outcome))


def drawn(reader: str, count: int, seed: int) -> Iterator[Files]:
    """As many inputs of a reader, always the same for a seed."""
    for first in range(0, count, BATCH):
        yield from _batch(INPUTS[reader], min(BATCH, count - first), hash((seed, first)))


def _batch(inputs: st.SearchStrategy[dict[str, bytes]], count: int, seed: int) -> list[Files]:
    found: list[Files] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(inputs)
    def collect(files: dict[str, bytes]) -> None:
        found.append(files)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)  # of large inputs
        collect()
    return found


def fuzz(reader: str, count: int, seed: int, watchdog: Watchdog, advance: Callable[[], object] = lambda: None) -> Tally:
    """Give a reader so many inputs."""
    tally = Tally()
    for files in drawn(reader, count, seed):
        tally.add(files, watchdog.run(reader, files))
        advance()
    return tally


def shares(total: int, readers: Sequence[str]) -> dict[str, int]:
    """How many of all inputs each reader gets; at least as many in all."""
    weights = {reader: WEIGHTS.get(reader, 1.0) for reader in readers}
    return {reader: math.ceil(total * weight / sum(weights.values())) for reader, weight in weights.items()}


def table(tallies: dict[str, Tally]) -> str:
    """Reader x outcome."""
    rows = [
        [name, sum(tally.counts.values()), *(tally.counts[kind] for kind in KINDS)] for name, tally in tallies.items()
    ]
    rows.append(["all", *(sum(row[at] for row in rows) for at in range(1, 2 + len(KINDS)))])
    return tabulate(rows, headers=["reader", "inputs", *KINDS], tablefmt="github")


def save(tallies: dict[str, Tally], folder: Path) -> list[str]:
    """Write the inputs that failed; returns a line about each way to fail."""
    lines = []
    for reader, tally in tallies.items():
        for number, (what, alike) in enumerate(tally.failures.items()):
            for place, (files, outcome) in enumerate(alike):
                saved = folder / f"{reader}-{number}-{place}"
                place_files(saved, files)
                (saved / "outcome.txt").write_text(f"{outcome.kind}\n{outcome.detail}\n", errors="replace")
            lines.append(f"{reader}: {what}: {folder / f'{reader}-{number}-0'}")
    return lines


def replay(folder: Path) -> Outcome:
    """Give the files of a saved input to its reader again."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "outcome.txt")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    with Watchdog() as watchdog:
        return watchdog.run(folder.name.partition("-")[0], files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; the exit code."""
    parser = argparse.ArgumentParser(description="Give hostile inputs to everything that qkov_dist reads.")
    parser.add_argument("--inputs", type=int, default=12_000, help="of all readers together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs (default: %(default)s)")
    parser.add_argument("--readers", default=",".join(INPUTS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="a saved input")
    options = parser.parse_args(arguments)
    if options.replay:
        outcome = replay(options.replay)
        print(f"{outcome.kind} {outcome.place}\n{outcome.detail}")
        return int(outcome.kind in FAILURES)
    tallies: dict[str, Tally] = {}
    with Watchdog() as watchdog:
        for reader, count in shares(options.inputs, options.readers.split(",")).items():
            tallies[reader] = fuzz(reader, count, options.seed, watchdog)
            print(f"{reader}: {json.dumps(tallies[reader].counts)}", file=sys.stderr)
    print(table(tallies))
    if not any(tally.failures for tally in tallies.values()):
        return 0
    print("\n".join(["", "no clear answer:", *save(tallies, Path(tempfile.mkdtemp(prefix="qkov-fuzz-failures-")))]))
    return 1
