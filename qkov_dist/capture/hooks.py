r"""One forward and one backward pass that leave the factors of every per-sample gradient.

For a linear map Y = X W^T the gradient of one sample's loss is

    dL/dW = D^T X,    X [T, in] its input,    D = dL/dY [T, out],

and that of its bias is the column sum of D. X and Y are seen at the map itself, whatever hooks do before and after it,
and D by a hook on Y; the product is left to whoever needs a slice of it. Weights are frozen, so no weight gradient is
formed: the graph starts at the outputs of the lowest projections asked for (or at the input embeddings where activation
checkpointing needs it to pass every layer).
The loss is the *sum* over the batch of each sample's own loss, so row n of D belongs to sample n alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkov_dist.data.batches import Batch
from qkov_dist.distributed.sharding import local_part
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.linear_map import Forward, watched
from qkov_dist.modes import evaluating, explained_pass, frozen, input_device, plain_outputs

from .finite import all_finite, check_losses
from .losses import sample_losses
from .pass_state import PassState
from .refusals import CALLED_TWICE, NOT_FINITE_ELSEWHERE, not_reached
from .sinks import DeferredSink, FactorSink, Nowhere

FP16_LOSS_SCALES = (2.0**14, 2.0**10, 2.0**6, 1.0)
AnyRank = Callable[[bool], bool]
Inspect = Callable[[Site, nn.Module, Forward, Tensor, Tensor], None]


class Capture:
    """Runs batches through a hooked model; made by :func:`capture`.

    Whether all is finite is asked at each site as it comes. Where ``check_at_end``, a batch is checked once, after its
    backward pass (a GPU would have to be waited for at each site), and run again to name what is not finite.

    Attributes:
        loss_scale: By what the loss of the last batch was multiplied; factors are free of it.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        loss_reduction: str,
        loss_factor: float,
        check_at_end: bool,
        any_rank: AnyRank,
        inspect: Inspect | None,
    ) -> None:
        self._model, self._sites = model, tuple(sites)
        self._reduction, self._factor = loss_reduction, loss_factor
        self._check_at_end, self._any_rank, self._inspect = check_at_end, any_rank, inspect
        self._has_half = any(p.dtype == torch.float16 for p in model.parameters())
        self._current: PassState | None = None
        self.loss_scale = 1.0

    def run(self, batch: Batch, sink: FactorSink) -> Tensor:
        """Pass one batch through the model and hand each site's factors to ``sink``, last layer first.

        Where the pass meets float16, in weights or in what hooks see, the loss is scaled up as far as no gradient
        overflows, on all ranks of the pass alike.

        Returns:
            Each sample's own loss (reduced over its own labelled tokens), float32 or better, [N], on the CPU.

        Raises:
            QkovError: for a loss or gradient that is not finite (names the sample and the layer), a projection that the
                forward pass did not reach, or an error inside the model.
        """
        if torch.is_inference_mode_enabled():
            raise QkovError(
                "capture",
                expected="a graph for gradients",
                got="torch.inference_mode",
                remedy="Leave inference_mode while samples are collected (no_grad does no harm).",
            )
        batch = batch.to(input_device(self._model))
        for scale in FP16_LOSS_SCALES:
            deferred = DeferredSink()
            state, losses = self._forward(batch, sink)
            if not state.is_half:
                return self._backward(state, losses)
            state.sink, state.loss_scale, state.sums = deferred, scale, []
            found = self._backward(state, losses)
            if not self._any_rank(not all_finite(state.sums)):
                deferred.release(sink)
                return found
        return self._name_what_is_not_finite(batch, scale)

    def _forward(self, batch: Batch, sink: FactorSink) -> tuple[PassState, Tensor]:
        rows = batch.kept.reshape(-1).nonzero().squeeze(1)
        whole = rows.numel() == batch.kept.numel()
        sums: list[Tensor] | None = [] if self._check_at_end else None
        state = PassState(batch, None if whole else rows, sink, sums=sums, is_half=self._has_half)
        with self._hooks(state), torch.enable_grad(), explained_pass(self._model):
            losses = sample_losses(self._model, batch, self._reduction)
            check_losses(losses, batch)
        if not losses.requires_grad:
            raise not_reached(self._sites)
        return state, losses

    def _backward(self, state: PassState, losses: Tensor) -> Tensor:
        state.in_backward, self.loss_scale = True, state.loss_scale
        with self._hooks(state), torch.enable_grad(), explained_pass(self._model):
            (losses.sum() * (self._factor * state.loss_scale)).backward()  # type: ignore[no-untyped-call]
        if missing := set(self._sites) - state.finished:
            raise not_reached(sorted(missing))
        if not state.is_half and not all_finite(state.sums or ()):
            self._name_what_is_not_finite(state.batch, 1.0)  # raises, unless it was a sum alone that overflowed
        return (losses.detach() * self._factor).cpu()

    def _name_what_is_not_finite(self, batch: Batch, loss_scale: float) -> Tensor:
        """Run a batch once more, looking at each site: the first that is not finite is named."""
        state, losses = self._forward(batch, Nowhere())
        state.loss_scale, state.sums = loss_scale, None
        found = self._backward(state, losses)
        if state.is_half:
            raise NOT_FINITE_ELSEWHERE.at("gradients")
        return found

    @contextmanager
    def _hooks(self, state: PassState) -> Iterator[None]:
        """Have the hooks work for a batch."""
        self._current = state
        try:
            yield
        finally:
            self._current = None

    def see(self, site: Site, module: nn.Module, forward: Forward, x: Tensor, y: Tensor) -> Tensor | None:
        """Note X, and attach to Y what will see D; returns what goes on in place of a Y that begins the graph."""
        state = self._current
        if state is None:
            return None
        state.is_half |= torch.float16 in (x.dtype, y.dtype)  # also where a reentrant checkpoint runs without a graph
        if not torch.is_grad_enabled():
            return None
        if site not in state.inputs:
            x = local_part(x, state.num_tokens, site.module)
            state.note_input(site, x)
            if self._inspect:
                self._inspect(site, module, forward, x, y)
        elif not state.in_backward:
            raise CALLED_TWICE.at(site.module)
        root = not y.requires_grad
        if root:
            y = y.detach().requires_grad_()
        y.register_hook(lambda d: None if d is None else self._on_gradient(site, d))  # type: ignore[no-untyped-call]
        return y.clone() if root else None

    def _on_gradient(self, site: Site, d: Tensor) -> None:
        """Hand on what is complete with D; a D of None was cut off by a kernel without a gradient."""
        state = self._current
        if state is not None and site not in state.finished:
            with torch.autocast(d.device.type, enabled=False):  # the user's is for the model, not for what is made of D
                state.hand_on(site, d)


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    loss_reduction: str = "mean",
    loss_factor: float = 1.0,
    check_at_end: bool = False,
    any_rank: AnyRank = bool,
    inspect: Inspect | None = None,
) -> Iterator[Capture]:
    """Watch a model's projections; on leaving, the model is as it was found.

    Args:
        model: A transformers language model, in any mode, with any ``requires_grad``.
        sites: The projections to capture.
        loss_reduction: ``mean`` or ``sum`` over a sample's own labelled tokens.
        loss_factor: Multiplies every loss, and so every gradient.
        check_at_end: Look for what is not finite once a batch, for GPUs; then no other rank may take part in a pass.
        any_rank: Whether something holds on any of the ranks that take part in a pass.
        inspect: Called once a batch with each projection, what computes it, its X and its Y.
    """
    session = Capture(model, sites, loss_reduction, loss_factor, check_at_end, any_rank, inspect)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        stack.enter_context(plain_outputs(model))
        for site in sites:
            module = model.get_submodule(site.module)
            stack.enter_context(watched(module, partial(session.see, site, module)))
        if recomputes(model):
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embeddings.register_forward_hook(_root_hook).remove)
        yield session


def _root_hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    return output.detach().requires_grad_().clone()


def recomputes(model: nn.Module) -> bool:
    """Whether anything in the model may run again in the backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) or "Checkpoint" in type(m).__name__ for m in model.modules())
