"""Several batches at a time on a CPU: each by cores of its own, through a copy of the model that shares its weights.

One batch on all cores has them wait for each other in each of its many small operations; batches of their own do not.
A copy has everything of a model but its parameters, so that what a module notes of a pass is of that pass alone, as are
the hooks that watch it. Only models of torch's and transformers' own modules are copied, and only as these are: without
hooks, patched or compiled methods, parametrizations or quantized weights, activation checkpointing, float16, or a rope
that goes by the length of what it sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from qkov_dist.data.batches import Batch, groups_of
from qkov_dist.memory import UnlessShort
from qkov_dist.modes import HOOKS

from .hooks import Capture, recomputes
from .ropes import ropes_by_length
from .sinks import DeferredSink

MOST = 4  # batches at a time: each has activations of its own
PARTS = 16  # of a batch: some may be smaller, down to half, so that none runs alone at the end
WORTH = 10**11  # operations of all passes: fewer take less than about a second
PATCHED = (
    "forward",
    "_old_forward",
    "_hf_hook",
    "parametrizations",
)  # what a module has of its own where it is changed
KNOWN = ("torch", "transformers")
ATTENTION = ("sdpa", "eager")

Running = Callable[[], tuple[Tensor, DeferredSink] | None]  # waits for a batch; None where memory was short
Submit = Callable[[Batch], Running]


def batches_at_once(num_batches: int, num_threads: int, operations: int) -> int:
    """How many batches a CPU runs at a time.

    Args:
        num_batches: All that there are.
        num_threads: Of this process.
        operations: Of all passes, about.
    """
    return max(min(num_batches, num_threads, MOST), 1) if operations >= WORTH else 1


def even_batch_tokens(lengths: Sequence[Sequence[int]], batch_tokens: int, at_once: int) -> int:
    """Padded tokens of a batch, at most ``batch_tokens``, with which so many batches at a time are done first.

    Args:
        lengths: Tokens of each sample of each task; a batch is of one task.
        batch_tokens: The most padded tokens of a batch.
        at_once: How many batches run at a time.
    """

    def longest(tokens: int) -> int:
        """Tokens that go through one of them, at most."""
        loads = [0] * at_once
        for of_task in lengths:
            for group in groups_of(of_task, tokens):
                loads[loads.index(min(loads))] += len(group) * of_task[group[0]]
        return max(loads)

    return min((batch_tokens * part // PARTS for part in range(PARTS, PARTS // 2 - 1, -1)), key=longest)


def sharing_weights(model: nn.Module, num: int) -> list[nn.Module]:
    """So many copies of a model whose parameters are its own; none of one that is not copied, or without room."""
    if num < 1 or not _is_as_made(model):
        return []
    shared = {id(parameter): parameter for parameter in model.parameters()}
    with UnlessShort():
        return [copy.deepcopy(model, {**shared}) for _ in range(num)]
    return []


def _is_as_made(model: nn.Module) -> bool:
    """Whether a model on a CPU is what its library made of it, and keeps nothing from pass to pass."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return (
        attention in ATTENTION
        and all(map(_is_untouched, model.modules()))
        and all(map(_is_plain, model.parameters()))
        and not recomputes(model)
        and not ropes_by_length(model)
    )


def _is_untouched(module: nn.Module) -> bool:
    return (
        type(module).__module__.partition(".")[0] in KNOWN
        and not any(getattr(module, name) for name in HOOKS)
        and not any(name in vars(module) or name in module._modules for name in PATCHED)
        and module._compiled_call_impl is None
    )


def _is_plain(parameter: nn.Parameter) -> bool:
    is_exact = type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id")
    return is_exact and parameter.device.type == "cpu" and parameter.dtype != torch.float16


@contextmanager
def running(sessions: Sequence[Capture]) -> Iterator[Submit]:
    """Have batches run for as long as the block lasts, as many at a time as there are sessions.

    The caller has one thread in the meantime, and each batch its part of the others.

    Yields:
        ``submit(batch)``: begins a batch; returns what waits for its samples' losses and its factors (and raises what
        the pass raised, but for a shortage of memory: what an error of it holds would still be there).
    """
    free: SimpleQueue[Capture] = SimpleQueue()
    for session in sessions:
        free.put(session)

    def run(batch: Batch) -> tuple[Tensor, DeferredSink] | None:
        session, factors = free.get(), DeferredSink()
        try:
            with UnlessShort():
                return session.run(batch, factors), factors
            return None
        finally:
            free.put(session)

    each = max(torch.get_num_threads() // len(sessions), 1)
    with _pool(len(sessions), each, of_caller=1) as pool:
        yield lambda batch: pool.submit(run, batch).result


def both(one: Callable[[], object], other: Callable[[], object]) -> None:
    """Do two things at a time, each with half of the threads; what the first raises comes first."""
    each = max(torch.get_num_threads() // 2, 1)
    with _pool(1, each, of_caller=each) as pool:
        waiting = pool.submit(other)
        one()
        waiting.result()


@contextmanager
def _pool(num: int, each: int, *, of_caller: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads that make passes, of which torch gives each some of its own, and the caller some meanwhile."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(of_caller)
    pool = ThreadPoolExecutor(num, "qkov-passes", torch.set_num_threads, (each,))
    try:
        yield pool
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # also where that is interrupted once more
            torch.set_num_threads(num_threads)  # what new threads begin with is what was set last
