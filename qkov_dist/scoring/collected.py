"""Samples that were collected step by step: those of some tasks that are scored, and what their Fisher is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qkov_dist.capture.collect import SampleRecord
from qkov_dist.data.copies import in_one_task, look_for_copies
from qkov_dist.errors import wrong_argument

from .extent import sides
from .fisher import SCOPES, Estimator, Scope, by_task, fisher_weights
from .influence_records import mean_weights
from .settings import Roles


@dataclass(frozen=True)
class Step:
    """One call of ``collect_fisher``: one step of the Fisher average."""

    task: str
    mode: Estimator
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class CollectedTasks:
    """Some tasks, and which of their samples are scored.

    Attributes:
        names: The tasks; of two the first is A.
        numbers: Of each, the scored samples by pooled number.
        steps: All that was collected, these tasks and others.
        records: Every sample, by its pooled number.
        decay: beta of the moving average.
    """

    names: tuple[str, ...]
    numbers: tuple[Sequence[int], ...]
    steps: Sequence[Step]
    records: Sequence[SampleRecord]
    decay: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scored samples of each task."""
        return tuple(map(len, self.numbers))

    @property
    def by_task(self) -> list[list[SampleRecord]]:
        """The records of each task's scored samples."""
        return [[self.records[n] for n in of_task] for of_task in self.numbers]

    @property
    def estimator(self) -> Estimator:
        """The one estimator of all steps of these tasks.

        Raises:
            QkovError: where they have several.
        """
        modes = {step.mode for step in self._steps(self.names)}
        if len(modes) != 1:
            raise wrong_argument("mode", "one mode for all calls of collect_fisher of these tasks", sorted(modes))
        return modes.pop()

    def roles(self, scope: Scope, *, pooled: bool) -> Roles:
        """Scored samples first, task after task; then those that only the Fisher needs.

        Raises:
            QkovError: for the scope of one task, where there are more than two.
        """
        if scope != "pooled" and len(self.names) > len(SCOPES):
            raise wrong_argument("scope", "pooled, as there are more than two tasks", repr(scope))
        in_scope = self.names if scope == "pooled" else (self.names[SCOPES.index(scope)],)
        steps = [step.numbers for step in self._steps(in_scope)]
        weights = fisher_weights(steps, len(self.records), estimator=self.estimator, decay=self.decay)
        scored = [n for of_task in self.numbers for n in of_task]
        members = (*scored, *(n for n in np.flatnonzero(weights).tolist() if n not in {*scored}))
        left, right = sides(self.sizes, pooled=pooled)
        task_of = [self.names.index(self.records[n].task) for n in members]
        contents = [[record.content for record in of_task] for of_task in self.by_task]
        means = mean_weights(in_one_task(contents), self.sizes)
        of_tasks = by_task(weights[list(members)], task_of, len(self.names))
        return Roles(members, of_tasks, left, right, means, self.sizes)

    def copies(self, *, allowed: bool) -> list[str]:
        """Warnings of samples that several of the tasks have.

        Raises:
            QkovError: where these are more than a tenth of a task, and it is not allowed.
        """
        return look_for_copies(
            self.names,
            [[record.content for record in of_task] for of_task in self.by_task],
            [[record.id for record in of_task] for of_task in self.by_task],
            allowed=allowed,
            name="allow_shared_samples",
        )

    def warnings(self) -> list[str]:
        """What is known of the steps: under a moving average, samples of a small step outweigh the others."""
        sizes = [len(step.numbers) for step in self._steps(self.names)]
        if self.estimator == "mean" or max(sizes) < 2 * min(sizes):
            return []
        return [
            f"under mode='ema' each call of collect_fisher is one step: a sample of the smallest ({min(sizes)} "
            f"samples) has about {max(sizes) / min(sizes):.0f} times the weight of one of the largest ({max(sizes)}). "
            "Collect in batches of nearly equal size, or with mode='mean'."
        ]

    def _steps(self, names: Sequence[str]) -> list[Step]:
        return [step for step in self.steps if step.task in names]
