"""A rank's passes, made one by one, several at a time, or by ranks that share a sample's tokens; factors are kept.

Where a batch does not fit into memory its halves are run, unless other ranks wait in the pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from qkov_dist.console import Console
from qkov_dist.data.batches import Batch
from qkov_dist.distributed.topology import Topology
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.memory import UnlessShort, give_back, is_shortage
from qkov_dist.modes import ModelError, input_device

from .hooks import Capture, capture
from .passes import Pass
from .side_by_side import Running, running
from .sinks import Nowhere
from .spans import GatheredFactors, Spans
from .store import FactorStore

Ran = tuple[int, int, float]  # a sample's number, labelled tokens and loss
Done = Generator[tuple[Batch, Tensor], None, None]  # batches that were run, with their samples' losses


@dataclass(frozen=True)
class PassRunner:
    """Makes passes and keeps the factors of this rank's samples.

    Attributes:
        store: Where factors are kept.
        sites: The projections captured.
        loss_reduction: ``mean`` or ``sum`` over a sample's labelled tokens.
        loss_factor: Multiplies every loss.
        topology: Who takes part in a pass.
        console: Is warned where memory was short.
    """

    store: FactorStore
    sites: tuple[Site, ...]
    loss_reduction: str
    loss_factor: float
    topology: Topology
    console: Console

    @property
    def spans(self) -> Spans | None:
        """The ranks that share the tokens of each pass; None where a pass has whole samples."""
        return Spans(self.topology.cp_group) if self.topology.cp_group.size > 1 else None

    def run(
        self, models: Sequence[nn.Module], passes: Sequence[Pass], on_samples: Callable[[int], object]
    ) -> list[Ran]:
        """Make this rank's passes.

        Args:
            models: The model, and copies of it by which several batches run at a time.
            passes: In order.
            on_samples: Called with the number of samples after each batch.

        Returns:
            What comes of each of its own samples.

        Raises:
            QkovError: for a loss or gradient that is not finite, and where memory does not suffice.
        """
        losses: list[Ran] = []
        model = models[0]
        with (
            self.plan_named(model),
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
    def plan_named(self, model: nn.Module) -> Iterator[None]:
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
            return self.too_long(batch.names[0], longest)
        return QkovError(
            f"a batch of {len(batch.samples)} samples of up to {longest} tokens",
            expected="memory for it on every rank (passes are made by several of them together)",
            got="too little",
            remedy=f"Set compute.batch_tokens to {len(batch.samples) * longest // 2} or less.",
        )

    def too_long(self, name: str, num_tokens: int) -> QkovError:
        """That one sample does not fit into memory, with what would make it fit."""
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
