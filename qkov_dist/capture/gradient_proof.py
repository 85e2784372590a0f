"""Whether D^T X is the gradient of a weight, as autograd forms it.

What uses a weight without calling its module shows here. It can be asked of weights that lie dense and whole in this
process; of all others, whether they are linear maps (``linear_map``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qkov_dist.data.batches import Batch
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.linear_map import Forward, check_linear_map
from qkov_dist.layout.modules import is_transposed
from qkov_dist.layout.weights import is_plain
from qkov_dist.modes import input_device

from .hooks import capture
from .numerics import moved_by_order
from .sinks import Factors

LEAST_HALF = 2.0**-10  # 16 times the least normal float16

PROOF_BYTES = 2**30  # of weight gradients at a time


def check_gradients(model: nn.Module, sites: Sequence[Site], batch: Batch) -> None:
    """Raise unless each site is a linear map, and D^T X the gradient of its weight as autograd forms it.

    Raises:
        QkovError: names the projection.
    """
    for part in _parts(model, sites):
        kept = _Kept()
        with (
            _learning(model, part) as weights,
            capture(model, part, inspect=_check_map) as session,
            _thawed(weights.values()),
        ):
            session.run(batch, kept)
        with torch.autocast(input_device(model).type, enabled=False):
            for site, weight in weights.items():
                _compare(site, model.get_submodule(site.module), weight, kept[site], session.loss_scale)


class _Kept(dict[Site, Factors]):
    """A sink that keeps one batch."""

    def add(self, factors: Factors) -> None:
        """Keep them."""
        self[factors.site] = factors


def _check_map(site: Site, module: nn.Module, forward: Forward, x: Tensor, y: Tensor) -> None:
    check_linear_map(f"layer {site.layer} ({site.module})", module, forward, x.detach(), y.detach())


def _parts(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites whose weight gradients are formed in one pass; all at once where no weight lies whole in this process."""
    part: list[Site] = []
    size = 0
    for site in sites:
        weight = model.get_submodule(site.module)._parameters.get("weight")
        new = weight.nbytes if weight is not None and is_plain(weight) else 0
        if part and size + new > PROOF_BYTES:
            yield part
            part, size = [], 0
        part.append(site)
        size += new
    yield part


@contextmanager
def _learning(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, nn.Parameter]]:
    """Put parameters of the same numbers in place of plain weights, so that no gradient reaches the user's own."""
    modules = {site: model.get_submodule(site.module) for site in sites}
    own = {site: m._parameters["weight"] for site, m in modules.items() if is_plain(m._parameters.get("weight"))}
    copies = {site: nn.Parameter(weight.detach()) for site, weight in own.items() if weight is not None}
    try:
        for site, copy in copies.items():
            modules[site]._parameters["weight"] = copy
        yield copies
    finally:
        for site in copies:
            modules[site]._parameters["weight"] = own[site]


@contextmanager
def _thawed(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let these learn in a model that is frozen."""
    for weight in weights:
        weight.requires_grad_(True)
    yield


def _compare(site: Site, module: nn.Module, weight: nn.Parameter, factors: Factors, loss_scale: float) -> None:
    wide = torch.float64 if factors.d.dtype == torch.float64 else torch.float32
    product = factors.d.to(wide).t() @ factors.x.to(wide)
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    grad = (grad.t() if is_transposed(module) else grad).to(wide) / loss_scale
    if loss_scale != 1:  # autograd sums in float16: what is near or below its least normal number says nothing
        normal = torch.maximum(product.abs(), grad.abs()) * loss_scale > LEAST_HALF
        product, grad = product[normal], grad[normal]
    tolerance = moved_by_order(factors.x.dtype, factors.d.dtype, weight.dtype)
    deviation, size = float((product - grad).norm()), float(grad.norm())
    if not deviation <= tolerance * max(size, float(product.norm())):
        raise QkovError(
            f"layer {site.layer} ({site.module}.weight)",
            expected="a gradient D^T X, as of a weight that its own module alone uses, as it is",
            got=f"autograd's, which differs from it by {deviation / max(size, 1e-300):.2g} of its norm",
            remedy="Something else reads this weight (an adapter such as DoRA, a custom forward), or changes its "
            "gradient. Merge or remove it, or leave the layer out (metric.layers; layers of a FisherCollector).",
        )
