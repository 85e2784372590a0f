"""Samples that have been run: their numbers, tokens, losses, and the factors of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from .batches import Objective, make_batches
from .capture import Site, capture
from .factors import FactorStore
from .samples import Sample


@dataclass(frozen=True)
class SampleRecord:
    """One sample that has been run.

    Attributes:
        task: Name of its task.
        id: Its id within the task.
        text: Its text, for reports.
        num_tokens: Labelled tokens.
        loss: Its own loss, reduced as asked for.
    """

    task: str
    id: str
    text: str
    num_tokens: int
    loss: float


@dataclass
class Collection:
    """Runs samples once and keeps what scoring needs.

    Attributes:
        store: Where the factors are.
        sites: The projections captured.
        objective: How labels align with outputs.
        loss_reduction: ``mean`` or ``sum`` over a sample's labelled tokens.
        loss_factor: Multiplies every loss.
        batch_tokens: Padded tokens in one compute batch.
        records: Every sample by its pooled number.
    """

    store: FactorStore
    sites: tuple[Site, ...]
    objective: Objective = "causal"
    loss_reduction: str = "mean"
    loss_factor: float = 1.0
    batch_tokens: int = 2048
    records: list[SampleRecord] = field(default_factory=list)

    def run(
        self,
        model: nn.Module,
        task: str,
        samples: Sequence[Sample],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> list[int]:
        """Pass samples of a task through the model; nothing is kept of them if any of them fails.

        Args:
            model: The model; left as it is found.
            task: Name of the task.
            samples: Its samples, in file order.
            on_samples: Called with the number of samples after each batch.

        Returns:
            The samples' pooled numbers, in the order given.

        Raises:
            QkovError: for a loss or gradient that is not finite; names task, sample and layer.
        """
        first = len(self.records)
        names = [f"task {task!r}, sample {sample.id!r}" for sample in samples]
        batches = make_batches(
            samples, names=names, first_number=first, batch_tokens=self.batch_tokens, objective=self.objective
        )
        found: dict[int, tuple[int, float]] = {}
        with capture(model, self.sites, loss_reduction=self.loss_reduction, loss_factor=self.loss_factor) as session:
            for batch in batches:
                with self.store.batch(batch) as sink:
                    losses = session.run(batch, sink)
                for number, count, loss in zip(batch.samples, batch.num_targets.tolist(), losses.tolist(), strict=True):
                    found[number] = count, loss
                on_samples(len(batch.samples))
        self.records.extend(
            SampleRecord(task, sample.id, sample.text, *found[first + n]) for n, sample in enumerate(samples)
        )
        return list(range(first, first + len(samples)))
