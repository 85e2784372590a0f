"""What a process of the benchmark is told, and what it reports; both travel as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from material import Subject

Found = Mapping[str, float]
Work = Callable[[], Found]


@dataclass(frozen=True)
class Order:
    """What a process is to do.

    Attributes:
        contestant: Its name in ``CONTESTANTS``.
        folder: Where the material is.
        output: What the run's own folders in there are called.
        model: What to write there, for ``material``.
        samples: Samples of each task.
        tokens: Tokens of each sample.
        masked: Whether prompts carry no loss.
        threads: Threads of a process.
        ranks: Processes.
        repeats: How often the work is done and timed.
        factor_share: Share of the factors that ``compute.factor_memory_mb`` holds.
        permutations: Relabellings, and resamplings, of the product's tests; 0 scores A x B alone and tests nothing.
        of: The contestant that ``agreement`` is asked about.
    """

    contestant: str
    folder: str
    output: str = "run"
    model: str = "smollm2"
    samples: int = 32
    tokens: int = 96
    masked: bool = False
    threads: int = 2
    ranks: int = 1
    repeats: int = 1
    factor_share: float = 1.0
    permutations: int = 1000
    of: str = ""

    def subject(self) -> Subject:
        return Subject(Path(self.folder), self.masked, self.samples, self.tokens)


@dataclass(frozen=True)
class Report:
    """What a process found: medians over its repeats.

    Attributes:
        seconds: Wall time of the whole job.
        cpu_seconds: Processor time of the whole job, on all threads.
        peak_rss: The most memory that the process ever had, in MiB.
        growth: The most memory during the work beyond what there was before it, in MiB.
        peak_gpu: The most GPU memory that the process reserved, in MiB.
        found: What the work returned.
        error: Why there is nothing of this, where there is not.
    """

    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    peak_rss: float = float("nan")
    growth: float = float("nan")
    peak_gpu: float = 0.0
    found: Found = field(default_factory=dict)
    error: str = ""
