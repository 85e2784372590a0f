"""How time and memory grow: exponents of a run in its samples, tokens, layers and ranks.

One size is varied at a time on a generated Llama; an exponent is the slope of a line through the logarithms. Time is
rank 0's of the processor, so that ranks beyond the number of cores can be compared too; memory is what a rank takes at
most beyond what it had before the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import Result, Setup, order, result
from material import read_facts
from orders import Order
from rounds import Entry, Round, median, play
from tabulate import tabulate

SIZES = {
    "samples": (16, 32, 64, 128),
    "tokens": (32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
    "ranks": (1, 2, 3, 4),
}
BASE = {"samples": 16, "tokens": 64, "layers": 4, "ranks": 1}
MEASURED = {
    "capture": "capture (cpu)",
    "scoring": "scoring (cpu)",
    "statistics": "statistics (cpu)",
    "capture and scoring": "",
    "memory": "growth",
}


def growth_table(setup: Setup, sizes: dict[str, tuple[int, ...]] = SIZES, base: dict[str, int] = BASE) -> Result:
    """Exponents of one run's time and memory."""
    entries = list(_entries(setup, sizes, base))
    for entry in entries:
        _write(setup, entry.order)
    rounds = play(entries, setup.rounds, setup.perform, setup.say)
    rows = [_row(rounds, axis, found) for axis, found in sizes.items()]
    points = [{"": entry.key, **_measured(rounds, entry.key)} for entry in entries]
    several = [entry for entry in entries if entry.order.ranks > 1]
    sent = [_communication(entry.order, median(rounds, f"{entry.key}:sent")) for entry in several]
    at = ", ".join(f"{value} {name if value > 1 else name.removesuffix('s')}" for name, value in base.items())
    parts = [
        "# How time and memory grow",
        f"A Llama of middle size, one thread a rank, {setup.base.permutations} permutations; {at}, but for what is "
        f"varied; {setup.rounds} rounds.",
        tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"),
        " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tabulate(points, headers="keys", tablefmt="github", floatfmt=".3g"),
    ]
    if sent:
        text = " ".join((_communication.__doc__ or "").split())
        parts += [
            "## What ranks send each other",
            text,
            tabulate(sent, headers="keys", tablefmt="github", floatfmt=".4g"),
        ]
    exponents = {row["exponent in"]: {k: v for k, v in row.items() if k in MEASURED} for row in rows}
    return result("growth", setup, rounds, parts, exponents=exponents)


def _communication(made: Order, sent: float) -> dict[str, Any]:
    """Least is what must move if samples and layers are dealt evenly and nobody computes for two: of W ranks each owns
    the layers of 1/W of all factors, and has captured 1/W of these itself, so that (W - 1)/W of all factors change
    hands once. A sample whose gradient is smaller than its factors counts as the gradient.
    """
    least = (made.ranks - 1) / made.ranks * read_facts(Path(made.folder)).factor_bytes
    return {"ranks": made.ranks, "sent, MB": sent / 1e6, "least, MB": least / 1e6, "sent / least": sent / least}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def _entries(setup: Setup, sizes: dict[str, tuple[int, ...]], base: dict[str, int]) -> Iterator[Entry]:
    for axis, values in sizes.items():
        for number in values:
            at = {**base, axis: number}
            folder = Path(setup.base.folder) / f"{axis}-{number}"
            changes: dict[str, Any] = {"samples": at["samples"], "tokens": at["tokens"], "ranks": at["ranks"]}
            model = f"llama-{at['layers']}"
            made = order(setup.base, "product", folder=str(folder), model=model, threads=1, **changes)
            yield Entry(f"{axis} {number}", "", made)


def _write(setup: Setup, wanted: Order) -> None:
    Path(wanted.folder).mkdir()
    report = setup.perform(order(wanted, "material", ranks=1))
    if report.error:
        raise RuntimeError(f"material: {report.error}")


def _row(rounds: Sequence[Round], axis: str, sizes: Sequence[int]) -> dict[str, Any]:
    points = [_measured(rounds, f"{axis} {size}") for size in sizes]
    found = {name: exponent(sizes, [point[name] for point in points]) for name in MEASURED}
    return {"exponent in": axis, "sizes": ", ".join(map(str, sizes)), **found}


def _measured(rounds: Sequence[Round], key: str) -> dict[str, float]:
    """Seconds by phase, and MiB."""
    cpu = {name: median(rounds, f"{key}:{found}") for name, found in MEASURED.items() if found.endswith("(cpu)")}
    both = cpu["capture"] + cpu["scoring"]
    memory = sorted(one[key].growth for one in rounds)[len(rounds) // 2]
    return {**cpu, "capture and scoring": both, "memory": memory}
