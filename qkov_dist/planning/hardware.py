"""Machines that a run may be planned for: facts of the vendors' data sheets, and the CPU at hand, measured.

Rates are dense peaks without sparsity. float32 is that of the ordinary units, for torch does not use TF32 unless told
to; float64 likewise. Links are one direction of what a GPU has to the others of its node. Sizes are decimal, as data
sheets give them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from qkov_dist.errors import QkovError
from qkov_dist.memory import host_memory

TERA, GIGA = 1e12, 1e9
GPU_OVERHEAD = 2**30  # of a GPU's memory: the driver's context, kernels, workspaces of libraries
SIDE, REPEATS = 512, 2  # of the matrices that a CPU is measured with; of all that is timed
COPIED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Hardware:
    """What one rank has.

    Attributes:
        name: What it is called.
        memory: Bytes beside the processor: a GPU's own, or the host's.
        rates: Operations a second of matrix products, by dtype.
        bandwidth: Bytes a second between processor and memory.
        link: Bytes a second to another rank of the same node.
        is_gpu: Whether it is a GPU, with a host around it.
    """

    name: str
    memory: int
    rates: Mapping[str, float]
    bandwidth: float
    link: float
    is_gpu: bool = True

    def rate(self, itemsize: int) -> float:
        """Operations a second in the floating type of this size."""
        return self.rates[{2: "bfloat16", 4: "float32", 8: "float64"}[itemsize]]


def _gpu(
    name: str, memory_gb: float, tera: tuple[float, float, float], bandwidth_gb: float, link_gb: float
) -> Hardware:
    rates = dict(zip(("bfloat16", "float32", "float64"), (n * TERA for n in tera), strict=True))
    return Hardware(name, int(memory_gb * GIGA), rates, bandwidth_gb * GIGA, link_gb * GIGA)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 40, (312, 19.5, 9.7), 1555, 300),  # SXM, NVLink 3
        _gpu("A100-80", 80, (312, 19.5, 9.7), 2039, 300),
        _gpu("H100", 80, (989.4, 67, 34), 3350, 450),  # SXM, NVLink 4
        _gpu("H200", 141, (989.4, 67, 34), 4800, 450),
        _gpu("MI300X", 192, (1307.4, 163.4, 81.7), 5300, 448),  # seven links of Infinity Fabric
        _gpu("L40S", 48, (362.05, 91.6, 1.43), 864, 32),  # PCIe 4; float64 at 1/64 of float32
    )
}
NAMES = (*GPUS, "cpu")


def hardware(name: str) -> Hardware:
    """A machine by name; ``cpu`` is this one, measured now.

    Raises:
        QkovError: for an unknown name.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() == "cpu":
        return measured_cpu()
    if name.lower() not in known:
        remedy = "Choose one of these; --gpu-memory alone checks whether the run fits."
        raise QkovError("--hardware", expected=f"one of {', '.join(NAMES)}", got=repr(name), remedy=remedy)
    return known[name.lower()]


def this_hardware() -> Hardware | None:
    """What this process would run on; None for a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return measured_cpu()
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    alike = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] in name.replace(" ", "")]
    return min(alike, key=lambda gpu: abs(gpu.memory - memory), default=None)


@cache
def measured_cpu() -> Hardware:
    """This machine's processor, from a short product of matrices in each type and a copy; measured once."""
    rates = {name: _product_rate(getattr(torch, name)) for name in ("bfloat16", "float32", "float64")}
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    seconds = shortest(lambda: target.copy_(source))
    bandwidth = 2 * COPIED_BYTES / seconds
    return Hardware("cpu", host_memory(), rates, bandwidth, link=bandwidth / 2, is_gpu=False)


def _product_rate(dtype: torch.dtype) -> float:
    left = torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / shortest(lambda: left @ left)


def shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few repetitions; the first warms up."""
    work()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
