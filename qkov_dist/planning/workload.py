"""What has to be computed, before anyone knows on how many ranks: the model in integers, the samples, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qkov_dist.capture.factors import SampleIndex
from qkov_dist.config import RunConfig
from qkov_dist.data.batches import Objective, make_batches, sequence
from qkov_dist.data.samples import Sample, Task
from qkov_dist.distributed.topology import Topology
from qkov_dist.distributed.world import Alone
from qkov_dist.layout.heads import Layout
from qkov_dist.scoring.padded_groups import order_samples
from qkov_dist.scoring.settings import DTYPES
from qkov_dist.scoring.tiles import Selection

from .model_sizes import ModelSizes
from .rank_work import Scoring


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
        tasks: A and B; what samples contain does not matter.
        batch_tokens: Padded tokens in one compute batch.
        objective: How labels align with outputs.
        on_gpu: Whether the model is on a GPU, and scores wait beside it in the host's memory.
        gpu_memory: Bytes of a GPU's memory that the run may use, where they are known.
        workers: Tiles that are formed at a time on a rank.
        disk: Bytes of factors that there is room for on disk; None sets no limit.
    """

    config: RunConfig
    model_sizes: ModelSizes
    layout: Layout
    tasks: tuple[Task, Task]
    batch_tokens: int
    objective: Objective = "causal"
    on_gpu: bool = False
    gpu_memory: int | None = None
    workers: int = 1
    disk: int | None = None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to score, in order."""
        return tuple(layer.index for layer in self.scoring.selection.layers_of(self.layout))

    @cached_property
    def scoring(self) -> Scoring:
        """What is scored, and in which numbers."""
        name = self.config.compute.factor_dtype
        return Scoring(
            Selection(self.config.metric.layers, self.config.metric.heads),
            self.config.metric.include_bias,
            sum(self.num_samples),
            DTYPES[self.config.compute.score_dtype].itemsize,
            {"float32": 4, "bfloat16": 2}.get(name, self.model_sizes.itemsize),
            self.on_gpu,
        )

    @property
    def num_samples(self) -> tuple[int, int]:
        """Samples of A and of B."""
        return len(self.tasks[0].samples), len(self.tasks[1].samples)

    @property
    def pooled(self) -> bool:
        """Whether scores among all pooled samples are needed."""
        return self.config.statistics.enabled or self.config.output.pairs == "all"

    @property
    def pairs(self) -> tuple[int, int]:
        """(samples in the role of i, samples in the role of j)."""
        num_a, num_b = self.num_samples
        return (num_a + num_b, num_a + num_b) if self.pooled else (num_a, num_b)

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of each sample of A and of B, as the model sees them."""
        of_a, of_b = (tuple(len(sequence(s, self.objective).input_ids) for s in task.samples) for task in self.tasks)
        return of_a, of_b

    @cached_property
    def lengths_pooled(self) -> tuple[int, ...]:
        """Tokens of every sample."""
        return (*self.lengths[0], *self.lengths[1])

    def kept(self, above: int) -> KeptSamples:
        """All samples at the sites of one threshold."""
        return KeptSamples.of(self.lengths_pooled, above)

    def padded_tokens(self, above: int) -> int:
        """Tokens of all samples kept as factors (no longer than ``above``), with the padding of their groups."""
        num_a, num = self.num_samples[0], sum(self.num_samples)
        cuts = (0, num) if self.pooled else (0, num_a, num)
        return _padded(self.lengths_pooled, above, cuts)


@dataclass(frozen=True, eq=False)
class Dealt:
    """A workload's samples as data-parallel ranks run them; ``gathers_weights``: every pass of one needs one of all."""

    work: Workload
    dp_size: int
    gathers_weights: bool

    @cached_property
    def lengths(self) -> list[tuple[int, ...]]:
        """Tokens of each sample that a data-parallel rank runs, by rank."""
        found: list[tuple[int, ...]] = [()] * self.dp_size
        for lengths in self.work.lengths:
            for dp_rank, numbers in enumerate(self._numbers_by_dp_rank(lengths)):
                found[dp_rank] += tuple(lengths[n] for n in numbers)
        return found

    @cached_property
    def passes(self) -> list[list[Pass]]:
        """The batches of each data-parallel rank; where passes need all ranks, with idle ones up to the longest."""
        found: list[list[Pass]] = [[] for _ in range(self.dp_size)]
        for task, lengths in zip(self.work.tasks, self.work.lengths, strict=True):
            of_task = [self._batches(task.samples, numbers) for numbers in self._numbers_by_dp_rank(lengths)]
            longest = max(map(len, of_task)) if self.gathers_weights else 0
            for dp_rank, batches in enumerate(of_task):
                idle = (batches or self._batches(task.samples, [0]))[:1]
                found[dp_rank] += batches + idle * (longest - len(batches))
        return found

    def _numbers_by_dp_rank(self, lengths: Sequence[int]) -> list[list[int]]:
        return Topology(dp_group=SimulatedWorld(0, self.dp_size)).deal_samples(lengths)

    def _batches(self, samples: Sequence[Sample], numbers: Sequence[int]) -> list[Pass]:
        chosen = [samples[n] for n in numbers]
        names = [sample.id for sample in chosen]
        size, objective = self.work.batch_tokens, self.work.objective
        batches = make_batches(chosen, names=names, batch_tokens=size, objective=objective)
        return [Pass(*map(int, (*batch.targets.shape, batch.num_targets.sum()))) for batch in batches]


@lru_cache(maxsize=64)
def _padded(lengths: tuple[int, ...], above: int, cuts: tuple[int, ...]) -> int:
    sample_index = SampleIndex()
    for number, length in enumerate(lengths):
        sample_index.add(number, length, as_gradient=length > above)
    groups = order_samples(range(len(lengths)), sample_index, cuts).groups
    return sum((group.last - group.first) * group.length for group in groups)
