"""One pass as its hooks share it: the batch, the inputs they have seen, and what they hand on of each projection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qkov_dist.data.batches import Batch
from qkov_dist.distributed.sharding import local_part
from qkov_dist.layout.heads import Site

from .finite import check_finite, total
from .refusals import CHANGED_IN_PLACE
from .sinks import Factors, FactorSink


@dataclass(frozen=True)
class SeenInput:
    """X as a projection saw it: whose it was first, the tensor, and its version then."""

    x_site: Site
    x: Tensor
    version: int


@dataclass
class PassState:
    """What the hooks share during one pass.

    Attributes:
        batch: The batch.
        kept_tokens: Rows of the flattened batch whose factors are kept; None for all.
        sink: Takes the factors.
        loss_scale: By what the loss is multiplied in the backward pass.
        sums: Of what was seen, where whether all is finite is asked at the end; None asks at each site.
        is_half: Whether some number of the pass is a float16: weak gradients vanish in it unless the loss is scaled.
    """

    batch: Batch
    kept_tokens: Tensor | None
    sink: FactorSink
    loss_scale: float = 1.0
    sums: list[Tensor] | None = None
    is_half: bool = False
    inputs: dict[Site, SeenInput] = field(default_factory=dict)
    finished: set[Site] = field(default_factory=set)
    in_backward: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding among them."""
        return self.batch.attention_mask.numel()

    def note_input(self, site: Site, x: Tensor) -> None:
        """Note X of a site, and which site of the layer was handed this very tensor (or a view of it) first."""
        same = (s for s, other in self.inputs.items() if s.layer == site.layer and _is_same(other.x, x))
        self.inputs[site] = SeenInput(next(same, site), x, x._version)

    def kept(self, tensor: Tensor) -> Tensor:
        """[N, T, width] to [kept tokens, width]."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.kept_tokens is None else flat.index_select(0, self.kept_tokens)

    def hand_on(self, site: Site, d: Tensor) -> None:
        """Give the sink what is complete with D, free of the loss scale and found to be finite."""
        known = self.inputs[site]
        if known.x._version != known.version:
            raise CHANGED_IN_PLACE.at(site.module)
        d = self.kept(local_part(d, self.num_tokens, site.module))
        d = d if self.loss_scale == 1.0 and d.dtype != torch.float16 else d.float() / self.loss_scale
        factors = Factors(site, known.x_site, self.kept(known.x.detach()), d)
        if self.sums is None:
            check_finite(_looked_at(factors), self.batch, f"layer {site.layer} ({site.module})")
        else:
            self.sums += map(total, _looked_at(factors).values())
        self.finished.add(site)
        self.sink.add(factors)


def _looked_at(factors: Factors) -> dict[str, Tensor]:
    """What has to be finite, by name; a shared input is looked at once."""
    shared = factors.site != factors.x_site
    return {"gradient": factors.d} if shared else {"gradient": factors.d, "input": factors.x}


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers at one place; both are alive, so that a place is never reused."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and one._version == other._version
    )
