"""Layer after layer through the workers, who need not wait: what comes next is read, or fetched, while they compute.

    turns -> projections' factors -> batches of heads -> workers -> results, in the order of the turns and the tiles

Two projections are in hand at a time, also where one is the last of a layer and the other the next layer's first. On a
GPU the host waits for one only to read what was found at it, once the next is on its way.

Who computes: one worker for each thread of a CPU, one for a GPU; each keeps its buffers.

Matrix products on tiles that fit a core's cache scale better as one thread each than as one product on all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch

from qkov_dist.capture.numerics import products_as
from qkov_dist.errors import QkovError
from qkov_dist.memory import is_shortage

from .head_batches import HeadBatch, head_batches, heads_at_a_time, kernel_batches
from .settings import Roles, ScoreSettings
from .site_inputs import FactorSource, MemberOrders, SiteFactors, read_sites
from .streams import FactorStream, wait_for
from .tile_gradients import Buffers
from .tiles import LayerTiles, Tile

T = TypeVar("T")
Found = Callable[[], list[T]]  # of a batch, one for each head: begun, and waited for where it is read
Work = Callable[[HeadBatch, SiteFactors, Buffers], Found[T]]


@dataclass(frozen=True)
class Turn:
    """A layer whose turn it is.

    Attributes:
        layer_tiles: The layer.
        tiles: Which of its tiles are worked on.
        source: Where their factors come from.
        by_kernel: The blocks whose weights the compiled kernel scores, where samples fill its lanes.
    """

    layer_tiles: LayerTiles
    tiles: Sequence[Tile]
    source: FactorSource
    by_kernel: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Done(Generic[T]):
    """What came of one projection.

    Attributes:
        layer_tiles: The layer.
        results: A tile of each head, and the head's result, in the order of the tiles.
        is_last: Whether the layer is done with it.
    """

    layer_tiles: LayerTiles
    results: list[tuple[Tile, T]]
    is_last: bool


@dataclass(frozen=True)
class _Started(Generic[T]):
    """One projection that workers have been given."""

    layer_tiles: LayerTiles
    waiting: Sequence[tuple[HeadBatch, Callable[[], list[Found[T]]]]]
    is_last: bool

    def done(self) -> Done[T]:
        """Wait for the workers."""
        results = [
            result
            for batch, wait in self.waiting
            for result in zip(batch.first_tiles, chain.from_iterable(found() for found in wait()), strict=True)
        ]
        return Done(self.layer_tiles, results, self.is_last)


def through_workers(
    turns: Iterable[Turn | None], roles: Roles, settings: ScoreSettings, work: Work[T]
) -> Iterator[Done[T]]:
    """Have ``work`` done for the heads of each projection of each layer.

    The next turn is asked for while the last projection of the one before is worked on; its factors have to be there
    until another is asked for. None in place of a turn says that there is none now, but may be later.

    Raises:
        QkovError, RuntimeError: what a turn or its factors raise (a rank that does not answer is such a case), after
            everything that was begun before is done; what work raises.
    """
    device = torch.device(settings.device)
    num_workers = num_workers_on(device)
    with workers(device, settings.matmul_precision) as submit, closing(FactorStream(device)) as stream:
        errors: list[Exception] = []
        before, start = None, _Start(MemberOrders(roles, settings), work, submit, num_workers, stream)
        for started in stream.of(_until_error(start.all(turns), errors)):
            if before is not None:
                yield before.done()
            before = started
        if before is not None:
            yield before.done()
        if errors:
            raise errors.pop()  # the frame must not hold what holds the frame


def _until_error(items: Iterator[T], errors: list[Exception]) -> Iterator[T]:
    try:
        yield from items
    except (QkovError, RuntimeError) as error:
        errors.append(error)


@dataclass(frozen=True)
class _Start(Generic[T]):
    """Gives the workers one projection after another."""

    orders: MemberOrders
    work: Work[T]
    submit: Submit
    num_workers: int
    stream: FactorStream

    def all(self, turns: Iterable[Turn | None]) -> Iterator[_Started[T] | None]:
        """All projections of all turns; None where there is no turn."""
        for turn in turns:
            if turn is None:
                yield None
            else:
                yield from self._layer(turn)

    def _layer(self, turn: Turn) -> Iterator[_Started[T]]:
        settings, num = self.orders.settings, len(self.orders.roles.members)
        left = len({tile.site for tile in turn.tiles})
        num_heads = len({(tile.block, tile.head) for tile in turn.tiles})
        few = settings.kernel_heads or heads_at_a_time(num_heads, self.num_workers)
        if not left:
            yield _Started(turn.layer_tiles, (), is_last=True)
        for sites, factors in read_sites(turn.tiles, turn.source, self.orders, turn.by_kernel):
            left -= len(sites)
            of_sites = [tile for tile in turn.tiles if tile.site in sites]
            by_kernel = [tile for tile in of_sites if factors.are_packed_for(tile)]
            others = [tile for tile in of_sites if not factors.are_packed_for(tile)]
            batches = kernel_batches(by_kernel, few) + head_batches(others, settings.max_elements(num), num)
            ready = self.stream.ready(factors.tensors)
            waiting = [(batch, self.submit(self._when_ready, ready, batch, factors)) for batch in batches]
            yield _Started(turn.layer_tiles, waiting, is_last=not left)

    def _when_ready(
        self, ready: torch.cuda.Event | None, batch: HeadBatch, factors: SiteFactors, buffers: Buffers
    ) -> list[Found[T]]:
        wait_for(ready)
        return _in_memory(self.orders.settings.warn, self.work, batch, factors, buffers)


def _in_memory(
    warn: Callable[[str], object], work: Work[T], batch: HeadBatch, factors: SiteFactors, buffers: Buffers
) -> list[Found[T]]:
    """Do the work; where its tiles do not fit into memory, for half of the heads, or with tiles of half the size.

    Raises:
        QkovError: where a tile of one element does not fit.
    """
    try:
        return [work(batch, factors, buffers)]
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        buffers.held.clear()
        tile = batch.first
        if len(batch.heads) == batch.largest == 1:
            raise QkovError(
                f"layer {tile.site.layer}, block {tile.block}, head {tile.head}",
                expected="memory for one element of a weight's gradients of all samples",
                got="too little",
                remedy="Use fewer samples, more ranks, or a machine with more memory.",
            ) from error
    what = "half of the heads at a time" if len(batch.heads) > 1 else "tiles of half the size"
    warn(f"out of memory in layer {tile.site.layer}: going on with {what}")
    return [found for part in batch.smaller() for found in _in_memory(warn, work, part, factors, buffers)]


Submit = Callable[..., Callable[[], Any]]


def num_workers_on(device: torch.device) -> int:
    """How many :func:`workers` would be started now."""
    return torch.get_num_threads() if device.type == "cpu" else 1


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
    num_threads, num_workers = torch.get_num_threads(), num_workers_on(device)
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
