"""Samples that have been run: their numbers, tokens, losses, and the factors of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .batches import Batch, Objective, make_batches, sequence
from .capture import Factors, Site, capture
from .errors import QkovError
from .factors import FactorStore
from .samples import Sample
from .team import Team


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
        team: Who runs which samples.
        records: Every sample by its pooled number.
    """

    store: FactorStore
    sites: tuple[Site, ...]
    objective: Objective = "causal"
    loss_reduction: str = "mean"
    loss_factor: float = 1.0
    batch_tokens: int = 2048
    team: Team = field(default_factory=Team)
    records: list[SampleRecord] = field(default_factory=list)

    def run(
        self,
        model: nn.Module,
        task: str,
        samples: Sequence[Sample],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> list[int]:
        """Pass samples of a task through the model, each on one of the peers; all ranks call this alike.

        Nothing is kept of the samples if any of them fails.

        Args:
            model: The model; left as it is found.
            task: Name of the task.
            samples: Its samples, in file order.
            on_samples: Called with the number of samples after each batch of this rank.

        Returns:
            The samples' pooled numbers, in the order given.

        Raises:
            QkovError: for a loss or gradient that is not finite; names task, sample and layer.
        """
        first = len(self.records)
        outcome = self._run_here(model, self._passes(task, samples), on_samples)
        found: dict[int, tuple[int, float]] = {}
        for peer, theirs in zip(self.team.peer_ranks, self.team.peers.gather(outcome), strict=True):
            if error := theirs["error"]:
                raise QkovError(**error) if peer == self.team.world.rank else QkovError(**error).within(f"rank {peer}")
            found.update({number: (count, loss) for number, count, loss in theirs["losses"]})
        self.records.extend(
            SampleRecord(task, sample.id, sample.text, *found[first + n]) for n, sample in enumerate(samples)
        )
        return list(range(first, first + len(samples)))

    def _passes(self, task: str, samples: Sequence[Sample]) -> list[tuple[Batch, bool]]:
        """This rank's batches, each counted; then, where passes need all peers, idle ones up to the longest list."""
        shares = self.team.shares([len(sequence(sample, self.objective).input_ids) for sample in samples])
        mine = self._batches(task, samples, shares[self.team.peers.rank])
        passes = [(batch, True) for batch in mine]
        if self.team.lockstep:
            longest = max(len(self._batches(task, samples, share)) for share in shares)
            (idle, *_) = mine or self._batches(task, samples, [0])
            passes += [(idle, False)] * (longest - len(mine))
        return passes

    def _batches(self, task: str, samples: Sequence[Sample], share: Sequence[int]) -> list[Batch]:
        chosen, first = [samples[n] for n in share], len(self.records)
        batches = make_batches(
            chosen,
            names=[f"task {task!r}, sample {sample.id!r}" for sample in chosen],
            numbers=[first + n for n in share],
            batch_tokens=self.batch_tokens,
            objective=self.objective,
        )
        return list(batches)

    def _run_here(
        self, model: nn.Module, passes: Sequence[tuple[Batch, bool]], on_samples: Callable[[int], object]
    ) -> dict[str, Any]:
        """Make this rank's passes; returns each sample's number, labelled tokens and loss, or the error."""
        losses: list[tuple[int, int, float]] = []
        try:
            with capture(
                model, self.sites, loss_reduction=self.loss_reduction, loss_factor=self.loss_factor
            ) as session:
                for batch, counts in passes:
                    if not counts:
                        session.run(batch, _Nowhere())
                        continue
                    with self.store.batch(batch) as sink:
                        found = session.run(batch, sink)
                    losses += zip(batch.samples, batch.num_targets.tolist(), found.tolist(), strict=True)
                    on_samples(len(batch.samples))
        except QkovError as error:
            if self.team.lockstep:
                raise  # the peers wait inside a pass: they learn it when this rank goes
            return {"error": error.parts, "losses": []}
        return {"error": None, "losses": losses}


class _Nowhere:
    """Takes the factors of a pass that only keeps step."""

    def add(self, factors: Factors) -> None:
        """Drop them."""
