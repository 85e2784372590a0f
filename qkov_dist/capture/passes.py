"""Who runs which samples of a task, in which batches: worked out here, for a run as for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

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
class Pass:
    """One pass of a rank.

    Attributes:
        batch: What is run; of a context-parallel group each rank runs its part of the tokens.
        counts: Whether it is of use to some rank, and not only made because others wait.
        owner: The place in its context-parallel group of the rank whose samples they are.
    """

    batch: Batch
    counts: bool = True
    owner: int = 0


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
        context: Neighbouring ranks that share the tokens of each other's samples.
    """

    dealt: DealtTask
    batch_tokens: int
    gathers_weights: bool
    names: Sequence[str]
    first: int = 0
    alone: bool = False
    context: int = 1

    def on(self, rank: int) -> list[Pass]:
        """A rank's passes; then, where passes need all ranks, idle ones up to the longest list.

        The ranks of a context-parallel group make the passes of all of its members, step by step: each member's first
        batch, then each one's second.
        """
        mine = self._of_groups[rank // self.context] if self.gathers_weights else self._of_group(rank // self.context)
        if not self.gathers_weights:
            return mine
        (idle, *_) = [a_pass.batch for a_pass in mine] or self._first
        return mine + [Pass(idle, counts=False)] * (self._most - len(mine))

    def _of_group(self, group: int) -> list[Pass]:
        """The passes of the ranks that share tokens; of a rank alone its own batches."""
        members = self.dealt.numbers[group * self.context : (group + 1) * self.context]
        steps = zip_longest(*([Pass(batch, owner=n) for batch in self._batches(m)] for n, m in enumerate(members)))
        return [a_pass for step in steps for a_pass in step if a_pass is not None]

    @cached_property
    def _of_groups(self) -> list[list[Pass]]:
        """Every group's passes: how many the others have decides how often this one passes."""
        return [self._of_group(group) for group in range(len(self.dealt.numbers) // self.context)]

    @cached_property
    def _most(self) -> int:
        """Passes of the group that has most."""
        return max(map(len, self._of_groups))

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
