"""A batch whose tokens several ranks share: what each of them runs, and how its factors come to the rank that asked.

Position t of a batch of T is run by rank t // S of N, S = ceil(T / N); the last spans are padded on the right. Targets
are aligned with the outputs that predict them before anything is cut, so that none is lost at an edge. A pass leaves
each rank the rows of X and D of its own span. They are sent to one rank, in the order of tokens, a layer at a time: no
product of a sample is formed, and nothing squared, before all of its tokens are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qkov_dist.data.batches import Batch
from qkov_dist.data.samples import IGNORED
from qkov_dist.distributed.context_parallel import shared_tokens
from qkov_dist.distributed.world import TorchWorld, World
from qkov_dist.layout.heads import Site

from .sinks import Factors, FactorSink
from .span_batch import SpanBatch


@dataclass(frozen=True)
class Spans:
    """Ranks that share the tokens of every batch.

    Attributes:
        group: The ranks, by place.
    """

    group: World

    @contextmanager
    def attention(self, model: nn.Module, *, rehearsed: bool = False) -> Iterator[None]:
        """Let the model's attention see all of them, or pretend that it does."""
        assert isinstance(self.group, TorchWorld)
        with shared_tokens(model, self.group, rehearsed=rehearsed):
            yield

    def size(self, batch: Batch) -> int:
        """Positions of one span, S."""
        return -(-batch.input_ids.shape[1] // self.group.size)

    def of(self, batch: Batch) -> SpanBatch:
        """This rank's span of a batch."""
        size, length = self.size(batch), batch.input_ids.shape[1]
        start, missing = self.group.rank * size, self.group.size * size - length

        def cut(values: Tensor, filled: int = 0) -> Tensor:
            return pad(values, (0, missing), value=filled)[:, start : start + size]

        return SpanBatch(
            batch.samples,
            batch.names,
            cut(batch.input_ids),
            cut(batch.attention_mask),
            cut(batch.targets, IGNORED),
            cut(batch.kept),
            start,
            length,
            batch.num_targets,
        )

    def places(self, batch: Batch, chosen: Tensor) -> list[Tensor]:
        """By rank, places of its positions among all that are chosen of a batch, sample after sample."""
        of_rank = chosen.nonzero()[:, 1] // self.size(batch)
        return [(of_rank == rank).nonzero()[:, 0] for rank in range(self.group.size)]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on the CPU."""
        return torch.from_numpy(self.group.all_reduce(values.detach().cpu().numpy()))


class GatheredFactors:
    """Takes the factors of this rank's span; those of all spans go to one rank's sink, whole.

    Args:
        spans: The ranks.
        batch: The whole batch.
        owner: The place of the rank that they go to.
        sites: All sites of the pass: a layer is sent when all of its sites are there, alike on all ranks.
        sink: On that rank takes them.
    """

    def __init__(self, spans: Spans, batch: Batch, owner: int, sites: Sequence[Site], sink: FactorSink) -> None:
        self._spans, self._batch, self._owner, self._sink = spans, batch, owner, sink
        self._layers = {site.layer: [s for s in sites if s.layer == site.layer] for site in sites}
        self._waiting: dict[Site, Factors] = {}

    def add(self, factors: Factors) -> None:
        """Take one site's factors of this rank's span."""
        self._waiting[factors.site] = factors
        sites = self._layers[factors.site.layer]
        if all(site in self._waiting for site in sites):
            self._send([self._waiting.pop(site) for site in sites])

    def _send(self, layer: Sequence[Factors]) -> None:
        """Send a layer's rows to the owner, each input once."""
        inputs: dict[Site, Tensor] = {}
        for factors in layer:
            inputs.setdefault(factors.x_site, factors.x)
        whole = self._gathered([*inputs.values(), *(factors.d for factors in layer)])
        if not whole:
            return
        x = dict(zip(inputs, whole, strict=False))
        for factors, d in zip(layer, whole[len(inputs) :], strict=True):
            self._sink.add(Factors(factors.site, factors.x_site, x[factors.x_site], d))

    def _gathered(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Rows of all ranks, sample after sample, on the owner; nothing elsewhere."""
        group, parts = _group_for(self._spans.group, parts[0]), [part.contiguous() for part in parts]
        nothing: list[list[Tensor]] = [[] for _ in range(group.size)]
        sent = [parts if rank == self._owner else [] for rank in range(group.size)]
        if group.rank != self._owner:
            group.send_recv(sent, nothing)
            return []
        rows = self._rows
        received = [[part.new_empty(len(of_rank), part.shape[1]) for part in parts] for of_rank in rows]
        group.send_recv(sent, received)
        order = torch.cat(rows).argsort().to(parts[0].device)
        return [torch.cat(of_ranks).index_select(0, order) for of_ranks in zip(*received, strict=True)]

    @cached_property
    def _rows(self) -> list[Tensor]:
        return self._spans.places(self._batch, self._batch.kept)


def _group_for(group: World, like: Tensor) -> World:
    """The group, over the memory of a GPU where it goes from there to others."""
    return group.over(like.device) if like.device.type != "cpu" and group.carries(like.device.type) else group
