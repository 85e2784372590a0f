"""How a GPU copies while it computes: factors come on a stream of their own, results go into pinned memory; none waits.

    own stream      factors of the next projection: sent by other ranks, copied from the host, converted, padded
    computing       gradients, Fisher, maps, scores of this one; results copied into pinned memory, behind them an event

The computing stream waits for the factors of a projection alone (an event of the other); the host waits for a
projection's results alone, when they are read. On a CPU everything is there as it is made, and nothing here does more
than hand it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qkov_dist.memory import is_shortage

T = TypeVar("T")


class FactorStream:
    """The stream on which factors come to a device.

    What was done there before, on the stream that is current now, is done before anything of this one.

    Args:
        device: Where heads are scored.
    """

    def __init__(self, device: torch.device) -> None:
        self._own: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._computing: torch.cuda.Stream = torch.cuda.current_stream(device)
            self._own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._own.wait_stream(self._computing)

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each made on this stream; who takes them stays on the one that is current there."""
        iterator = iter(items)
        while True:
            with torch.cuda.stream(self._own):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def ready(self, tensors: Iterable[Tensor]) -> torch.cuda.Event | None:
        """What to wait for before tensors of this stream are computed with, which then keep their memory until done."""
        if self._own is None:
            return None
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._computing)
        made: torch.cuda.Event = self._own.record_event()
        return made

    def close(self) -> None:
        """Have what is done on the computing stream from now on wait for everything of this one."""
        if self._own is not None:
            self._computing.wait_stream(self._own)


def wait_for(event: torch.cuda.Event | None) -> None:
    """Have the current stream wait; the host does not."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


@dataclass(frozen=True)
class OnItsWay:
    """Tensors that a GPU copies into the host's memory by itself; those of a CPU are there.

    Attributes:
        tensors: Where they will be.
        copied: When; None where they are there.
    """

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None = None

    @staticmethod
    def of(*tensors: Tensor) -> OnItsWay:
        """Begin to copy tensors of one device, behind what the current stream does."""
        if not tensors[0].is_cuda:
            return OnItsWay(tensors)
        places = tuple(_pinned_like(tensor) for tensor in tensors)
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor, non_blocking=place.is_pinned())
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return OnItsWay(places, copied)

    def there(self) -> tuple[Tensor, ...]:
        """The tensors in the host's memory, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensors


def _pinned_like(tensor: Tensor) -> Tensor:
    """Memory that a GPU copies into by itself; ordinary memory where the system has no more of it."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
