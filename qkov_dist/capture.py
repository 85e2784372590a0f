r"""One forward and one backward pass that leave the factors of every per-sample gradient.

For a linear map Y = X W^T the gradient of one sample's loss is

    dL/dW = D^T X,    X [T, in] its input,    D = dL/dY [T, out],

and that of its bias is the column sum of D. Forward hooks see X, tensor hooks on Y see D; the product is left to
whoever needs a slice of it. Weights are frozen, so no weight gradient is formed: the graph starts at the outputs of the
lowest projections asked for (or at the input embeddings where activation checkpointing needs it to pass every layer).
The loss is the *sum* over the batch of each sample's own loss, so row n of D belongs to sample n alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batches import Batch
from .errors import QkovError
from .finite import NonFiniteGradientError, all_finite, check_finite, total
from .losses import check_losses, sample_losses
from .modes import evaluating, frozen
from .shards import local_part

FP16_LOSS_SCALES = (2.0**14, 2.0**10, 2.0**6, 1.0)


@dataclass(frozen=True, order=True)
class Site:
    """A projection whose factors are captured: its layer and its module path."""

    layer: int
    module: str


@dataclass(frozen=True)
class Factors:
    """What one batch leaves at one site: X [tokens, in] and D [tokens, out] of the real tokens, sample after sample.

    ``x_site`` is the first site of the layer that was handed this very input: q, k and v share one X.
    """

    site: Site
    x_site: Site
    x: Tensor
    d: Tensor


class FactorSink(Protocol):
    """Where factors go as the backward pass produces them."""

    def add(self, factors: Factors) -> None:
        """Take one site's factors of the current batch."""


@dataclass(frozen=True)
class _Input:
    """X as a projection saw it: whose it was first, the tensor, and its version then."""

    x_site: Site
    x: Tensor
    version: int


@dataclass
class _Pass:
    """What the hooks share during one batch; ``sums`` are those of what was seen, where it is checked at the end."""

    batch: Batch
    real_tokens: Tensor | None
    sink: FactorSink
    loss_scale: float
    sums: list[Tensor] | None = None
    inputs: dict[Site, _Input] = field(default_factory=dict)
    finished: set[Site] = field(default_factory=set)
    in_backward: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding among them."""
        return self.batch.attention_mask.numel()

    def real(self, tensor: Tensor) -> Tensor:
        """[N, T, width] to [real tokens, width]."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.real_tokens is None else flat.index_select(0, self.real_tokens)


class Capture:
    """Runs batches through a hooked model; made by :func:`capture`.

    Whether all is finite is asked at each site as it comes. Where ``check_at_end``, a batch is checked once, after its
    backward pass (a GPU would have to be waited for at each site), and run again to name what is not finite.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], loss_reduction: str, loss_factor: float, check_at_end: bool
    ) -> None:
        self._model, self._sites = model, tuple(sites)
        self._reduction, self._factor = loss_reduction, loss_factor
        self._check_at_end = check_at_end
        self._current: _Pass | None = None

    def run(self, batch: Batch, sink: FactorSink) -> Tensor:
        """Pass one batch through the model and hand each site's factors to ``sink``, last layer first.

        Returns:
            Each sample's own loss (reduced over its own labelled tokens), float32 or better, [N], on the CPU.

        Raises:
            QkovError: for a loss or gradient that is not finite (names the sample and the layer), or a projection
                that the forward pass did not reach.
        """
        if torch.is_inference_mode_enabled():
            raise QkovError(
                "capture",
                expected="a graph for gradients",
                got="torch.inference_mode",
                remedy="Leave inference_mode while samples are collected (no_grad does no harm).",
            )
        first = next(self._model.parameters())
        batch = batch.to(first.device)
        if not any(p.dtype == torch.float16 for p in self._model.parameters()):
            return self._run(batch, sink, 1.0, self._check_at_end)
        for scale in FP16_LOSS_SCALES:
            held = _Held(sink)
            try:
                losses = self._run(batch, held, scale)
            except NonFiniteGradientError:
                if scale == FP16_LOSS_SCALES[-1]:
                    raise
                continue
            held.release()
            break
        return losses

    def _run(self, batch: Batch, sink: FactorSink, loss_scale: float, check_at_end: bool = False) -> Tensor:
        real = batch.attention_mask.reshape(-1).nonzero().squeeze(1)
        whole = real.numel() == batch.attention_mask.numel()
        self._current = state = _Pass(batch, None if whole else real, sink, loss_scale, [] if check_at_end else None)
        try:
            with torch.enable_grad():
                losses = sample_losses(self._model, batch, self._reduction)
                check_losses(losses, batch)
                if not losses.requires_grad:
                    raise _not_reached(self._sites)
                state.in_backward = True
                (losses.sum() * (self._factor * loss_scale)).backward()  # type: ignore[no-untyped-call]
        finally:
            self._current = None
        if missing := set(self._sites) - state.finished:
            raise _not_reached(sorted(missing))
        if not all_finite(state.sums or ()):
            self._run(batch, Nowhere(), loss_scale)  # raises, unless it was a sum alone that overflowed
        return (losses.detach() * self._factor).cpu()

    def _on_forward(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        state = self._current
        if state is None or not torch.is_grad_enabled():
            return None
        if site not in state.inputs:
            x = local_part(args[0] if args else next(iter(kwargs.values())), state.num_tokens, site.module)
            state.inputs[site] = _input_of(site, x, state.inputs)
        elif not state.in_backward:
            raise _called_twice(site)
        root = not output.requires_grad
        if root:
            output = output.detach().requires_grad_()
        output.register_hook(lambda d: self._on_gradient(site, d))  # type: ignore[no-untyped-call]
        return output.clone() if root else None

    def _on_gradient(self, site: Site, d: Tensor | None) -> None:
        state = self._current
        if state is None or site in state.finished or d is None:  # None: cut off by a kernel without a gradient
            return
        known = state.inputs[site]
        if known.x._version != known.version:
            raise _changed_in_place(site)
        d = state.real(local_part(d, state.num_tokens, site.module))
        d = d if state.loss_scale == 1.0 and d.dtype != torch.float16 else d.float() / state.loss_scale
        factors = Factors(site, known.x_site, state.real(known.x.detach()), d)
        if state.sums is None:
            check_finite(_looked_at(factors), state.batch, f"layer {site.layer} ({site.module})")
        else:
            state.sums += map(total, _looked_at(factors).values())
        state.finished.add(site)
        state.sink.add(factors)


def _input_of(site: Site, x: Tensor, known: dict[Site, _Input]) -> _Input:
    """Find which site of the layer was handed this very tensor first, or another view of it (as under ZeRO-3)."""
    first = next((s for s, other in known.items() if s.layer == site.layer and _is_same(other.x, x)), site)
    return _Input(first, x, x._version)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers at one place; both are alive, so that a place is never reused."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and one._version == other._version
    )


class Nowhere:
    """Takes the factors of a pass that is made for something else."""

    def add(self, factors: Factors) -> None:
        """Drop them."""


class _Held:
    """Keeps a batch's factors until the whole backward pass proved finite."""

    def __init__(self, sink: FactorSink) -> None:
        self._sink = sink
        self._held: list[Factors] = []

    def add(self, factors: Factors) -> None:
        self._held.append(factors)

    def release(self) -> None:
        for factors in self._held:
            self._sink.add(factors)


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    loss_reduction: str = "mean",
    loss_factor: float = 1.0,
    check_at_end: bool = False,
) -> Iterator[Capture]:
    """Hook a model's projections; on leaving, the model is as it was found.

    Args:
        model: A transformers language model, in any mode, with any ``requires_grad``.
        sites: The projections to capture.
        loss_reduction: ``mean`` or ``sum`` over a sample's own labelled tokens.
        loss_factor: Multiplies every loss, and so every gradient.
        check_at_end: Look for what is not finite once a batch, for GPUs; then no other rank may take part in a pass.
    """
    session = Capture(model, sites, loss_reduction, loss_factor, check_at_end)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        for site in sites:
            module = model.get_submodule(site.module)
            stack.callback(module.register_forward_hook(_hook(session, site), with_kwargs=True).remove)
        if _recomputes(model):
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embeddings.register_forward_hook(_root_hook).remove)
        yield session


def _hook(session: Capture, site: Site) -> Callable[..., Tensor | None]:
    return lambda _module, args, kwargs, output: session._on_forward(site, args, kwargs, output)


def _root_hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    return output.detach().requires_grad_().clone()


def _recomputes(model: nn.Module) -> bool:
    """Whether anything in the model may run again in the backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) or "Checkpoint" in type(m).__name__ for m in model.modules())


def _looked_at(factors: Factors) -> dict[str, Tensor]:
    """What has to be finite, by name; a shared input is looked at once."""
    shared = factors.site != factors.x_site
    return {"gradient": factors.d} if shared else {"gradient": factors.d, "input": factors.x}


def _called_twice(site: Site) -> QkovError:
    return QkovError(
        site.module,
        expected="one call of the projection in a forward pass",
        got="a second call",
        remedy="A projection shared by several layers is not supported; choose other layers (metric.layers).",
    )


def _changed_in_place(site: Site) -> QkovError:
    return QkovError(
        site.module,
        expected="an input that stays as the projection saw it",
        got="an input changed in place after the call",
        remedy="Replace the in-place operation in the model's forward.",
    )


def _not_reached(missing: Sequence[Site]) -> QkovError:
    return QkovError(
        ", ".join(site.module for site in missing[:4]) + (", …" if len(missing) > 4 else ""),
        expected="a forward and a backward pass through every projection",
        got=f"{len(missing)} projection(s) that the loss does not depend on",
        remedy="Restrict metric.layers to layers that take part, or register the layout that the model really uses.",
    )
