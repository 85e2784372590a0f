"""What has to be computed, before anyone knows on how many ranks: the model in integers, the samples, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, combinations

from qkov_dist.capture.factors import SampleIndex
from qkov_dist.capture.passes import DealtTask, TaskPasses
from qkov_dist.config import RunConfig
from qkov_dist.data.batches import Batch, Objective
from qkov_dist.data.samples import Task
from qkov_dist.distributed.world import Alone
from qkov_dist.layout.heads import Layout
from qkov_dist.scoring.extent import Scoring, sides
from qkov_dist.scoring.padded_groups import order_samples
from qkov_dist.scoring.score import worth_compiling

from .model_sizes import ModelSizes


@dataclass(frozen=True)
class SimulatedWorld(Alone):
    """A group of ranks of which nothing is there but their number."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Pass:
    """One batch's shape: samples, tokens of each with padding, and labelled tokens of all."""

    samples: int
    length: int
    labelled: int

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.samples * self.length


@dataclass(frozen=True)
class KeptSamples:
    """Some samples at the sites of one threshold: tokens of those kept as factors, and how many are kept otherwise."""

    tokens: int
    wholes: int

    @staticmethod
    def of(lengths: Sequence[int], above: int) -> KeptSamples:
        """Of samples of these lengths."""
        return KeptSamples(sum(n for n in lengths if n <= above), sum(1 for n in lengths if n > above))


@dataclass(frozen=True, eq=False)
class Workload:
    """A run's work.

    Attributes:
        config: Its configuration.
        model_sizes: The model in integers.
        layout: Its heads.
        tasks: All tasks; what samples contain does not matter.
        batch_tokens: Padded tokens in one compute batch.
        objective: How labels align with outputs.
        on_gpu: Whether the model is on a GPU, and scores wait beside it in the host's memory.
        gpu_memory: Bytes of a GPU's memory that the run may use, where they are known.
        memory: Bytes of the host's memory that a rank has beside the others on its node, where they are known.
        workers: Tiles that are formed at a time on a rank.
        disk: Bytes of factors that there is room for on disk; None sets no limit.
    """

    config: RunConfig
    model_sizes: ModelSizes
    layout: Layout
    tasks: tuple[Task, ...]
    batch_tokens: int
    objective: Objective = "causal"
    on_gpu: bool = False
    gpu_memory: int | None = None
    memory: int | None = None
    workers: int = 1
    disk: int | None = None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to score, in order."""
        return tuple(layer.index for layer in self.scoring.selection.layers_of(self.layout))

    @cached_property
    def scoring(self) -> Scoring:
        """What is scored, and in which numbers."""
        return Scoring.of(
            self.config, sum(self.num_samples), model_itemsize=self.model_sizes.itemsize, on_gpu=self.on_gpu
        )

    @cached_property
    def num_samples(self) -> tuple[int, ...]:
        """Samples of each task."""
        return tuple(len(task.samples) for task in self.tasks)

    @property
    def sizes_of_pairs(self) -> list[tuple[int, int]]:
        """Samples of both tasks of every pair."""
        return list(combinations(self.num_samples, 2))

    @cached_property
    def pairs(self) -> tuple[int, int]:
        """(samples in the role of i, samples in the role of j)."""
        left, right = sides(self.num_samples, pooled=self.config.pooled)
        return left.stop - left.start, right.stop - right.start

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each sample of each task, as the model sees them."""
        return tuple(DealtTask(task.samples, self.objective).lengths for task in self.tasks)

    @cached_property
    def lengths_pooled(self) -> tuple[int, ...]:
        """Tokens of every sample."""
        return tuple(chain.from_iterable(self.lengths))

    def kept(self, above: int) -> KeptSamples:
        """All samples at the sites of one threshold."""
        if above not in self._kept:
            self._kept[above] = KeptSamples.of(self.lengths_pooled, above)
        return self._kept[above]

    @cached_property
    def _kept(self) -> dict[int, KeptSamples]:
        return {}

    def compiles(self, elements: int) -> bool:
        """Whether a rank forms scores by what is compiled, of so many elements of samples' gradients."""
        setting = self.config.compute.compile
        return worth_compiling(elements, on_gpu=self.on_gpu) if setting == "auto" else bool(setting)

    def padded_tokens(self, above: int) -> int:
        """Tokens of all samples kept as factors (no longer than ``above``), with the padding of their groups."""
        if above not in self._padded:
            self._padded[above] = _padded(self.lengths_pooled, above, (0, *accumulate(self.num_samples)))
        return self._padded[above]

    @cached_property
    def _padded(self) -> dict[int, int]:
        return {}

    @cached_property
    def of_one_length(self) -> bool:
        """Whether all samples have as many tokens."""
        return len(set(self.lengths_pooled)) <= 1


@dataclass(frozen=True, eq=False)
class Dealt:
    """A workload's samples as data-parallel ranks run them.

    Attributes:
        work: The workload.
        dp_size: How many ranks share them.
        gathers_weights: Whether every pass of one needs one of all.
        context: Ranks that share the tokens of each pass.
    """

    work: Workload
    dp_size: int
    gathers_weights: bool
    context: int = 1

    @cached_property
    def lengths(self) -> list[tuple[int, ...]]:
        """Tokens of each sample that a rank runs, by rank."""
        return [tuple(n for task in self._tasks for n in task.lengths_on(rank)) for rank in range(self.dp_size)]

    @cached_property
    def passes(self) -> list[list[Pass]]:
        """The batches of each rank; where passes need all of them, with idle ones up to the longest list."""
        return [self.passes_on(rank) for rank in range(self.dp_size)]

    def passes_on(self, rank: int) -> list[Pass]:
        """The batches of one rank; of a context-parallel group those of all members, whose tokens they share."""
        return [_shape(a_pass.batch) for of_task in self._passes for a_pass in of_task.on(rank)]

    @cached_property
    def _passes(self) -> list[TaskPasses]:
        return [
            TaskPasses(
                dealt,
                self.work.batch_tokens,
                self.gathers_weights,
                [sample.id for sample in dealt.samples],
                context=self.context,
            )
            for dealt in self._tasks
        ]

    @cached_property
    def _tasks(self) -> tuple[DealtTask, ...]:
        return tuple(DealtTask(task.samples, self.work.objective, self.dp_size) for task in self.work.tasks)


def _shape(batch: Batch) -> Pass:
    return Pass(*map(int, (*batch.targets.shape, batch.num_targets.sum())))


def _padded(lengths: tuple[int, ...], above: int, cuts: tuple[int, ...]) -> int:
    sample_index = SampleIndex()
    for number, length in enumerate(lengths):
        sample_index.add(number, length, as_gradient=length > above)
    groups = order_samples(range(len(lengths)), sample_index, cuts).groups
    return sum((group.last - group.first) * group.length for group in groups)
