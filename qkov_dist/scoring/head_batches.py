"""Heads that are worked on together: on a GPU, as many of one shape as fill it, of all blocks that read one X.

On a CPU they are worked on one by one, or a few at a time of those that its compiled kernel scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qkov_dist.layout.heads import BLOCKS, Site

from .tiles import Tile

TURNS = 4  # of a worker in a layer, at least, where the kernel scores several heads at a time


@dataclass(frozen=True)
class HeadBatch:
    """The tiles of some heads of one layer, cut alike, in projections that read one X; of one block for the kernel.

    Attributes:
        heads: Each head's tiles, in order; tiles at one place are of one shape, but for the kernel.
        by_kernel: Whether the compiled kernel scores them, which needs no tiles, in place of torch's products.
    """

    heads: tuple[tuple[Tile, ...], ...]
    by_kernel: bool = False

    @property
    def first(self) -> Tile:
        """Any tile, of which the layer is that of all, and whether it belongs to a head."""
        return self.heads[0][0]

    @property
    def first_tiles(self) -> Iterator[Tile]:
        """A tile of each head."""
        return (tiles[0] for tiles in self.heads)

    @property
    def bands(self) -> Iterator[tuple[Tile, ...]]:
        """A tile of each head at a time."""
        return zip(*self.heads, strict=True)

    @property
    def largest(self) -> int:
        """Elements of the largest tile."""
        return max(tile.rect.area for tile in self.heads[0])

    def smaller(self) -> list[HeadBatch]:
        """The same tiles as batches of half the heads; those of one head in tiles of half the size."""
        if (middle := len(self.heads) // 2) > 0:
            return [replace(self, heads=self.heads[:middle]), replace(self, heads=self.heads[middle:])]
        (tiles,), most = self.heads, -(-self.largest // 2)
        halves = tuple(replace(tile, rect=half) for tile in tiles for half in tile.rect.split(most))
        return [replace(self, heads=(halves,))]


def head_batches(tiles: Sequence[Tile], max_elements: int, num_samples: int = 0) -> list[HeadBatch]:
    """Put together the heads of projections that read one X, in the order of the tiles.

    Args:
        tiles: Of these projections.
        max_elements: Elements that the tiles of a batch have together at a time; one head there is always.
        num_samples: A head counts as no fewer elements than this, so that its scores of all pairs are bounded too.
    """
    found: list[list[tuple[Tile, ...]]] = []
    for of_head in _by_head(tiles):
        if (
            found
            and _alike(found[-1][0], of_head)
            and _size(of_head, num_samples) * (len(found[-1]) + 1) <= max_elements
        ):
            found[-1].append(of_head)
        else:
            found.append([of_head])
    return [HeadBatch(tuple(batch)) for batch in found]


def heads_at_a_time(num_heads: int, num_workers: int) -> int:
    """How many of a layer's heads a worker has the kernel score at a time: of several, the rest takes less."""
    return max(num_heads // (TURNS * num_workers), 1)


def kernel_batches(tiles: Sequence[Tile], most: int) -> list[HeadBatch]:
    """Put together the heads of each block of one projection: in as few batches of at most so many heads as there have
    to be, of nearly one size.
    """
    blocks: dict[str, list[tuple[Tile, ...]]] = {}
    for of_head in _by_head(tiles):
        blocks.setdefault(of_head[0].block, []).append(of_head)
    found = []
    for heads in blocks.values():
        size = -(-len(heads) // -(-len(heads) // most))
        found += [HeadBatch(tuple(heads[start : start + size]), by_kernel=True) for start in range(0, len(heads), size)]
    return found


def _by_head(tiles: Sequence[Tile]) -> list[tuple[Tile, ...]]:
    heads: dict[tuple[Site, str, int], list[Tile]] = {}
    for tile in tiles:
        heads.setdefault((tile.site, tile.block, tile.head), []).append(tile)
    return [tuple(of_head) for of_head in heads.values()]


def _alike(one: Sequence[Tile], other: Sequence[Tile]) -> bool:
    return _cut(one) == _cut(other)


def _cut(tiles: Sequence[Tile]) -> list[tuple[tuple[int, int], bool, bool]]:
    return [(tile.rect.shape, tile.bias, tile.block in BLOCKS) for tile in tiles]


def _size(tiles: Sequence[Tile], num_samples: int) -> int:
    return max(num_samples, *(tile.rect.area for tile in tiles))
