r"""Whether what a pass leaves is what scores are made of, asked of the model itself before its first batch.

    weights     each projection has a weight of its own, which nothing else uses or changes
    causal      changing the last token changes no earlier output (samples are cut at their last label)
    linear      each projection is Y = X W^T + b (``linear_map``)
    gradient    D^T X equals autograd's dL/dW, where weights lie dense and whole in this process: what uses a weight
                without calling its module shows here
    length      the outputs of a sample do not depend on how long its batch is; where they do, samples run alone

The first tokens of a sample are enough for all but the last, which takes two forward passes of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qkov_dist.data.batches import Batch, Objective, Sequenced, make_batch, sequence
from qkov_dist.data.samples import IGNORED, Sample
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.linear_map import Forward, check_linear_map
from qkov_dist.layout.modules import is_transposed
from qkov_dist.layout.probe import is_plain
from qkov_dist.modes import evaluating, explained_pass, input_device, plain_outputs, without_graph

from .hooks import capture
from .losses import labelled_logits
from .ropes import ropes_by_length
from .sinks import Factors

# The same numbers by another order of sums, through all layers of a model; and what a false answer differs by is of
# order 1. Of a half type 8 or 11 bits are left.
MOVED = {torch.float64: 1e-7, torch.float32: 1e-3}
MOVED_HALF = 0.1
NUM_TOKENS = 16  # of a sample, which are enough for all but lengths
LEAST_TOKENS = 4  # of these a labelled one has earlier ones to attend to
LEAST_HALF = 2.0**-10  # 16 times the least normal float16
PROOF_BYTES = 2**30  # of weight gradients at a time


@dataclass
class Soundness:
    """What has been found out about the passes of one model, so that it is asked once.

    Attributes:
        proved: Sites whose D^T X is known to be the gradient of their weight.
        lengths: The shortest and the longest input that is known to make no difference.
        alone: Whether samples have to run uncut, beside samples of their own length only.
    """

    proved: set[Site] = field(default_factory=set)
    lengths: tuple[int, int] | None = None
    alone: bool = False

    def prove(self, model: nn.Module, sites: Sequence[Site], objective: Objective, sample: Sample, name: str) -> None:
        """Check the sites that were not checked before, on the first tokens of a sample that messages call ``name``.

        Raises:
            QkovError: names the projection, or the model, whose passes do not give gradients.
        """
        new = [site for site in sites if site not in self.proved]
        if not new:
            return
        check_weights(model, new)
        ids = torch.from_numpy(_first_tokens(sample)).unsqueeze(0)
        if not self.proved and objective == "causal":
            check_causal(model, ids)
        check_gradients(model, new, _labelled(ids, objective, f"{name} (its first tokens)"))
        self.proved.update(new)

    def see(self, model: nn.Module, samples: Sequence[Sample], objective: Objective) -> None:
        """Find out whether samples of these lengths have to run alone; once they do, they always do."""
        cut = [sequence(sample, objective) for sample in samples]
        longest = max(sample.num_tokens for sample in samples)
        shortest = min(cut, key=lambda s: len(s.input_ids))
        known = self.lengths or (longest + 1, 0)
        if self.alone or (known[0] <= len(shortest.input_ids) and longest <= known[1]):
            return
        self.alone = depends_on_length(model, shortest, longest)
        self.lengths = min(known[0], len(shortest.input_ids)), max(known[1], longest)


def richest(samples: Sequence[Sample]) -> Sample:
    """The sample to check a model on: where all tokens are alike, no gradient reaches a query or a key."""
    return max(samples, key=lambda sample: len({*sample.input_ids[:NUM_TOKENS].tolist()}))


def _first_tokens(sample: Sample) -> npt.NDArray[np.int64]:
    """The first tokens of a sample; those of a shorter one again and again, as a first token attends to itself only."""
    return np.resize(sample.input_ids[:NUM_TOKENS], min(max(sample.num_tokens, LEAST_TOKENS), NUM_TOKENS))


def check_weights(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise unless each site's weight is its own module's alone.

    Raises:
        QkovError: for a weight that is shared, or has hooks on its gradient.
    """
    sharing = _sharing(model)
    for site in sites:
        module = model.get_submodule(site.module)
        weight = module._parameters.get("weight")
        if weight is None:
            continue  # a quantized linear with parameters of its own
        name = f"{site.module}.weight"
        if others := sharing.get(name):
            raise QkovError(
                name,
                expected="a weight that no other layer uses",
                got=f"one that is also {', '.join(others[:3])}{', …' if len(others) > 3 else ''}",
                remedy="Its gradient is the sum over all its uses, which belongs to no single layer. Choose layers "
                "whose weights are their own (metric.layers; layers of a FisherCollector), or untie them.",
            )
        if weight._backward_hooks:
            raise QkovError(
                name,
                expected="a weight without hooks on its gradient",
                got=f"{len(weight._backward_hooks)} registered with weight.register_hook",
                remedy="Remove them while samples are collected: weights are frozen then, and no such hook runs.",
            )


def _sharing(model: nn.Module) -> dict[str, list[str]]:
    """By name, the other parameters (or other names) whose numbers lie at the same place, where there are any."""
    places = sorted((*_place(parameter), name) for name, parameter in _named_once(model))
    groups: list[list[str]] = []
    on, end = "", 0
    for where, start, stop, name in places:
        if where != on or start >= end:
            groups.append([])
            on, end = where, stop
        groups[-1].append(name)
        end = max(end, stop)
    return {name: [other for other in group if other != name] for group in groups if len(group) > 1 for name in group}


def _named_once(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by each of its names, but those by which a wrapper calls the same module of the same layer.

    A module under the numbers of two layers is used by both.
    """
    known: set[tuple[int, str, tuple[str, ...]]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            key = (id(module), name, tuple(part for part in path.split(".") if part.isdigit()))
            if parameter is not None and key not in known:
                known.add(key)
                yield f"{path}.{name}" if path else name, parameter


def _place(parameter: nn.Parameter) -> tuple[str, int, int]:
    """Where a parameter lies: on which device, and from which byte to which."""
    if hasattr(parameter, "ds_id"):
        return "ZeRO-3", int(parameter.ds_id), int(parameter.ds_id) + 1
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    if local.device.type == "meta" or not local.numel():
        return "object", id(parameter), id(parameter) + 1
    span = 1 + sum((size - 1) * abs(stride) for size, stride in zip(local.shape, local.stride(), strict=True))
    return str(local.device), local.data_ptr(), local.data_ptr() + span * local.element_size()


def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Raise where the last of a few tokens [1, T] changes what is predicted at earlier ones.

    Raises:
        QkovError: names the model.
    """
    other = ids.clone()
    other[0, -1] = next((token for token in ids[0].tolist() if token != ids[0, -1]), 0 if ids[0, -1] else 1)
    rows = torch.cat([ids, other])
    logits = _logits(model, _batch(rows, rows, "row")).view(2, ids.shape[1], -1)[:, :-1]
    if _differ(logits[0], logits[1], _dtype(model)):
        raise QkovError(
            type(model).__name__,
            expected="a causal decoder: the last token changes no earlier output",
            got="earlier outputs that change with it (bidirectional, or a prefix without a causal mask)",
            remedy="Its samples cannot be cut at their last label, nor their tokens be predicted from those before. "
            "Load it as a causal decoder (is_causal, use_bidirectional_attention), or use a masked LM's class.",
        )


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
    tolerance = max(MOVED.get(dtype, MOVED_HALF) for dtype in (factors.x.dtype, factors.d.dtype, weight.dtype))
    deviation, size = float((product - grad).norm()), float(grad.norm())
    if not deviation <= tolerance * max(size, float(product.norm())):
        raise QkovError(
            f"layer {site.layer} ({site.module}.weight)",
            expected="a gradient D^T X, as of a weight that its own module alone uses, as it is",
            got=f"autograd's, which differs from it by {deviation / max(size, 1e-300):.2g} of its norm",
            remedy="Something else reads this weight (an adapter such as DoRA, a custom forward), or changes its "
            "gradient. Merge or remove it, or leave the layer out (metric.layers; layers of a FisherCollector).",
        )


def depends_on_length(model: nn.Module, shortest: Sequenced, longest: int) -> bool:
    """Whether a sample's outputs change when it is padded to the length of the longest.

    Args:
        model: The model; all ranks of a pass call this alike.
        shortest: The sample of fewest tokens, cut where batches would cut it.
        longest: Tokens of the longest sample, uncut.
    """
    if len(shortest.input_ids) == longest:
        return False
    if any(_threshold(rope) < longest for rope in ropes_by_length(model)):
        return True
    alone = make_batch([shortest], [0], [""])
    padded = make_batch([shortest], [0], [""], length=longest)
    return _differ(_logits(model, alone), _logits(model, padded), _dtype(model))


def _threshold(rope: nn.Module) -> int:
    """The longest input of a rope that is as the shortest's; 0 where it does not say."""
    config = getattr(rope, "config", None)
    stated = getattr(config, "rope_parameters", None) or {}
    layers = stated.values() if any(isinstance(value, dict) for value in stated.values()) else [stated]
    limits = [part.get("original_max_position_embeddings") for part in layers if isinstance(part, dict)]
    limits += [getattr(rope, "original_max_seq_len", None)]
    return min((limit for limit in limits if isinstance(limit, int)), default=0)


def _labelled(ids: Tensor, objective: Objective, name: str) -> Batch:
    """A few tokens [1, T], each of them predicted."""
    targets = ids if objective == "masked" else nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    return _batch(ids, targets, name)


def _batch(ids: Tensor, targets: Tensor, name: str) -> Batch:
    """Rows of one length."""
    ones = torch.ones_like(ids)
    return Batch(tuple(range(len(ids))), (name,) * len(ids), ids, ones, targets, ones)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the labelled positions, row after row [labelled, vocabulary], on the CPU."""
    batch = batch.to(input_device(model))
    with evaluating(model), plain_outputs(model), without_graph(), explained_pass(model):
        return labelled_logits(model, batch).cpu()


def _differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two logits of the same positions are different functions, not different sums."""
    one, other = one.double(), other.double()
    size, deviation = (one - one.mean()).norm(), (one - other).norm()
    return bool(deviation > MOVED.get(dtype, MOVED_HALF) * size)  # not so where either is not finite: that has a name


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest type that a pass computes in, as far as it can be told: of weights, or of autocast."""
    device_type = input_device(model).type
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device_type):
        types.add(torch.get_autocast_dtype(device_type))
    return min(types, key=lambda dtype: (dtype.itemsize, dtype != torch.bfloat16), default=torch.float32)
