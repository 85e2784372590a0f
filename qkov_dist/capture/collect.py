"""Samples that have been run: their numbers, tokens, losses, and the factors of their gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from qkov_dist.console import Console
from qkov_dist.data.batches import Batch, Objective, content_of
from qkov_dist.data.samples import Sample
from qkov_dist.distributed.cut_samples import refuse_cut_samples
from qkov_dist.distributed.shared_errors import together
from qkov_dist.distributed.topology import Topology
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.memory import UnlessShort, give_back, is_shortage
from qkov_dist.modes import ModelError, input_device

from .hooks import Capture, capture
from .passes import DealtTask, Pass, TaskPasses
from .side_by_side import Running, even_batch_tokens, running, sharing_weights
from .sinks import Nowhere
from .soundness import Soundness, richest
from .spans import GatheredFactors, Spans
from .store import FactorStore

Ran = tuple[int, int, float]  # a sample's number, labelled tokens and loss
Done = Generator[tuple[Batch, Tensor], None, None]  # batches that were run, with their samples' losses


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
        at_once: How many batches may run at a time (``capture.side_by_side``): in threads, which know nothing of what
            the caller has set for its own alone, such as autocast.
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

    @property
    def spans(self) -> Spans | None:
        """The ranks that share the tokens of each pass; None where a pass has whole samples."""
        return Spans(self.topology.cp_group) if self.topology.cp_group.size > 1 else None

    def run(
        self,
        model: nn.Module,
        task: str,
        samples: Sequence[Sample],
        on_samples: Callable[[int], object] = lambda count: None,
    ) -> list[int]:
        """Pass samples of a task through the model, each on one data-parallel rank; all ranks call this alike.

        Nothing is kept of the samples if any of them fails.

        Args:
            model: The model; left as it is found.
            task: Name of the task.
            samples: Its samples, in file order.
            on_samples: Called with the number of samples after each batch of this rank.

        Returns:
            The samples' pooled numbers, in the order given.

        Raises:
            QkovError: for a loss or gradient that is not finite (names task, sample and layer), and for a model whose
                passes do not give gradients (see :mod:`qkov_dist.capture.soundness`).
        """
        first = len(self.records)
        topology = self.topology
        together(topology.world, lambda: refuse_cut_samples(model))
        if topology.pass_group.size > 1:
            self._look_at(model, task, samples)  # with the same tokens on all ranks: what fails, fails on all
        else:
            together(topology.world, lambda: self._look_at(model, task, samples))
        passes = self._passes(task, samples, self.batch_tokens)
        if topology.passes_wait:  # a rank that fails leaves the others waiting in a pass: they learn it as it goes
            here = self._run_here([model], passes, on_samples)
        else:
            here = together(topology.dp_group, lambda: self._run_alone(model, task, samples, passes, on_samples))
        found = {
            number: (count, loss) for theirs in topology.dp_group.all_gather(here) for number, count, loss in theirs
        }
        self.records.extend(
            SampleRecord(task, sample.id, sample.text, *found[first + n], content_of(sample, self.objective))
            for n, sample in enumerate(samples)
        )
        return list(range(first, first + len(samples)))

    def _look_at(self, model: nn.Module, task: str, samples: Sequence[Sample]) -> None:
        """Check what was not checked before, on all ranks alike; say where samples have to run alone."""
        before = self.soundness.alone
        try:
            first = richest(samples)
            with self._plan_named(model):
                self.soundness.prove(model, self.sites, self.objective, first, _named(task, first), self.spans)
                self.soundness.see(model, samples, self.objective, self.spans)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            longest = max(samples, key=lambda sample: sample.num_tokens)
            raise self._too_long(_named(task, longest), longest.num_tokens) from error
        if self.soundness.alone and not before:
            self.console.warn(
                "outputs depend on the length of a batch: samples run uncut, each beside those of its length"
            )

    def _passes(self, task: str, samples: Sequence[Sample], batch_tokens: int) -> list[Pass]:
        """This rank's passes; then, where passes need all ranks, idle ones up to the longest list."""
        passes = TaskPasses(
            DealtTask(samples, self.objective, self.topology.dp_group.size),
            batch_tokens,
            self.topology.gathers_weights,
            [_named(task, sample) for sample in samples],
            first=len(self.records),
            alone=self.soundness.alone,
            context=self.topology.cp_group.size,
        )
        return passes.on(self.topology.dp_group.rank)

    def _run_alone(
        self,
        model: nn.Module,
        task: str,
        samples: Sequence[Sample],
        passes: Sequence[Pass],
        on_samples: Callable[[int], object],
    ) -> list[Ran]:
        """Make passes that need no other rank's, several at a time where that is worth it."""
        if copies := self._copies(model, passes):
            lengths = [length for one in passes for length in one.batch.attention_mask.sum(1).tolist()]
            tokens = even_batch_tokens(lengths, self.batch_tokens, 1 + len(copies))
            passes = self._passes(task, samples, tokens)
        return self._run_here([model, *copies], passes, on_samples)

    def _run_here(
        self, models: Sequence[nn.Module], passes: Sequence[Pass], on_samples: Callable[[int], object]
    ) -> list[Ran]:
        """Make this rank's passes through a model and its copies; returns what comes of each of its own samples."""
        losses: list[Ran] = []
        model = models[0]
        with (
            self._plan_named(model),
            nullcontext() if self.spans is None else self.spans.attention(model),
            ExitStack() as stack,
        ):
            sessions = [stack.enter_context(self._capture(one)) for one in models]
            done = self._side_by_side(sessions, passes) if len(models) > 1 else self._one_by_one(sessions[0], passes)
            with closing(done) as batches:
                for part, found in batches:
                    losses += zip(part.samples, part.num_targets.tolist(), found.tolist(), strict=True)
                    on_samples(len(part.samples))
        return losses

    def _capture(self, model: nn.Module) -> AbstractContextManager[Capture]:
        return capture(
            model,
            self.sites,
            loss_reduction=self.loss_reduction,
            loss_factor=self.loss_factor,
            check_at_end=self.topology.passes_alone and input_device(model).type == "cuda",
            any_rank=lambda here: any(self.topology.pass_group.all_gather(here)),
        )

    def _copies(self, model: nn.Module, passes: Sequence[Pass]) -> list[nn.Module]:
        """Copies of the model by which batches run at the same time as by the model itself; none for one at a time."""
        num = min(self.at_once, len(passes)) if self.topology.passes_alone else 1
        return sharing_weights(model, num - 1)

    def _one_by_one(self, session: Capture, passes: Sequence[Pass]) -> Done:
        for one in passes:
            yield from self._pass(session, one)

    def _side_by_side(self, sessions: Sequence[Capture], passes: Sequence[Pass]) -> Done:
        """Run several batches at a time; factors are kept, and losses come, in their order.

        Once memory was short, what is left is run one by one.
        """
        left, begun, short = deque(one.batch for one in passes), deque[tuple[Batch, Running]](), list[Batch]()
        with running(sessions) as submit:
            while begun or (left and not short):
                while left and not short and len(begun) <= len(sessions):
                    begun.append((left[0], submit(left.popleft())))
                batch, wait = begun.popleft()
                found = self._kept(batch, wait)
                del wait  # and with it the factors
                if found is None:
                    short.append(batch)
                else:
                    yield batch, found
        if short:
            give_back()
            self.console.warn("out of memory with several batches at a time: going on one by one")
        for batch in (*short, *left):
            yield from self._run_batch(sessions[0], batch)

    def _kept(self, batch: Batch, wait: Running) -> Tensor | None:
        """Wait for a batch and keep its factors; its samples' losses, or None where memory was short."""
        done = wait()
        if done is None:
            return None
        found, factors = done
        with UnlessShort():
            with self.store.batch(batch) as sink:
                factors.release(sink)
            return found
        return None

    def _pass(self, session: Capture, one: Pass) -> Done:
        """Make one pass; yields the batches of this rank that were run, with their samples' losses."""
        spans = self.spans
        if not one.counts:
            session.run(one.batch if spans is None else spans.of(one.batch), Nowhere())
        elif spans is None:
            yield from self._run_batch(session, one.batch)
        elif (found := self._run_span(session, one, spans)) is not None:
            yield one.batch, found

    def _run_span(self, session: Capture, one: Pass, spans: Spans) -> Tensor | None:
        """Run this rank's tokens of a batch; the factors and losses go to the rank whose samples they are.

        Raises:
            QkovError: where the batch does not fit into memory: the others wait in the pass.
        """
        mine = one.owner == self.topology.cp_group.rank
        try:
            with self.store.batch(one.batch) if mine else nullcontext(Nowhere()) as sink:
                gathered = GatheredFactors(spans, one.batch, one.owner, self.sites, sink)
                found = spans.summed(session.run(spans.of(one.batch), gathered))
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            raise self._too_large(one.batch) from error
        return found if mine else None

    @contextmanager
    def _plan_named(self, model: nn.Module) -> Iterator[None]:
        """An error inside a tensor-parallel model names the plan, from which it may come."""
        try:
            yield
        except ModelError as error:
            if self.topology.dp_group.size == self.topology.world.size:
                raise
            raise _plan_fails(model, error) from error

    def _run_batch(self, session: Capture, batch: Batch) -> Done:
        """Run one batch; where it does not fit into memory, its halves.

        Yields:
            The batches that were run, with their samples' losses.

        Raises:
            QkovError: where one sample alone does not fit, or where passes need all ranks: a rank that stops half-way
                through one leaves the others waiting in it.
        """
        try:
            with self.store.batch(batch) as sink:
                found = session.run(batch, sink)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if self.topology.gathers_weights or len(batch.samples) == 1:
                raise self._too_large(batch) from error
        else:
            yield batch, found
            return
        self.console.warn(f"out of memory with {len(batch.samples)} samples in a batch: going on with half of them")
        for half in batch.halves():
            yield from self._run_batch(session, half)

    def _too_large(self, batch: Batch) -> QkovError:
        longest = max(batch.lengths)
        if len(batch.samples) == 1:
            return self._too_long(batch.names[0], longest)
        return QkovError(
            f"a batch of {len(batch.samples)} samples of up to {longest} tokens",
            expected="memory for it on every rank (passes are made by several of them together)",
            got="too little",
            remedy=f"Set compute.batch_tokens to {len(batch.samples) * longest // 2} or less.",
        )

    def _too_long(self, name: str, num_tokens: int) -> QkovError:
        remedy = "Cut it with the task's max_tokens, let ranks share its tokens (parallel.cp, FisherCollector(cp=N)), "
        remedy += "spread the model over more ranks or a GPU with more memory, or use model.dtype=bfloat16."
        if self.store.bytes_on_gpu:
            remedy = f"Set compute.factor_gpu_mb=0: factors take {self.store.bytes_on_gpu >> 20} MiB there. {remedy}"
        return QkovError(
            name, expected=f"memory for one sample of {num_tokens} tokens", got="too little", remedy=remedy
        )


def _plan_fails(model: nn.Module, error: ModelError) -> QkovError:
    """What an error inside a tensor-parallel model may come from."""
    config = getattr(model, "config", None)
    return QkovError(
        f"model type {getattr(config, 'model_type', type(model).__name__)!r}",
        expected="a forward and a backward pass under its tensor-parallel plan",
        got=error.got,
        remedy="The plan fails, or a hook of yours under it: use fsdp (parallel.shard=fsdp), which cuts any model.",
    )


def _named(task: str, sample: Sample) -> str:
    """What messages call a sample."""
    return f"task {task!r}, sample {sample.id!r}"
