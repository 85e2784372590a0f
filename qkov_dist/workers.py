"""Who computes: one worker for each thread of a CPU, one for a GPU; each keeps its buffers.

Matrix products on tiles that fit a core's cache scale better as one thread each than as one product on all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .kernel import Buffers
from .numerics import products_as

Submit = Callable[..., Callable[[], Any]]


@contextmanager
def workers(device: torch.device, matmul_precision: str = "highest") -> Iterator[Submit]:
    """Start workers for as long as the block lasts.

    On a CPU the caller has one thread in the meantime: threads of its own, which wait for work by spinning, would take
    the cores from the workers.

    Args:
        device: Where they compute.
        matmul_precision: Of float32 products in the meantime, whatever the process has set.

    Yields:
        ``submit(work, *arguments)``: has a worker call ``work(*arguments, buffers)`` with its own buffers; returns what
        waits for the result (and raises what the work raised).
    """
    num_threads = torch.get_num_threads()
    num_workers = num_threads if device.type == "cpu" else 1
    own = threading.local()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def start() -> None:
        if num_workers > 1:
            torch.set_num_threads(1)
        if stream is not None:
            torch.cuda.set_stream(stream)  # in order with what the caller does there
            torch.zeros((), device=device)  # a thread's first product warns where no other work was before it
        own.buffers = Buffers()

    pool = ThreadPoolExecutor(num_workers, "qkov-worker", start)
    if num_workers > 1:
        torch.set_num_threads(1)
    try:
        with products_as(matmul_precision, device):
            yield lambda work, *arguments: pool.submit(lambda: work(*arguments, own.buffers)).result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what new threads begin with is what was set last
