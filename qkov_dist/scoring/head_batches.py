"""Heads that are worked on together: on a GPU, as many of one shape as fill it; on a CPU, one by one, or a few that a
compiled kernel is asked for in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .tiles import Tile


@dataclass(frozen=True)
class HeadBatch:
    """The tiles of some heads of one block in one projection, cut alike.

    Attributes:
        heads: Each head's tiles, in order; tiles at one place are of one shape.
    """

    heads: tuple[tuple[Tile, ...], ...]

    @property
    def first(self) -> Tile:
        """Any tile, of which block and projection are those of all."""
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
    def one_by_one(self) -> Iterator[HeadBatch]:
        """Its heads, each a batch."""
        return (HeadBatch((tiles,)) for tiles in self.heads)

    @property
    def largest(self) -> int:
        """Elements of the largest tile."""
        return max(tile.rect.area for tile in self.heads[0])

    def smaller(self) -> list[HeadBatch]:
        """The same tiles as batches of half the heads; those of one head in tiles of half the size."""
        if (middle := len(self.heads) // 2) > 0:
            return [HeadBatch(self.heads[:middle]), HeadBatch(self.heads[middle:])]
        (tiles,), most = self.heads, -(-self.largest // 2)
        return [HeadBatch((tuple(replace(tile, rect=half) for tile in tiles for half in tile.rect.split(most)),))]


def head_batches(
    tiles: Sequence[Tile], max_elements: int, num_samples: int = 0, *, num_heads: int = 1
) -> list[HeadBatch]:
    """Put together the heads of one projection, in the order of the tiles.

    Args:
        tiles: Of one projection.
        max_elements: Elements that the tiles of a batch have together at a time.
        num_samples: A head counts as no fewer elements than this, so that its scores of all pairs are bounded too.
        num_heads: Heads that a batch may have whatever their size.
    """
    heads: dict[tuple[str, int], list[Tile]] = {}
    for tile in tiles:
        heads.setdefault((tile.block, tile.head), []).append(tile)
    found: list[list[tuple[Tile, ...]]] = []
    for of_head in map(tuple, heads.values()):
        if (
            found
            and _alike(found[-1][0], of_head)
            and (len(found[-1]) < num_heads or _size(of_head, num_samples) * (len(found[-1]) + 1) <= max_elements)
        ):
            found[-1].append(of_head)
        else:
            found.append([of_head])
    return [HeadBatch(tuple(batch)) for batch in found]


def _alike(one: Sequence[Tile], other: Sequence[Tile]) -> bool:
    return _cut(one) == _cut(other)


def _cut(tiles: Sequence[Tile]) -> list[tuple[str, tuple[int, int], bool]]:
    return [(tile.block, tile.rect.shape, tile.bias) for tile in tiles]


def _size(tiles: Sequence[Tile], num_samples: int) -> int:
    return max(num_samples, *(tile.rect.area for tile in tiles))
