"""Who runs which samples of a task, in which batches: worked out here, for a run as for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qkov_dist.data.batches import Batch, Objective, make_batches, sequence
from qkov_dist.data.samples import Sample
from qkov_dist.distributed.topology import deal_samples


@dataclass(frozen=True, eq=False)
class DealtTask:
    """A task's samples, dealt to data-parallel ranks.

    Attributes:
        samples: The samples, in file order.
        objective: How labels align with outputs.
        dp_size: How many ranks share them.
    """

    samples: Sequence[Sample]
    objective: Objective
    dp_size: int = 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, as the model sees them."""
        return tuple(len(sequence(sample, self.objective).input_ids) for sample in self.samples)

    @cached_property
    def numbers(self) -> list[list[int]]:
        """By rank, which samples it runs, in file order."""
        return deal_samples(self.lengths, self.dp_size)

    def lengths_on(self, rank: int) -> tuple[int, ...]:
        """Tokens of each sample that a rank runs."""
        return tuple(self.lengths[n] for n in self.numbers[rank])


@dataclass(frozen=True, eq=False)
class TaskPasses:
    """The batches in which ranks run a task's samples.

    Attributes:
        dealt: The samples, dealt to ranks.
        batch_tokens: Padded tokens in one batch.
        gathers_weights: Whether every pass of one rank needs one of all others.
        names: What messages call each of the samples.
        first: The pooled number of the first sample.
        alone: Whether samples run uncut, beside those of their own length only.
    """

    dealt: DealtTask
    batch_tokens: int
    gathers_weights: bool
    names: Sequence[str]
    first: int = 0
    alone: bool = False

    def on(self, rank: int) -> list[tuple[Batch, bool]]:
        """A rank's batches, each counted; then, where passes need all ranks, idle ones up to the longest list."""
        mine = self._of_all[rank] if self.gathers_weights else self._batches(self.dealt.numbers[rank])
        passes = [(batch, True) for batch in mine]
        if self.gathers_weights:
            (idle, *_) = mine or self._first
            passes += [(idle, False)] * (self._most - len(mine))
        return passes

    @cached_property
    def _of_all(self) -> list[list[Batch]]:
        """Every rank's batches: how many the others have decides how often this one passes."""
        return [self._batches(numbers) for numbers in self.dealt.numbers]

    @cached_property
    def _most(self) -> int:
        """Batches of the rank that has most."""
        return max(map(len, self._of_all))

    @cached_property
    def _first(self) -> list[Batch]:
        """The first sample alone: what a rank without samples runs."""
        return self._batches([0])

    def _batches(self, numbers: Sequence[int]) -> list[Batch]:
        made = make_batches(
            [self.dealt.samples[n] for n in numbers],
            names=[self.names[n] for n in numbers],
            numbers=[self.first + n for n in numbers],
            batch_tokens=self.batch_tokens,
            objective=self.dealt.objective,
            alone=self.alone,
        )
        return list(made)
