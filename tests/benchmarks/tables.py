"""Rows and tables of what was found; medians over rounds, of ratios that are taken within a round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rounds import Entry, Round, error, median, peak, ratio
from stopwatch import PHASES, REST
from tabulate import tabulate

TIMED = [name for name in (*PHASES, REST) if name != "loading"]


def spread(found: tuple[float, float, float]) -> str:
    """A median with the least and the most."""
    middle, low, high = found
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def against_bare(rounds: Sequence[Round], key: str, title: str) -> dict[str, Any]:
    """A contestant's row; processor time tells more where others use the machine."""
    if reason := error(rounds, key):
        return {"contestant": title, "x bare passes": f"did not run: {reason}"}
    gpu = peak(rounds, key, gpu=True)
    return {
        "contestant": title,
        "x bare passes": spread(ratio(rounds, key, "bare")),
        "x their processor time": f"{ratio(rounds, f'{key}:(cpu)', 'bare:(cpu)')[0]:.3g}",
        "seconds": f"{median(rounds, key):.3g}",
        "peak RSS, MiB": f"{peak(rounds, key):.0f}",
        **({"peak GPU, MiB": f"{gpu:.0f}"} if gpu else {}),
    }


def loop_with_gradients(rounds: Sequence[Round]) -> dict[str, Any]:
    """What the per-pair loop takes together with the gradients that it needs."""
    title = "the loop with its gradients, a backward pass each"
    each = [(one["pair_loop"].seconds + one["autograd_loop"].seconds) / one["bare"].seconds for one in rounds]
    times = spread((statistics.median(each), min(each), max(each)))
    seconds = median(rounds, "pair_loop") + median(rounds, "autograd_loop")
    return {"contestant": title, "x bare passes": times, "seconds": f"{seconds:.3g}"}


def phase_table(rounds: Sequence[Round]) -> str:
    """The phases of the product's run."""
    sides = {**{name: f"product:{name}" for name in TIMED}, "whole run beyond loading": "product"}
    rows: list[dict[str, Any]] = [{"phase": name, "seconds": median(rounds, side)} for name, side in sides.items()]
    if "bare" in rounds[0]:
        for row, side in zip(rows, sides.values(), strict=True):
            row["x bare"] = ratio(rounds, side, "bare")[0]
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")


def machine_table(rounds: Sequence[Round], flops: int, moved: int = 0) -> str:
    """Rates of the machine, and the shares of them that scoring reaches.

    Args:
        rounds: What was found.
        flops: Operations of scoring.
        moved: Bytes that it moves; 0 where they stay in caches.
    """
    rates = list(rounds[0]["machine"].found)
    rows = [
        {
            "rate": name,
            "": median(rounds, f"machine:{name}"),
            "unit": "GB/s" if name.startswith(("copy", "triad")) else "GFLOP/s",
        }
        for name in rates
    ]
    squares = [name for name in rates if name.startswith("sgemm square")]
    reached = [flops * 1e-9 / one["product"].found["scoring"] for one in rounds]
    best = [max(one["machine"].found[name] for name in squares) for one in rounds]
    shares = [rate / peak_rate for rate, peak_rate in zip(reached, best, strict=True)]
    text = (
        f"Scoring is {flops * 1e-9:.4g} GFLOP (2 N^2 P + 2 T P in each layer) and reaches "
        f"{statistics.median(reached):.3g} GFLOP/s: {statistics.median(shares):.0%} ({min(shares):.0%}-"
        f"{max(shares):.0%}) of the square product's rate in the same round."
    )
    if moved:
        speeds = [moved * 1e-9 / one["product"].found["scoring"] for one in rounds]
        of_copy = [speed / one["machine"].found["copy"] for speed, one in zip(speeds, rounds, strict=True)]
        text += (
            f" It moves {moved * 1e-9:.4g} GB of gradients, at {statistics.median(speeds):.3g} GB/s: "
            f"{statistics.median(of_copy):.0%} of a copy's bandwidth."
        )
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g") + "\n\n" + text


def rank_phases(rounds: Sequence[Round], entry: Entry) -> dict[str, Any]:
    """The phases of one number of ranks."""
    phases = {name: median(rounds, f"{entry.key}:{name}") for name in TIMED}
    memory = {"peak RSS of a rank, MiB": f"{peak(rounds, entry.key):.0f}"}
    return {"ranks": entry.title, **phases, "whole, s": median(rounds, entry.key), **memory}
