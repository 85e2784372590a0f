"""Where captured factors wait until their layer is scored: on their GPU, in memory, on disk, each up to a budget.

Each site has one row buffer for X (kept once for the projections that share it) and one for D: the real tokens of
every batch, one after another. A sample so long that its gradient is smaller than its factors is kept as the gradient
itself, D^T X in float32 with the sum of D over tokens (a bias's gradient) as one more column. Which form a sample takes
at a site depends on its length alone, so that all ranks agree on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkov_dist.data.batches import Batch
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect

from .factors import FeatureSlice, SampleIndex, Span, Whole
from .numerics import products_as
from .row_tiers import RowTiers
from .sinks import Factors

_FORMING = threading.Lock()  # backward passes of several devices run in threads; how products are formed is one for all


class FactorStore:
    """Collects factors batch by batch and gives them back site by site.

    Args:
        budget_bytes: Factors kept in the host's memory; the rest goes to disk.
        folder: Where the temporary folder for spilled factors is made; the system's own by default.
        tp_rects: The tensor-parallel shard of each projection, [out, in]. Hooks hand out either all features of a
            projection or exactly those of its shard.
        gpu_budget_bytes: Factors that stay on the GPU that they come from, before any go to the host's memory.
        lengths: Tokens of the samples that will come, where they are known: every row buffer then has its place in
            memory from the first on; without them nothing stays on a GPU.
        dtype: In which factors are kept; as they come by default. Gradients are kept in float32 or better.
        gradients_above: By site, the number of tokens above which a sample is kept as its gradient; all samples are
            kept as factors by default. Sites that share an input share the number.
        matmul_precision: Of the float32 products that form kept gradients.

    Attributes:
        flops: Floating-point operations of the gradients formed here.
    """

    def __init__(
        self,
        budget_bytes: int,
        folder: Path | None = None,
        tp_rects: Mapping[Site, Rect] | None = None,
        *,
        gpu_budget_bytes: int = 0,
        lengths: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        gradients_above: Mapping[Site, int] | None = None,
        matmul_precision: str = "highest",
    ) -> None:
        self._rows, self.flops = RowTiers(budget_bytes, gpu_budget_bytes, folder), 0
        self._tp_rects, self._above = dict(tp_rects or {}), dict(gradients_above or {})
        self._lengths, self._dtype, self._precision = tuple(lengths), dtype, matmul_precision
        self._indexes: dict[int | None, SampleIndex] = {above: SampleIndex() for above in (None, *self._above.values())}
        self._x_site: dict[Site, Site] = {}
        self._shape: dict[Site, tuple[int, int]] = {}  # features that hooks see, [out, in]
        self._batch_lengths: tuple[int, ...] = ()

    @property
    def bytes_on_gpu(self) -> int:
        """Size of what has its place on a GPU."""
        return self._rows.bytes_on_gpu

    @property
    def bytes_in_memory(self) -> int:
        """Size of what is held in the host's memory."""
        return self._rows.bytes_in_memory

    @property
    def bytes_on_disk(self) -> int:
        """Size of what was spilled."""
        return self._rows.bytes_on_disk

    @property
    def sites(self) -> frozenset[Site]:
        """The sites that have been captured."""
        return frozenset(self._x_site)

    @property
    def spans(self) -> dict[int, Span]:
        """Rows of each sample at sites that keep all samples as factors."""
        return self._indexes[None].spans

    @property
    def num_rows(self) -> int:
        """Tokens of all samples."""
        return self._indexes[None].num_rows

    def sample_index(self, site: Site) -> SampleIndex:
        """Where each sample is at a site."""
        return self._indexes[self._above.get(site)]

    def describe(self) -> dict[str, Any]:
        """What the store holds, as JSON: where samples are, shared inputs, and each row buffer with its dtype."""
        return {
            "indexes": [
                [above, [[number, *span] for number, span in index.spans.items()], list(index.whole), index.num_rows]
                for above, index in self._indexes.items()
            ],
            "sharing": [[_named(site), _named(shared)] for site, shared in self._x_site.items()],
            "row_buffers": [
                [kind, _named(site), str(row_buffer.dtype).removeprefix("torch.")]
                for (kind, site), row_buffer in self._rows.buffers.items()
            ],
        }

    def threshold(self, site: Site) -> int | None:
        """Tokens above which samples are kept as gradients at a site; None where none are."""
        return self._above.get(site)

    def close(self) -> None:
        """Forget everything and remove the temporary folder."""
        self._rows.close()

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[FactorStore]:
        """Take one batch's factors; if the batch fails, the store is as if it had not begun."""
        self._batch_lengths = batch.lengths
        self._rows.begin()
        try:
            yield self
            self._rows.finish_copies()
        except BaseException:
            self._rows.drop_added()
            raise
        for above, index in self._indexes.items():
            for number, length in zip(batch.samples, batch.lengths, strict=True):
                index.add(number, length, as_gradient=above is not None and length > above)

    def add(self, factors: Factors) -> None:
        """Take one site's factors (a :class:`~qkov_dist.capture.sinks.FactorSink`)."""
        known = self._x_site.setdefault(factors.site, factors.x_site)
        if known != factors.x_site:
            raise QkovError(
                factors.site.module,
                expected=f"the same input as {known.module} in every batch",
                got=f"that of {factors.x_site.module}",
                remedy="The model routes the inputs of its projections differently from batch to batch.",
            )
        x, d = factors.x, factors.d
        self._shape[factors.site] = (d.shape[1], x.shape[1])
        above = self._above.get(factors.site)
        if above is not None and max(self._batch_lengths) > above:
            x, d = self._without_long(factors, above)
        if not d.shape[0]:
            return
        self._append("d", factors.site, d)
        if not self._rows.has_added(("x", factors.x_site)):
            self._append("x", factors.x_site, x)

    def _without_long(self, factors: Factors, above: int) -> tuple[Tensor, Tensor]:
        """Keep long samples as gradients; returns X and D of the others."""
        kept, start = [], 0
        for length, alike in groupby(self._batch_lengths):
            num = len(list(alike))
            part = slice(start, start + num * length)
            start = part.stop
            if length <= above:
                kept.append(part)
                continue
            x, d = (_at_least_float32(values[part]).view(num, length, -1) for values in (factors.x, factors.d))
            with _FORMING, products_as(self._precision, d.device):
                gradients = torch.cat([torch.bmm(d.mT, x), d.sum(1).unsqueeze(2)], dim=2)
            self.flops += 2 * num * length * x.shape[2] * d.shape[2]
            self._append("g", factors.site, gradients.flatten(1))
        if not kept:
            return factors.x[:0], factors.d[:0]
        return torch.cat([factors.x[part] for part in kept]), torch.cat([factors.d[part] for part in kept])

    def x_site(self, site: Site) -> Site:
        """The site whose X this site shares (itself where it shares none).

        Raises:
            QkovError: where nothing was captured at this site.
        """
        if site not in self._x_site:
            raise QkovError(
                f"layer {site.layer} ({site.module})",
                expected="captured factors",
                got="none",
                remedy="Collect this layer first: include it in the layers handed to the collector.",
            )
        return self._x_site[site]

    def x(self, site: Site) -> FeatureSlice:
        """The inputs of all factored samples' tokens at one site, [tokens, in]."""
        values, shard = self._rows.read(("x", self.x_site(site)), self._shape[site][1]), self._tp_rects.get(site)
        return FeatureSlice(values, shard.col if shard and values.shape[1] == shard.shape[1] else 0)

    def d(self, site: Site) -> FeatureSlice:
        """The output gradients of all factored samples' tokens at one site, [tokens, out]."""
        self.x_site(site)
        values, shard = self._rows.read(("d", site), self._shape[site][0]), self._tp_rects.get(site)
        return FeatureSlice(values, shard.row if shard and values.shape[1] == shard.shape[0] else 0)

    def g(self, site: Site) -> Whole | None:
        """The gradients of all other samples at one site, [n, out, in + 1]; None where there are none."""
        self.x_site(site)
        if ("g", site) not in self._rows.buffers:
            return None
        (num_out, num_in), shard = self._shape[site], self._tp_rects.get(site)
        values = self._rows.read(("g", site), num_out * (num_in + 1)).view(-1, num_out, num_in + 1)
        row = shard.row if shard and num_out == shard.shape[0] else 0
        return Whole(values, row, shard.col if shard and num_in == shard.shape[1] else 0)

    def _append(self, kind: str, site: Site, rows: Tensor) -> None:
        dtype = rows.dtype if kind == "g" else self._dtype or rows.dtype
        self._rows.append((kind, site), rows, dtype, self._rows_expected(kind, site))

    def _rows_expected(self, kind: str, site: Site) -> int:
        """Rows that a buffer will have, from the lengths that were told; 0 where none were."""
        above = self._above.get(site)
        if kind == "g":
            return sum(1 for length in self._lengths if above is not None and length > above)
        return sum(length for length in self._lengths if above is None or length <= above)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _named(site: Site) -> list[Any]:
    return [site.layer, site.module]
