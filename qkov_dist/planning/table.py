"""A plan as text: one table of bytes and operations, the expected time of each phase, and what all that rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from .cost import Cost, largest, total
from .run_plan import RunPlan
from .time_model import Phase

BYTES = {
    "weights": "weights",
    "gathered": "weights gathered for a pass",
    "activations": "activations of the batches in work",
    "factors_gpu": "factors on the GPU",
    "factors_memory": "factors in memory",
    "factors_disk": "factors on disk",
    "exchange": "factors of one layer, exchanged",
    "buffers": "Fisher and gradients: tiles, padded or packed factors",
    "scores": "scores of one layer",
    "statistics": "statistics",
    "sent_factors": "network: factors",
    "least_factors": "network: factors, at least",
    "sent_scores": "network: scores",
    "moved_weights": "network: weights gathered",
    "moved_sums": "network: tensor-parallel sums",
    "moved_tokens": "network: keys, values, factors of shared samples",
    "written": "files written",
}
FLOPS = {
    "flops_forward": "operations: forward",
    "flops_backward": "operations: backward",
    "flops_kept": "operations: gradients kept at capture",
    "flops_scoring": "operations: scoring",
    "flops_norms": "operations: norms of gradients",
    "flops_statistics": "operations: statistics",
}
FEW_TASKS = 4  # whose samples are listed one by one
ALWAYS = ("weights", "factors_memory", "factors_disk", "buffers", "scores", "flops_forward", "flops_scoring")


def plan_lines(plan: RunPlan, phases: Sequence[Phase], hardware: str, notes: Sequence[str]) -> list[str]:
    """All of it, line by line.

    Args:
        plan: The plan.
        phases: The expected time of each phase; none where the hardware is not known.
        hardware: What the times are for.
        notes: What they, and the sizes, rest on.
    """
    lines = [_heading(plan), "", *_table(plan).splitlines(), ""]
    if phases:
        lines += [*_times(phases, hardware).splitlines(), ""]
    return lines + [f"- {note}" for note in notes]


def as_json(plan: RunPlan, phases: Sequence[Phase]) -> dict[str, Any]:
    """The numbers."""
    gpu, host = plan.peak()
    return {
        "ranks": [asdict(cost) for cost in plan.costs],
        "largest": asdict(largest(plan.costs)),
        "sum": asdict(total(plan.costs)),
        "peak": {"gpu": gpu, "host": host},
        "parallelism": asdict(plan.parallelism),
        "parameters": plan.work.model_sizes.num_parameters,
        "sweeps": [list(sweep) for sweep in plan.sweeps],
        "captures": plan.captures,
        "seconds": {phase.name: phase.seconds for phase in phases},
    }


def flops_in_words(flops: float) -> str:
    """Operations in the unit that suits them."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:.2f} {name}"
    return f"{flops / 1e6:.2f} MFLOP"


def seconds_in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def size_notes(plan: RunPlan) -> list[str]:
    """What the sizes rest on."""
    model_sizes = plan.work.model_sizes
    notes = ["activations are an estimate, within about a third; everything else is counted as the run counts it"]
    if model_sizes.quantized:
        dtype = plan.work.config.model.dtype
        notes.append(
            f"the model is quantized ({model_sizes.quantized}): its bytes are those of dtype {dtype}, not packed"
        )
    every = total(plan.costs)
    if every.least_factors:
        notes.append(
            f"network: owners are sent {every.sent_factors / every.least_factors:.2f} times the factors that they "
            "cannot do without; a head's partial scores go once, to the rank that adds them up"
        )
    if plan.parallelism.data == "device_map":
        notes.append("device_map: all layers are counted on one device; they are spread over those that there are")
    return notes


def _samples(sizes: Sequence[int]) -> str:
    """Of each task, or how many of how many tasks."""
    return " + ".join(map(str, sizes)) if len(sizes) <= FEW_TASKS else f"{sum(sizes)} (of {len(sizes)} tasks)"


def _heading(plan: RunPlan) -> str:
    work, parallelism = plan.work, plan.parallelism
    samples = _samples(work.num_samples)
    cut = f" ({parallelism.words})" if plan.num_ranks > 1 else ""
    passes = "once" if len(plan.sweeps) == 1 else f"{len(plan.sweeps)} times, for a part of the layers each"
    passes += ", each of these once before, for the norms of samples" if plan.captures > 1 else ""
    return (
        f"plan: {work.model_sizes.name} with {work.model_sizes.num_parameters / 1e9:.3g} billion parameters on "
        f"{plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}{cut}; {len(work.layers)} of "
        f"{work.layout.num_layers} layers scored; {samples} samples, {sum(work.lengths_pooled):,} tokens, "
        f"run {passes}"
    )


def _table(plan: RunPlan) -> str:
    most, every = largest(plan.costs), total(plan.costs)
    gpu, host = plan.peak()
    peaks = [("peak on a GPU", gpu)] if plan.work.on_gpu else []
    peaks.append(("peak in the host's memory", host))
    rows = [*_rows(BYTES, most, every, gib), *([name, gib(size), ""] for name, size in peaks)]
    rows += _rows(FLOPS, most, every, flops_in_words)
    headers = ["", "largest rank", "all ranks"]
    if plan.num_ranks == 1:
        rows, headers = [row[:2] for row in rows], ["", "this process"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def _rows(names: dict[str, str], most: Cost, every: Cost, words: Any) -> list[list[str]]:
    """A row for each number that is not zero everywhere."""
    return [
        [label, words(getattr(most, name)), words(getattr(every, name))]
        for name, label in names.items()
        if getattr(every, name) or name in ALWAYS
    ]


def _times(phases: Sequence[Phase], hardware: str) -> str:
    rows = [[phase.name, seconds_in_words(phase.seconds), phase.bound_by] for phase in phases]
    rows.append(["all", seconds_in_words(sum(phase.seconds for phase in phases)), ""])
    return tabulate(rows, headers=["phase", f"expected on {hardware}", "mostly"], disable_numparse=True)


def gib(size: float) -> str:
    """Bytes in words, in the unit that suits them."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"
