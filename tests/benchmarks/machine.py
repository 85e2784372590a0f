"""What the processor can do, beside which scoring is read: the rate of matrix products, and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from device import device, finish, on_gpu

SQUARE = 8192 if on_gpu() else 2048
COPY_BYTES = 2**30 if on_gpu() else 2**28
LEAST_SECONDS = 0.3


def scoring_flops(layer_elements: Sequence[int], num_samples: int, num_tokens: int) -> int:
    """Floating-point operations of scoring: 2 N^2 P for all pairs and 2 T P for the gradients D^T X, in each layer.

    Args:
        layer_elements: P, the elements of the scored projections of each layer.
        num_samples: N, all samples of both tasks.
        num_tokens: T, the tokens of all samples.
    """
    return sum(2 * elements * (num_samples**2 + num_tokens) for elements in layer_elements)


def scoring_bytes(layer_elements: Sequence[int], num_samples: int) -> int:
    """Bytes that a GPU's scoring moves between its memory and its processors for gradients, in float32.

    Each is written as it is formed, read and squared, summed into the Fisher, mapped in place (twice, each once read
    and once written), and read for the products on both sides: ten times.
    """
    return 10 * 4 * num_samples * sum(layer_elements)


def measure_machine(num_samples: int, num_tokens: int, threads: int) -> dict[str, float]:
    """GFLOP/s of matrix products, square and as scoring forms them, and GB/s of memory.

    A CPU is measured on one thread and on all; a GPU also in TF32 and bfloat16.

    Args:
        num_samples: Samples of both tasks.
        num_tokens: Tokens of one sample.
        threads: The most threads.
    """
    shapes = {
        f"square {SQUARE}": (SQUARE, SQUARE, SQUARE),
        "pairs of a head": (num_samples, 64 * 576, num_samples),
        "gradient of a sample": (576, num_tokens, 576),
    }
    if on_gpu():
        found = {f"sgemm {name}": _product_rate(*shape) for name, shape in shapes.items()}
        with _tf32():
            found[f"TF32 square {SQUARE}"] = _product_rate(SQUARE, SQUARE, SQUARE)
        found[f"bfloat16 square {SQUARE}"] = _product_rate(SQUARE, SQUARE, SQUARE, torch.bfloat16)
        return {**found, **_memory_rates()}
    found = {}
    for count in sorted({1, threads}):
        with _threads(count):
            for name, shape in shapes.items():
                found[f"sgemm {name}, {count} threads"] = _product_rate(*shape)
            found.update({f"{name}, {count} threads": rate for name, rate in _memory_rates().items()})
    return found


def _product_rate(rows: int, inner: int, cols: int, dtype: torch.dtype = torch.float32) -> float:
    a, b, out = (
        torch.randn(shape, dtype=dtype, device=device()) for shape in ((rows, inner), (cols, inner), (rows, cols))
    )
    return 2e-9 * rows * inner * cols / _seconds(lambda: torch.mm(a, b.t(), out=out))


def _memory_rates() -> dict[str, float]:
    a, b, c = (torch.ones(COPY_BYTES // 4, device=device()) for _ in range(3))
    copy = _seconds(lambda: a.copy_(b))
    triad = _seconds(lambda: torch.add(b, c, alpha=0.5, out=a))
    return {"copy": 2e-9 * COPY_BYTES / copy, "triad": 3e-9 * COPY_BYTES / triad}


def _seconds(work: Callable[[], object]) -> float:
    """The least of a few timings, each of enough calls; a peak is meant, which a neighbour can only lower."""
    work()
    finish()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < LEAST_SECONDS / 3:
        work()
        finish()
        calls += 1
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        finish()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
