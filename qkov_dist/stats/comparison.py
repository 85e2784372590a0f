"""Runs of one layout compared: read one after the other, so that only one is in memory with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from qkov_dist.errors import QkovError, wrong_argument
from qkov_dist.results.compared_runs import Differences, RunHeader, differences, header_of, refuse_unlike, same_order
from qkov_dist.results.comparison import WITHOUT_RANKS, Comparison, in_order
from qkov_dist.results.comparison_data import Quantity
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE, heatmap_path, load_heatmap
from qkov_dist.results.matrix_data import checked_pair

from .head_moves import moves
from .rank_correlation import rank_correlation
from .sample_values import SampleValues, quantities_of

TESTED = ("change_adam", "change_sgd", "relative_adam", "relative_sgd", "overlap")
NUM_DRAWS = 1000
UNEQUAL = 0.1  # numbers of samples that differ by more bias what is not linear in means
R_GIVEN = "R, the regularised Fisher, is taken as given in each run: that other samples make another R is in no error."
NOISE = "Noise of the samples lowers rank correlations: other samples of one and the same model also stay below 1."


@dataclass(frozen=True)
class Settings:
    """How runs are compared.

    Args:
        alpha: A head moved where its q is at most this; by default that of the first run's tests.
        confidence: Of intervals.
        num_draws: Draws of signs for the family-wise p-value of paired tests.
        seed: Of the draws.
    """

    alpha: float | None = None
    confidence: float = 0.95
    num_draws: int = NUM_DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise wrong_argument(name, "a number between 0 and 1", value)
        for name, least in (("num_draws", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise wrong_argument(name, f"at least {least}", getattr(self, name))


@dataclass(frozen=True)
class _Run:
    header: RunHeader
    quantities: dict[str, SampleValues]


def compare_runs(
    runs: Sequence[Heatmap | str | Path],
    *,
    names: Sequence[str] | None = None,
    alpha: float | None = None,
    confidence: float = 0.95,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    pair: tuple[str, str] | None = None,
) -> Comparison:
    """Compare two or more runs of one layout, head by head.

    Heads that moved are found between the first run and the last. Ranks are compared of every two runs.

    Args:
        runs: Heatmaps, their files, or folders of runs, in the order of a trajectory.
        names: What they are called; by default as their folders are.
        alpha: A head moved where its q is at most this; by default the level of the first run's tests.
        confidence: Of intervals.
        num_draws: Draws of signs for the family-wise p-value of paired tests.
        seed: Of the draws.
        pair: Names of A and of B: the pair of tasks that is compared; of files of two tasks it may be left out.

    Raises:
        QkovError: for fewer than two runs, files that cannot be read, arguments out of range, and runs whose heads or
            tasks are not the same.
    """
    settings = Settings(alpha, confidence, num_draws, seed)
    if isinstance(runs, str | Path | Heatmap) or len(runs) < 2:
        raise QkovError("compare", expected="two runs or more", got="one", remedy="Name another run of the same heads.")
    called = _names(runs) if names is None else list(names)
    if len(called) != len(runs):
        raise wrong_argument("names", f"{len(runs)}, one a run", len(called))
    read: list[_Run] = []
    for place, name in zip(runs, called, strict=True):
        heatmap = _read(place, pair)
        header = header_of(heatmap, name)
        if read:
            refuse_unlike(read[0].header, header)
        read.append(_Run(header, quantities_of(heatmap)))
        del heatmap
    return _compared(read, settings)


def _read(run: Heatmap | str | Path, pair: tuple[str, str] | None) -> Heatmap:
    """The heatmap of a run, of the pair that is asked for."""
    if not isinstance(run, Heatmap):
        return load_heatmap(run, pair)
    if pair is not None:
        checked_pair((run.task_a, run.task_b), pair)
    return run


def _names(runs: Sequence[Heatmap | str | Path]) -> list[str]:
    """As much of the end of each run's path as tells it from the others; heatmaps are called by their places."""
    ends = [() if isinstance(run, Heatmap) else _folder(run).parts[1:] for run in runs]
    for depth in range(1, max(map(len, ends)) + 1):
        found = ["/".join(end[-depth:]) for end in ends if end]
        if len(set(found)) == len(found):
            break
    return ["/".join(end[-depth:]) if end else f"run {place}" for place, end in enumerate(ends, 1)]


def _folder(run: str | Path) -> Path:
    """A run's folder, or its file where that is called otherwise."""
    path = heatmap_path(run).absolute()
    return path.parent if path.name == HEATMAP_FILE else path.with_suffix("")


def _compared(runs: list[_Run], settings: Settings) -> Comparison:
    headers = tuple(run.header for run in runs)
    apart = differences(headers)
    lined_up = _lined_up(runs) if apart.paired else runs
    known = in_order({name: None for name in runs[0].quantities if all(name in run.quantities for run in runs)})
    notes = [*apart.notes, R_GIVEN, NOISE]
    bias = _unequal(headers)
    quantities = {}
    for name in known:
        of_runs = [run.quantities[name] for run in lined_up]
        kept = name in TESTED and name not in apart.of_another_kind and (_is_linear(name) or not bias)
        quantities[name] = _quantity(name, of_runs, apart, settings, is_tested=kept)
    if bias:
        notes.insert(0, bias)
    if missing := _untested(quantities, apart):
        notes.append(missing)
    alpha = headers[0].alpha if settings.alpha is None else settings.alpha
    return Comparison(headers, quantities, apart.found, tuple(notes), apart.paired, alpha, settings.confidence)


def _lined_up(runs: list[_Run]) -> list[_Run]:
    """All runs with their samples in the order of the first."""
    found = [runs[0]]
    for run in runs[1:]:
        orders = [same_order(*tables) for tables in zip(runs[0].header.samples, run.header.samples, strict=True)]
        assert orders[0] is not None
        assert orders[1] is not None
        order = np.concatenate([orders[0], orders[1] + len(orders[0])])
        found.append(_Run(run.header, {name: of.in_order(order) for name, of in run.quantities.items()}))
    return found


def _is_linear(name: str) -> bool:
    return name.startswith("change_")


def _unequal(headers: Sequence[RunHeader]) -> str:
    """A note where runs have so different numbers of samples that logarithms and ratios are not comparable; else ""."""
    sizes = [[len(header.samples[place]) for header in headers] for place in (0, 1)]
    if all(max(of_task) <= (1 + UNEQUAL) * min(of_task) + 1 for of_task in sizes):
        return ""
    return (
        "Runs have different numbers of samples, which moves what is not linear in means: only ranks are compared of "
        "overlap and of what is free of scale."
    )


def _untested(quantities: dict[str, Quantity], apart: Differences) -> str:
    overlap = quantities.get("overlap")
    if overlap is None or not apart.paired or overlap.paired or overlap.moves is None:
        return ""
    return (
        "Files keep no scores among all pooled samples: moves of overlap are tested unpaired, by their intervals. Runs "
        "with output.pairs: all pair them."
    )


def _quantity(
    name: str, runs: list[SampleValues], apart: Differences, settings: Settings, *, is_tested: bool
) -> Quantity:
    has_samples = all(run.of_samples is not None for run in runs)
    paired = apart.paired and has_samples and all(_count_alike(runs[0], run) for run in runs[1:])
    found = None
    if is_tested:
        found = moves(
            runs[0],
            runs[-1],
            paired=paired,
            num_draws=settings.num_draws,
            seed=settings.seed,
            confidence=settings.confidence,
        )
    values = {block: np.stack([run.values[block] for run in runs]) for block in runs[0].values}
    ranks = {block: _ranks(name, runs, block, settings, paired=paired) for block in values}
    arrays = {key: {block: of[key] for block, of in ranks.items()} for key in ("value", "low", "high")}
    return Quantity(
        values,
        arrays["value"],
        arrays["low"],
        arrays["high"],
        "samples" if has_samples else "heads",
        found,
        paired and found is not None,
    )


def _count_alike(first: SampleValues, other: SampleValues) -> bool:
    """Whether the same samples count: those that a third task of one run has too do not."""
    one, another = first.samples, other.samples
    return bool(np.array_equal(one.a, another.a) and np.array_equal(one.b, another.b))


def _ranks(
    name: str, runs: list[SampleValues], block: str, settings: Settings, *, paired: bool
) -> dict[str, np.ndarray]:
    """Value and ends of every two runs, each [run, run]."""
    num = len(runs)
    found = {key: np.full((num, num), np.nan) for key in ("value", "low", "high")}
    if name in WITHOUT_RANKS:
        return found
    for array in found.values():
        np.fill_diagonal(array, 1.0)
    for one, other in combinations(range(num), 2):
        of_pair = rank_correlation(
            runs[one], runs[other], block, paired=paired, confidence=settings.confidence, seed=settings.seed
        )
        for key, of_runs in found.items():
            of_runs[one, other] = of_runs[other, one] = getattr(of_pair, key)
    return found
