"""Which layer each rank scores when, and which layers' factors are kept at a time. Integers only.

A rank scores the layers of which it owns an element, in order. In one round every rank scores one layer, its own next:
so ranks that own different layers work at the same time. A sweep is consecutive rounds whose factors fit; the samples
are run once for each sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from qkov_dist.errors import QkovError

Round = tuple[int | None, ...]


def make_rounds(layers_by_rank: Sequence[Sequence[int]]) -> list[Round]:
    """Each round's layer by rank, None for a rank that is done.

    Args:
        layers_by_rank: What each rank has to score, in order.
    """
    return list(zip_longest(*layers_by_rank))


def layers_of(rounds: Sequence[Round]) -> tuple[int, ...]:
    """The layers of some rounds, in order."""
    return tuple(sorted(layer for layer in set().union(*rounds) if layer is not None))


def gpu_budget(room: int, sizes: Mapping[int, int]) -> int:
    """Bytes of factors that are sure to find a place on a GPU: they go there by whole buffers, each less than a layer.

    Args:
        room: Bytes that may stay there.
        sizes: Bytes of each layer's factors.
    """
    return room if sum(sizes.values()) <= room else max(room - max(sizes.values()), 0)


def make_sweeps(rounds: Sequence[Round], sizes: Mapping[int, int], budget: int, on_gpu: int = 0) -> list[list[Round]]:
    """Cut rounds into sweeps whose layers' factors fit.

    Args:
        rounds: All rounds.
        sizes: Bytes of each layer's factors on the rank that keeps most.
        budget: Bytes that there is room for in memory and on disk.
        on_gpu: Bytes that there is room for on a GPU.

    Raises:
        QkovError: where one round alone does not fit.
    """
    budget += on_gpu
    sweeps: list[list[Round]] = []
    kept: set[int] = set()  # the layers of the last sweep
    for turn in rounds:
        layers = {*layers_of([turn])}
        need = sum(sizes[layer] for layer in layers)
        if need > budget:
            raise QkovError(
                f"{'compute.factor_gpu_mb + ' if on_gpu else ''}compute.factor_memory_mb + compute.factor_disk_mb",
                expected=f"room for the factors of one round of layers, {-(-need // 2**20)} MiB",
                got=f"{budget // 2**20} MiB",
                remedy="Raise one of them, free disk space, or use more ranks or fewer samples.",
            )
        if sweeps and sum(sizes[layer] for layer in kept | layers) <= budget:
            sweeps[-1].append(turn)
            kept |= layers
        else:
            sweeps.append([turn])
            kept = layers
    return sweeps
