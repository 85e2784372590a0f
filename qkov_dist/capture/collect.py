"""Samples that have been run: their numbers, tokens, losses, and the factors of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from qkov_dist.console import Console
from qkov_dist.data.batches import Objective, content_of, groups_of
from qkov_dist.data.samples import Sample
from qkov_dist.distributed.cut_samples import refuse_cut_samples
from qkov_dist.distributed.shared_errors import together
from qkov_dist.distributed.topology import Topology
from qkov_dist.layout.heads import Site
from qkov_dist.memory import is_shortage

from .pass_runner import PassRunner
from .passes import DealtTask, Pass, TaskPasses
from .side_by_side import both, even_batch_tokens, sharing_weights
from .soundness import PROVES, SEES, Soundness, richest
from .store import FactorStore

NamedSamples = tuple[str, Sequence[Sample]]  # a task's name and its samples


@dataclass(frozen=True)
class SampleRecord:
    """One sample that has been run.

    Attributes:
        task: Name of its task.
        id: Its id within the task.
        text: Its text, for reports.
        num_tokens: Labelled tokens.
        loss: Its own loss, reduced as asked for.
        content: A hash of what the model was shown and had to predict.
    """

    task: str
    id: str
    text: str
    num_tokens: int
    loss: float
    content: str = ""


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
        topology: Who runs which samples.
        records: Every sample by its pooled number.
        console: Is warned where something did not go as planned.
        soundness: What is known of the model's passes; one for all collections of a model.
        at_once: How many batches run at a time, where passes need no other rank (``capture.side_by_side``): in threads,
            which know nothing of what the caller has set for its own alone, such as autocast.
        same_model: Whether the models of all ranks are known to be one: what is asked of it, single ranks then ask.
    """

    store: FactorStore
    sites: tuple[Site, ...]
    objective: Objective = "causal"
    loss_reduction: str = "mean"
    loss_factor: float = 1.0
    batch_tokens: int = 2048
    topology: Topology = field(default_factory=Topology)
    records: list[SampleRecord] = field(default_factory=list)
    console: Console = field(default_factory=Console)
    soundness: Soundness = field(default_factory=Soundness)
    at_once: int = 1
    same_model: bool = False

    @property
    def _runner(self) -> PassRunner:
        return PassRunner(self.store, self.sites, self.loss_reduction, self.loss_factor, self.topology, self.console)

    def run(
        self,
        model: nn.Module,
        task: str,
        samples: Sequence[Sample],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> list[int]:
        """Pass samples of one task through the model, as :meth:`run_tasks` does those of several.

        Returns:
            The samples' pooled numbers, in the order given.
        """
        first = len(self.records)
        self.run_tasks(model, [(task, samples)], on_samples)
        return list(range(first, first + len(samples)))

    def run_tasks(
        self,
        model: nn.Module,
        tasks: Sequence[NamedSamples],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Pass samples of some tasks through the model, each on one data-parallel rank; all ranks call this alike.

        Nothing is kept of the samples if any of them fails.

        Args:
            model: The model; left as it is found.
            tasks: Each one's name and its samples, in file order. Samples are numbered in this order.
            on_samples: Called with the number of samples after each batch of this rank.

        Raises:
            QkovError: for a loss or gradient that is not finite (names task, sample and layer), and for a model whose
                passes do not give gradients (see :mod:`qkov_dist.capture.soundness`).
        """
        topology = self.topology
        together(topology.world, lambda: refuse_cut_samples(model))
        dealt = [DealtTask(samples, self.objective, topology.dp_group.size) for _, samples in tasks]
        lengths = [task.lengths_on(topology.dp_group.rank) for task in dealt]
        models = [model, *self._copies(model, lengths)]
        for task, samples in tasks:
            self._look_at(models, task, samples)
        batch_tokens = self.batch_tokens
        if len(models) > 1:
            batch_tokens = even_batch_tokens(lengths, batch_tokens, len(models))
        passes = self._passes([task for task, _ in tasks], dealt, batch_tokens)
        if topology.passes_wait:  # a rank that fails leaves the others waiting in a pass: they learn it as it goes
            here = self._runner.run(models, passes, on_samples)
        else:
            here = together(topology.dp_group, lambda: self._runner.run(models, passes, on_samples))
        found = {
            number: (count, loss) for theirs in topology.dp_group.all_gather(here) for number, count, loss in theirs
        }
        first = len(self.records)
        everyone = enumerate(((task, sample) for task, samples in tasks for sample in samples), start=first)
        self.records.extend(
            SampleRecord(task, sample.id, sample.text, *found[number], content_of(sample, self.objective))
            for number, (task, sample) in everyone
        )

    def _look_at(self, models: Sequence[nn.Module], task: str, samples: Sequence[Sample]) -> None:
        """Check what was not checked before, on all ranks alike; say where samples have to run alone."""
        world, before = self.topology.world, self.soundness.alone
        ask = partial(self._ask, models, task, samples)
        if self.topology.pass_group.size > 1:
            ask()  # with the same tokens on all ranks: what fails, fails on all
        elif self.same_model and self.topology.passes_alone and world.size > 1:
            together(world, partial(ask, proves=world.rank == PROVES, sees=world.rank == SEES))
            self.soundness.share(world, self.sites)
        else:
            together(world, ask)
        if self.soundness.alone and not before:
            self.console.warn(
                "outputs depend on the length of a batch: samples run uncut, each beside those of its length"
            )

    def _ask(
        self,
        models: Sequence[nn.Module],
        task: str,
        samples: Sequence[Sample],
        *,
        proves: bool = True,
        sees: bool = True,
    ) -> None:
        """Ask whether passes give gradients, and whether samples have to run alone."""
        runner, sound, first = self._runner, self.soundness, richest(samples)
        spans = runner.spans
        prove = partial(sound.prove, models[0], self.sites, self.objective, first, _named(task, first), spans)
        see = partial(sound.see, models[-1], samples, self.objective, spans)
        asked = [*([prove] if proves else []), *([see] if sees else [])]
        try:
            with runner.plan_named(models[0]):
                if len(models) > 1 and len(asked) > 1:
                    both(*asked)
                    return
                for each in asked:
                    each()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            longest = max(samples, key=lambda sample: sample.num_tokens)
            raise runner.too_long(_named(task, longest), longest.num_tokens) from error

    def _copies(self, model: nn.Module, lengths: Sequence[Sequence[int]]) -> list[nn.Module]:
        """Copies of the model by which batches run at the same time as by the model itself; none for one at a time."""
        if self.at_once == 1 or not self.topology.passes_alone:
            return []
        alike = self.soundness.alone
        num_batches = sum(1 for of_task in lengths for _ in groups_of(of_task, self.batch_tokens, alike=alike))
        return sharing_weights(model, min(self.at_once, num_batches) - 1)

    def _passes(self, names: Sequence[str], tasks: Sequence[DealtTask], batch_tokens: int) -> list[Pass]:
        """This rank's passes, task by task; where passes need all ranks, with idle ones as long as others have some."""
        found, first = list[Pass](), len(self.records)
        for name, task in zip(names, tasks, strict=True):
            passes = TaskPasses(
                task,
                batch_tokens,
                self.topology.gathers_weights,
                [_named(name, sample) for sample in task.samples],
                first=first,
                alone=self.soundness.alone,
                context=self.topology.cp_group.size,
            )
            found += passes.on(self.topology.dp_group.rank)
            first += len(task.samples)
        return found


def _named(task: str, sample: Sample) -> str:
    """What messages call a sample."""
    return f"task {task!r}, sample {sample.id!r}"
