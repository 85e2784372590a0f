"""What a run costs, as ratios to bare passes, beside what other tools take for less.

Which case is played follows from the options; each prints its page and writes results/CASE.{json,md}.

    bash launch/bench.sh                                # the main table: 32 + 32 samples of 96 tokens
    bash launch/bench.sh --samples 100                  # from 100 samples on: scoring against the per-pair loop
    bash launch/bench.sh --ranks                        # two ranks of one thread against one
    bash launch/bench.sh --spill                        # a quarter of the factors in memory against all
    bash launch/bench.sh --growth                       # exponents in samples, tokens, layers and ranks
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peers
import torch
from cases import LIBRARIES, TITLES, Result, Setup, main_table, ranks_table, samples_table, spill_table
from device import on_gpu
from growth import growth_table
from orders import Order
from rounds import in_a_process

RESULTS = Path(__file__).parent / "results"
MANY = 100
ALWAYS = {"bare", "bare_masked", "product", "product_masked"}  # to whom all others are compared


def versions() -> dict[str, Any]:
    """What the numbers depend on."""
    peers.find_peers()
    found = {name: _version(name) for name in ("torch", "transformers", *LIBRARIES)}
    cores = os.cpu_count()
    return {
        "python": platform.python_version(),
        **found,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if on_gpu() else None,
    }


def write(result: Result, folder: Path) -> None:
    """Write a case's numbers and page."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {**result.data, "versions": versions()}
    (folder / f"{result.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{result.name}.md").write_text(result.page, encoding="utf-8")


def play_case(options: argparse.Namespace, folder: Path) -> Result:
    """Play the case that the options ask for."""
    base = Order(
        "",
        str(folder),
        model=options.model,
        samples=options.samples,
        tokens=options.tokens,
        threads=options.threads,
        repeats=options.repeats,
        permutations=options.permutations,
    )
    at_once = max((os.cpu_count() or 1) // options.threads, 1)
    setup = Setup(base, options.rounds, in_a_process, lambda line: print(line, file=sys.stderr, flush=True), at_once)
    if options.case is not None:
        return {"ranks": ranks_table, "spill": spill_table, "growth": growth_table}[options.case](setup)
    return samples_table(setup) if options.samples >= MANY else main_table(setup, options.leave_out)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    case = made.add_mutually_exclusive_group()
    for name in ("ranks", "spill", "growth"):
        case.add_argument(f"--{name}", dest="case", action="store_const", const=name, help=f"the case `{name}`")
    made.add_argument("--samples", type=int, default=32, help="samples of each task (32)")
    made.add_argument("--tokens", type=int, default=96, help="tokens of each sample (96)")
    made.add_argument("--model", default="smollm2", help="smollm2, tiny, or llama-LAYERS (smollm2)")
    made.add_argument("--threads", type=int, default=2, help="threads of a process (2)")
    made.add_argument("--rounds", type=int, default=3, help="how often everybody plays (3)")
    made.add_argument("--repeats", type=int, default=1, help="timings of a process, of which it reports the median (1)")
    made.add_argument("--permutations", type=int, default=1000, help="relabellings of a run's tests (1000)")
    made.add_argument(
        "--leave-out", nargs="*", default=(), choices=sorted({*TITLES} - ALWAYS), help="of the main table"
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="where results are written")
    return made


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    options = parser().parse_args()
    with TemporaryDirectory() as folder:
        result = play_case(options, Path(folder))
    write(result, options.results)
    print(result.page)


if __name__ == "__main__":
    main()
