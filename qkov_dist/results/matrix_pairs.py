"""What is read off every pair of many tasks: which heads show what, what attention adds up to, how sure that is.

    codes       1 where a head is in conflict, -1 in synergy, 0 otherwise, by the change of ``adam`` and of ``sgd``; by
                ``scores`` 1 above, -1 below its null (contested and apart, where overlap decides)
    direction   of a pair: what its own 95% interval of the total says
    verdict     the same, where it also holds over all pairs: q of the totals by Benjamini-Hochberg

A head's q is that of its pair (within a block); ``chance`` says what to expect of it over all pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effects import Total
from .heatmap import Heatmap
from .influences import TASKS
from .verdict_facts import BY, Direction, direction_of

Codes = npt.NDArray[np.int8]
SCORES = "scores"
KINDS = (*OPTIMIZERS, SCORES)


@dataclass(frozen=True)
class PairTotal:
    """What all of attention adds up to in one pair, for one optimizer.

    Attributes:
        total: First-order change of either task's loss for a unit step on the other, with its interval.
        steps: The practical steps: on the first task, on the second; NaN where there is none.
        losses: Mean losses of both tasks; NaN where not known.
        q_value: Of the total, over all pairs.
    """

    total: Total
    steps: tuple[float, float]
    losses: tuple[float, float]
    q_value: float = math.nan

    def relative(self, harmed: int) -> tuple[float, float, float]:
        """What the practical step on the other task does to a task's loss (0: the first's), and its interval's ends.

        All are parts of that loss; NaN where there is no such step.
        """
        factor = self.steps[1 - harmed] / self.losses[harmed]
        low, high = self.total.interval
        return factor * self.total.change, factor * low, factor * high


@dataclass(frozen=True)
class PairRecord:
    """One pair of tasks.

    Attributes:
        tasks: Their names, in the order of the configuration.
        num_samples: Of either, those that effects are of.
        level: At or below which q a head is significant.
        totals: Optimizer -> what attention adds up to; empty where effects are not known.
        codes: Kind of ``KINDS`` (those known) -> block -> int8 [layer, native head].
        statistic: By which scores were tested; "" where they were not.
        families: Kind -> over what its q-values are: a block of a ``pair``, or of ``all`` pairs.
        said: Kind (warning, note, statistics) and text of all that the pair warns of and notes.
    """

    tasks: tuple[str, str]
    num_samples: tuple[int, int]
    level: float
    totals: Mapping[str, PairTotal]
    codes: Mapping[str, Mapping[str, Codes]]
    statistic: str = ""
    families: Mapping[str, str] = field(default_factory=dict)
    said: tuple[tuple[str, str], ...] = ()

    def count(self, kind: str, sign: int, block: str | None = None) -> int:
        """How many heads, of all blocks or of one, have a sign: 1 conflict, -1 synergy."""
        arrays = self.codes.get(kind, {})
        blocks = arrays if block is None else (block,)
        return sum(int((arrays[name] == sign).sum()) for name in blocks if name in arrays)

    def direction(self, optimizer: str = BY) -> Direction:
        """By the pair's own interval."""
        return direction_of(self.totals[optimizer].total) if optimizer in self.totals else "unknown"

    def verdict(self, optimizer: str = BY) -> Direction:
        """The same where it holds over all pairs."""
        is_held = optimizer in self.totals and self.totals[optimizer].q_value <= self.level
        return self.direction(optimizer) if is_held else "unknown"


def records_of(heatmaps: Iterable[Heatmap]) -> tuple[PairRecord, ...]:
    """The record of every pair; each heatmap is looked at once, and let go."""
    records = [_record(heatmap) for heatmap in heatmaps]
    for optimizer in OPTIMIZERS:
        records = _with_q_values(records, optimizer)
    return tuple(records)


def _record(heatmap: Heatmap) -> PairRecord:
    codes: dict[str, dict[str, Codes]] = {}
    totals: dict[str, PairTotal] = {}
    if heatmap.has_tested_effects:
        facts = heatmap.facts
        for optimizer in OPTIMIZERS:
            arrays = {block: of_block[optimizer] for block, of_block in (heatmap.effects or {}).items()}
            codes[optimizer] = {
                block: _codes(of["change"], of["q_value"], heatmap.fdr_alpha) for block, of in arrays.items()
            }
            first, second = (facts.practical_step(task, optimizer) for task in TASKS)
            losses = math.nan if facts.are_scaled else facts.losses["a"], facts.losses["b"]
            totals[optimizer] = PairTotal(facts.totals[optimizer], (first, second), losses)
    if heatmap.tests:
        codes[SCORES] = {
            block: _codes(of.get("effect_size", np.zeros(of["q_value"].shape)), of["q_value"], heatmap.fdr_alpha)
            for block, of in heatmap.tests.items()
        }
    tasks, statistic = (heatmap.task_a, heatmap.task_b), heatmap.deciding if heatmap.tests else ""
    texts = {
        "warning": heatmap.attributes.get("warnings", ()),
        "note": heatmap.attributes.get("notes", ()),
        "statistics": (heatmap.statistics or {}).get("notes", ()),
    }
    said = tuple((kind, str(text)) for kind, of_kind in texts.items() for text in of_kind)
    families = _families(heatmap)
    return PairRecord(tasks, heatmap.counted.sizes, heatmap.fdr_alpha, totals, codes, statistic, families, said)


def _families(heatmap: Heatmap) -> dict[str, str]:
    """Of scores as they were tested last; of effects as the run says, which later tests of scores leave alone."""
    of_scores = str((heatmap.statistics or {}).get("settings", {}).get("family", "pair"))
    config = heatmap.attributes.get("config")
    of_run = config.get("statistics", {}).get("family") if isinstance(config, Mapping) else None
    return {**dict.fromkeys(OPTIMIZERS, str(of_run or of_scores)), SCORES: of_scores}


def _codes(values: npt.NDArray[Any], q_values: npt.NDArray[Any], level: float) -> Codes:
    return np.where(q_values <= level, np.sign(np.nan_to_num(values)), 0).astype(np.int8)


def _with_q_values(records: Sequence[PairRecord], optimizer: str) -> list[PairRecord]:
    """Totals with their q over all pairs; a total without an error has none, and is no member of the family."""
    p_values = np.array([_p_value(record, optimizer) for record in records])
    tested = np.isfinite(p_values)
    if not tested.any():
        return list(records)
    from scipy.stats import false_discovery_control  # reading a file does without it

    q_values = np.full(len(records), np.nan)
    q_values[tested] = false_discovery_control(p_values[tested], method="bh")
    return [
        dataclasses.replace(record, totals=dict(_held(record.totals, optimizer, float(q))))
        for record, q in zip(records, q_values, strict=True)
    ]


def _p_value(record: PairRecord, optimizer: str) -> float:
    return record.totals[optimizer].total.p_value if optimizer in record.totals else math.nan


def _held(totals: Mapping[str, PairTotal], optimizer: str, q_value: float) -> Iterator[tuple[str, PairTotal]]:
    for name, total in totals.items():
        yield name, dataclasses.replace(total, q_value=q_value) if name == optimizer else total


def heads_in(records: Sequence[PairRecord], kind: str, sign: int, block: str) -> npt.NDArray[np.int64]:
    """In how many pairs each head of a block has a sign, [layer, native head]."""
    counts: npt.NDArray[np.int64] = np.sum([record.codes[kind][block] == sign for record in records], axis=0)
    return counts


def of_task(records: Sequence[PairRecord], task: str) -> tuple[PairRecord, ...]:
    """The pairs that a task is in."""
    return tuple(record for record in records if task in record.tasks)


@dataclass(frozen=True)
class Chance:
    """What to expect of significant heads over all pairs; a family is one block of one pair, or of all.

    Attributes:
        pairs: Looked at.
        families: Of tests that are corrected together.
        scope: What a family is, in words.
        found: Heads in conflict or in synergy over all pairs.
        false_finds: Of these at most so many are expected to be none.
        false_families: In so many families at most would anything be found, were there no effect at all.
        false_intervals: Of so many pairs' intervals one expects that they leave out 0 though it is the truth.
    """

    pairs: int
    families: int
    scope: str
    found: int
    false_finds: float
    false_families: float
    false_intervals: float


def scope_of(records: Sequence[PairRecord], kind: str = BY) -> str:
    """Over what q-values of a kind are, in words."""
    is_of_pair = any(record.families.get(kind, "pair") == "pair" for record in records)
    return "within a block of a pair" if is_of_pair else "within a block over all pairs"


def chance(records: Sequence[PairRecord], kind: str = BY) -> Chance:
    """Of one kind of findings."""
    level, scope = records[0].level, scope_of(records, kind)
    numbers = [len(record.codes.get(kind, {})) for record in records]
    families = sum(numbers) if scope.endswith("of a pair") else max(numbers)
    found = sum(record.count(kind, sign) for record in records for sign in (1, -1))
    return Chance(len(records), families, scope, found, level * found, level * families, 0.05 * len(records))
