"""Modes in which a user's model is run, each left as it was found.

Evaluation: no dropout, kernels that gradients can pass. Frozen: no weight learns. Plain outputs: no cache, and an
object with logits. Bare: no hooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .errors import QkovError, is_broken_call
from .memory import is_shortage


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; restore each module's flag afterwards.

    What the user had compiled runs as it is written: compiled code does not look at the hooks inside it again.
    Four-bit linears of bitsandbytes stay in training mode, which changes nothing but the kernel: on CPUs their
    evaluation mode repacks the weights for one that no gradient can pass.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                _unpack(module)
                module.training = True
        with torch.compiler.set_stance("force_eager") if _has_compiled(model) else nullcontext():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _has_compiled(model: nn.Module) -> bool:
    """Whether modules of a model were compiled: in place, by a wrapper, or their ``forward`` alone."""
    return any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter; restore ``requires_grad`` afterwards. Gradients that are there are left alone."""
    _finish_lazy_setup(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _finish_lazy_setup(model: nn.Module) -> None:
    """Have FSDP2 set itself up as it would at its first pass, in which it asks which weights learn, and never again.

    A mixed-precision policy would otherwise take the dtype of gradients from weights that are frozen by us, and the
    user's next training step fail.
    """
    for module in model.modules():  # outermost first: the first to set itself up is the root of those inside it
        find_state = getattr(module, "_get_fsdp_state", None)
        if find_state is not None and (state := find_state())._is_root is None:
            state._lazy_init()


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Have a model return an object with logits, and keep no cache; its configurations are put back."""
    wanted = {"return_dict": True, "use_cache": False}
    configs = {id(config): config for m in model.modules() if hasattr(config := getattr(m, "config", None), "__dict__")}
    before = [(c, name, vars(c)[name]) for c in configs.values() for name in wanted if name in vars(c)]
    try:
        for config, name, _ in before:
            setattr(config, name, wanted[name])
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


@contextmanager
def without_graph() -> Iterator[None]:
    """No gradients, and no word of activation checkpointing that there are none."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        yield


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Run a module without the hooks on it and in it, and without those on all modules."""
    places: list[tuple[Any, str]] = [(owner, name) for owner in module.modules() for name in HOOKS]
    places += [(torch_module, f"_global{name}") for name in HOOKS]
    found = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, hooks in found:
            setattr(owner, name, type(hooks)())
        yield
    finally:
        for owner, name, hooks in found:
            setattr(owner, name, hooks)


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its token ids: with its embeddings, or where accelerate moves these to run.

    Raises:
        QkovError: for a model on the meta device.
    """
    find_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embeddings = find_embeddings() if find_embeddings else None
    source = embeddings if isinstance(embeddings, nn.Module) else model
    device = next((p.device for p in source.parameters()), torch.device("cpu"))
    moved_to = getattr(getattr(source, "_hf_hook", None), "execution_device", None)
    if device.type != "meta":
        return device
    if moved_to is None:
        raise QkovError(
            type(model).__name__,
            expected="weights, to see heads respond",
            got="a model on the meta device",
            remedy="Load the model, or build a small one of the same type, and prove the layout on that.",
        )
    return torch.device(moved_to)


def _unpack(linear: Any) -> None:
    """Undo the repacking of an earlier evaluation: making a state dict does that."""
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        linear.state_dict()


MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)


class ModelError(QkovError):
    """An error that a model raised inside a pass."""


@contextmanager
def explained_pass(model: nn.Module) -> Iterator[None]:
    """Turn what a model raises inside a pass into one message that names it; a lack of memory, and what other ranks
    caused, pass through.
    """
    try:
        yield
    except QkovError:
        raise
    except MODEL_ERRORS as error:
        if is_shortage(error) or (isinstance(error, RuntimeError) and is_broken_call(error)):
            raise
        raise ModelError(
            type(model).__name__,
            expected="a forward and a backward pass of token ids [samples, tokens]",
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            remedy=_remedy(error),
        ) from error


def _remedy(error: Exception) -> str:
    text = str(error).lower()
    if "flexattention" in text.replace("_", ""):
        return (
            "Choose another attention: model.set_attn_implementation('sdpa') or 'eager' "
            "(model.attn_implementation of a configuration)."
        )
    if isinstance(error, AssertionError) and "buffer" in text:  # of deepspeed.runtime.swap_tensor
        return (
            "DeepSpeed reads weights from NVMe ahead of the pass, and has no buffer left for those that it needs: set "
            "stage3_prefetch_bucket_size to 0, or offload_param.buffer_count to more."
        )
    return "The error comes from inside the model (--debug shows where): does it train on this input?"
