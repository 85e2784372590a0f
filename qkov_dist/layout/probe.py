"""Nudge a slice of an attention layer and watch the input of its output projection.

One short forward records what each attention module is called with; afterwards only that module runs again, with one
slice nudged, so that a probe of a deep model costs little more than one of its layers. Where weights are sharded the
module cannot run alone and the whole model runs instead. Every nudge is a context manager that restores what it found.

A norm over all heads (olmo2) would carry a nudge from one head to the others through their common scale. While probing,
such norms are replaced by the elementwise factor output / input of the unperturbed run: the same function at that
point, and one that keeps heads apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkov_dist.errors import QkovError
from qkov_dist.modes import evaluating, explained_pass, input_device, plain_outputs, without_graph

from .heads import AttentionLayer, Projection
from .modules import text_config
from .rects import Rect
from .weights import changed, is_sharded, region_of

NUM_TOKENS = 8


Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode without caches, gradients and autocast; all is put back.

    Autocast would read weights that it has cast before, and not see that they are nudged.

    Raises:
        QkovError: for weights that cannot be changed, or used for gradients, at all.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise QkovError(
            type(model).__name__,
            expected="weights that gradients can pass",
            got="weights made inside torch.inference_mode",
            remedy="Load the model outside inference_mode.",
        )
    device_type = input_device(model).type
    with evaluating(model), plain_outputs(model), without_graph(), torch.autocast(device_type, enabled=False):
        yield


def probe_tokens(model: nn.Module, seed: int) -> Tensor:
    """Random token ids [1, NUM_TOKENS] from the upper part of the vocabulary, where special tokens are rare."""
    vocab = getattr(text_config(model), "vocab_size", None)
    if not isinstance(vocab, int):
        raise QkovError(
            type(model).__name__,
            expected="a config with a vocab_size",
            got=repr(vocab),
            remedy="Set model.config.vocab_size: the proof runs a few random tokens.",
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab // 4, vocab, (1, NUM_TOKENS), generator=generator)
    return ids.to(input_device(model))


def record_calls(model: nn.Module, layers: Sequence[AttentionLayer], tokens: Tensor) -> dict[int, Call]:
    """Layer number -> the arguments of its attention module in one forward (of its first call).

    Raises:
        QkovError: for a layer whose attention module was not called.
    """
    calls: dict[int, Call] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(index, copied((args, kwargs)))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = model.get_submodule(layer.module)
            stack.enter_context(_removing(module.register_forward_pre_hook(keep(layer.index), with_kwargs=True)))
        with explained_pass(model):
            model(tokens)
    for layer in layers:
        if layer.index not in calls:
            raise QkovError(
                layer.module,
                expected="an attention module that the forward calls",
                got="no call in a forward of a few tokens",
                remedy="Register a layout that names the module the model runs (register_layout(..., attention=...)).",
            )
    return calls


@dataclass(frozen=True)
class Probe:
    """One attention layer, ready to run again. ``baseline`` is the unperturbed O-input, float64 [T, columns]."""

    layer: AttentionLayer
    model: nn.Module
    run: Callable[[], None]
    frozen_norms: tuple[tuple[nn.Module, Tensor], ...]
    baseline: Tensor

    def linear(self, projection: Projection) -> nn.Module:
        """The linear of a projection."""
        return self.model.get_submodule(projection.module)

    def response(self, nudge: AbstractContextManager[None]) -> Tensor:
        """Change of the O-input [T, columns] under a nudge, float64 on the CPU; zero where a nudge overflowed."""
        change = _observe(self.run, self.linear(self.layer.output), nudge, self.frozen_norms) - self.baseline
        return change if bool(change.isfinite().all()) else torch.zeros_like(change)


def make_probe(model: nn.Module, layer: AttentionLayer, call: Call, tokens: Tensor) -> Probe:
    """Prepare one layer: freeze the norms that couple heads, and observe the unperturbed O-input."""
    attention, output = model.get_submodule(layer.module), model.get_submodule(layer.output.module)
    sharded = any(is_sharded(parameter) for parameter in attention.parameters())

    def run() -> None:
        if sharded:
            model(tokens)
        else:
            args, kwargs = copied(call)
            attention(*args, **kwargs)

    norms = _coupling_norms(attention, run, max(layer.head_dim, layer.v_head_dim))
    baseline = _observe(run, output, nullcontext(), norms)
    if not bool(baseline.isfinite().all()):
        raise QkovError(
            layer.output.module,
            expected="finite activations on a few tokens",
            got="NaN or infinity",
            remedy="Check the checkpoint's weights, or load the model in a wider type (float32 or bfloat16).",
        )
    return Probe(layer, model, run, norms, baseline)


def copied(arguments: Any) -> Any:
    """Arguments of a module, which may change them in place; a tensor's ``clone`` is far quicker than ``deepcopy``."""
    if type(arguments) is tuple:
        return tuple(map(copied, arguments))
    if type(arguments) is dict:
        return {name: copied(value) for name, value in arguments.items()}
    return arguments.clone() if type(arguments) is Tensor else copy.deepcopy(arguments)


def randomized(module: nn.Module, seed: int) -> AbstractContextManager[None]:
    """Give all parameters of a module random values of useful size, for a while."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(parameter: Tensor) -> None:
        noise = torch.randn(parameter.shape, generator=generator)
        near_one = 1 + 0.2 * noise  # a norm's neutral value; a bias may have any
        parameter.copy_(near_one if parameter.ndim < 2 else noise * parameter.shape[-1] ** -0.5)

    return changed(module.parameters(), randomize)


def nudge_weight(linear: nn.Module, projection: Projection, rect: Rect, noise: Tensor) -> AbstractContextManager[None]:
    """Add ``noise`` [rows, columns] to a rectangle of a plain weight, for a while."""
    return changed([region_of(linear, projection, rect)], lambda region: region.add_(noise.to(region)))


@contextmanager
def nudge_rows(linear: nn.Module, num_rows: int, position: int, delta: Tensor) -> Iterator[None]:
    """Add ``delta`` [num_rows], in units of the output's RMS, to the output of a linear at one position.

    Raises:
        QkovError: where the linear returns only a part of its rows (tensor parallelism).
    """

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output with the nudge; the units are its own."""
        if output.shape[-1] != num_rows:
            raise QkovError(
                type(linear).__name__,
                expected=f"an output of {num_rows} features",
                got=f"{output.shape[-1]}",
                remedy="Prove the layout on an unsharded model of the same type, before tensor parallelism.",
            )
        nudged = output.clone()
        unit = float(output.float().pow(2).mean().sqrt()) or 1.0
        nudged.view(-1, num_rows)[position] += (unit * delta).to(output)
        return nudged

    with _removing(linear.register_forward_hook(add)):
        yield


def _observe(
    run: Callable[[], None],
    output: nn.Module,
    nudge: AbstractContextManager[None],
    frozen_norms: Sequence[tuple[nn.Module, Tensor]],
) -> Tensor:
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().to("cpu", torch.float64).reshape(-1, args[0].shape[-1]))

    with ExitStack() as stack:
        for norm, factor in frozen_norms:
            stack.enter_context(_removing(norm.register_forward_hook(_scaling(factor))))
        stack.enter_context(_removing(output.register_forward_pre_hook(watch)))
        stack.enter_context(nudge)
        run()
    return seen[0]


def _coupling_norms(
    attention: nn.Module, run: Callable[[], None], head_dim: int
) -> tuple[tuple[nn.Module, Tensor], ...]:
    """Norms over more than one head, each with its elementwise factor at the unperturbed run."""
    factors: dict[nn.Module, Tensor] = {}

    def keep(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and args[0].shape[-1] > head_dim and norm not in factors:
            factors[norm] = torch.where(args[0] == 0, torch.zeros_like(output), output / args[0])

    with ExitStack() as stack:
        for module in attention.modules():
            if "norm" in type(module).__name__.lower() and not next(module.children(), None):
                stack.enter_context(_removing(module.register_forward_hook(keep)))
        run()
    return tuple(factors.items())


def _scaling(factor: Tensor) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] * factor if args[0].shape == factor.shape else output

    return hook


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
