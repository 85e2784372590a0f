"""What a run found itself to hold, send and compute, and the plan's figures beside it.

A run fills one :class:`Measured` on each rank: sizes are the most that was held at a time, counts and seconds add up.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from qkov_dist.capture.store import FactorStore
from qkov_dist.distributed.sharding import local_bytes
from qkov_dist.scoring.engine import BlockScores

from .remedies import HOST_OVERHEAD
from .run_plan import RunPlan
from .table import BYTES, FLOPS, flops_in_words, gib, seconds_in_words
from .time_model import Phase


@dataclass
class Measured:
    """One rank; None where nothing was measured. What the numbers are is said in ``planning.cost.Cost``.

    Attributes:
        seconds: By phase, time on the clock.
        peak_gpu: Most bytes of the GPU's memory that torch held at a time.
        peak_host: Most bytes of the process in the host's memory, Python and libraries included.
    """

    weights: int | None = None
    factors_gpu: int | None = None
    factors_memory: int | None = None
    factors_disk: int | None = None
    scores: int | None = None
    sent_factors: int | None = None
    written: int | None = None
    flops_kept: int | None = None
    flops_scoring: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gpu: int | None = None
    peak_host: int | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time to a phase, one of ``time_model.PHASES``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def see_model(self, model: nn.Module) -> None:
        """The model as it is held."""
        self.weights = sum(map(local_bytes, (*model.parameters(), *model.buffers())))

    def see_factors(self, store: FactorStore) -> None:
        """A store after all samples were run."""
        self.factors_gpu = max(self.factors_gpu or 0, store.bytes_on_gpu)
        self.factors_memory = max(self.factors_memory or 0, store.bytes_in_memory)
        self.factors_disk = max(self.factors_disk or 0, store.bytes_on_disk)
        self.flops_kept = (self.flops_kept or 0) + store.flops

    def see_scores(self, blocks: Mapping[str, BlockScores]) -> None:
        """One layer's scores."""
        self.scores = max(self.scores or 0, sum(block.scores.nbytes for block in blocks.values()))
        self.flops_scoring = (self.flops_scoring or 0) + sum(block.flops for block in blocks.values())

    def see_sent(self, factors: int) -> None:
        """Bytes of factors that went to other ranks."""
        self.sent_factors = (self.sent_factors or 0) + factors

    def see_files(self, paths: Iterable[Path]) -> None:
        """Files as they were written."""
        self.written = (self.written or 0) + sum(path.stat().st_size for path in paths)

    def see_peaks(self) -> None:
        """The most memory so far."""
        self.peak_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        if torch.cuda.is_available():
            self.peak_gpu = torch.cuda.max_memory_reserved()


def comparison_lines(plan: RunPlan, phases: Sequence[Phase], measured: Sequence[Measured]) -> list[str]:
    """The plan's figures beside those measured, of the rank with the largest of each; what nobody measured is left out.

    Args:
        plan: The plan.
        phases: The time expected of each phase; none where the hardware is not known.
        measured: Of every rank.
    """
    words: dict[str, tuple[str, Callable[[float], str]]] = {name: (label, gib) for name, label in BYTES.items()}
    words |= {name: (label, flops_in_words) for name, label in FLOPS.items()}
    rows = []
    for name in (entry.name for entry in fields(Measured) if entry.name in words):
        label, in_words = words[name]
        planned, found = max(getattr(cost, name) for cost in plan.costs), _most(measured, name)
        if found is not None and (planned or found):
            rows.append([label, in_words(planned), in_words(found), _deviation(planned, found)])
    gpu, host = plan.peak()
    for label, name, planned in (
        ("peak on a GPU", "peak_gpu", gpu),
        ("peak in the host's memory", "peak_host", host + HOST_OVERHEAD),
    ):
        if (found := _most(measured, name)) is not None:
            rows.append([label, gib(planned), gib(found), _deviation(planned, found)])
    for phase in phases:
        if times := [one.seconds[phase.name] for one in measured if phase.name in one.seconds]:
            rows.append([f"time: {phase.name}", seconds_in_words(phase.seconds), seconds_in_words(max(times)), ""])
    headers = ["largest rank" if plan.num_ranks > 1 else "", "planned", "measured", "off by"]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
    return table.splitlines()


def measured_scalars(measured: Sequence[Measured]) -> dict[str, float]:
    """Name -> number of the rank with the largest: seconds by phase, GiB of what is held; only what was measured."""
    phases = dict.fromkeys(phase for one in measured for phase in one.seconds)
    seconds = {f"seconds/{phase}": max(one.seconds.get(phase, 0.0) for one in measured) for phase in phases}
    names = [entry.name for entry in fields(Measured) if entry.name in (*BYTES, "peak_gpu", "peak_host")]
    sizes = {name: _most(measured, name) for name in names}
    return seconds | {f"gib/{name}": found / 2**30 for name, found in sizes.items() if found is not None}


def _most(measured: Sequence[Measured], name: str) -> int | None:
    return max((found for one in measured if (found := getattr(one, name)) is not None), default=None)


def _deviation(planned: int, found: int) -> str:
    """How far a plan was off, as a share of what was measured."""
    if planned == found:
        return "0%"
    return f"{planned / found - 1:+.1%}" if found else ""
