"""Partial files of any number of ranks, checked to be parts of one run, and what each layer's parts add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qkov_dist.distributed.shared_errors import same_on_all, together
from qkov_dist.distributed.world import World
from qkov_dist.errors import QkovError
from qkov_dist.values import written

from .metadata import HeatmapMetadata, LayerAxes, from_json
from .partial_schema import LayerPartial, PartialHeader
from .partials import Partial, list_partials, read_partial
from .reduce import add_layers

Read = Callable[[LayerAxes], LayerPartial]
NUM_LISTED = 8
SAME = ("run_id", "world_size", "cut", "layers", "pooled", "num_tasks", "n_left", "n_right")


@dataclass(frozen=True)
class Source:
    """What one partial file says of itself: whose scores it has, and which layers are there."""

    path: str
    header: PartialHeader
    complete: tuple[int, ...]

    @property
    def missing(self) -> list[int]:
        """Layers that its rank did not finish."""
        return [layer for layer in self.header.layers if layer not in self.complete]


@dataclass(frozen=True)
class Gathered:
    """All partial files of one run.

    Attributes:
        sources: All of them, by rank.
        mine: Those that this process adds.
        metadata: Axes, samples and provenance.
    """

    sources: tuple[Source, ...]
    mine: tuple[Partial, ...]
    metadata: HeatmapMetadata

    @property
    def run_id(self) -> str:
        """The run that wrote them."""
        return self.sources[0].header.run_id

    def reader(self, world: World) -> Read:
        """Reads one layer's sum over this process's files, one file in memory at a time; an error reaches all."""

        def read(layer: LayerAxes) -> LayerPartial:
            return add_layers(partial.read_layer(layer.layer) for partial in self.mine)

        return lambda layer: together(world, lambda: read(layer))


def gather_partials(folder: Path, world: World) -> Gathered:
    """Find the partial files of a folder and divide them among the processes. No scores are read.

    Raises:
        QkovError: on every rank, for files that are missing, damaged, unfinished or of different runs.
    """
    paths = together(world, lambda: list_partials(folder))
    same_on_all(world, str(folder), {"partial files": [path.name for path in paths]})
    first = together(world, lambda: read_partial(paths[0]).header.extra if paths and world.rank == 0 else None)
    mine = together(world, lambda: tuple(map(_without_extra, paths[world.rank :: world.size])))
    sources = _sources(world, mine)
    together(world, lambda: check_sources(folder, sources))
    metadata = world.all_gather(first)[0]
    return Gathered(sources, mine, together(world, lambda: _metadata(metadata, sources[0])))


def _without_extra(path: Path) -> Partial:
    """A partial file without the description of all samples, which each of them has."""
    found = read_partial(path)
    return replace(found, header=replace(found.header, extra={}))


def _metadata(raw: Mapping[str, Any], source: Source) -> HeatmapMetadata:
    """The metadata in a partial file, proved to be that of its scores."""
    metadata, header = from_json(raw, source.path), source.header
    sizes, num = metadata.sizes, sum(metadata.sizes)
    told = (num, num) if metadata.pooled or len(sizes) > 2 else (sizes[0], sizes[1])
    wanted = (header.n_left, header.n_right, header.pooled, header.num_tasks)
    if (*told, metadata.pooled, len(sizes)) != wanted:
        raise QkovError(
            source.path,
            expected=f"a description of the samples of {header.n_left} x {header.n_right} scores",
            got=f"one of {told[0]} x {told[1]}",
            remedy="Use a partial file that `qkov run` wrote.",
        )
    return metadata


def check_sources(folder: Path, sources: Sequence[Source]) -> None:
    """Prove that partial files are all those of one run, every rank and layer once.

    Raises:
        QkovError: for no file at all, another run among them, a rank that is missing or there twice, or missing layers.
    """
    if not sources:
        raise QkovError(
            str(folder),
            expected="partial files partial_rankNNNNN.h5 with finished layers",
            got="none",
            remedy="Give the output.dir of a `qkov run` with output.partials=true.",
        )
    first = sources[0]
    for source in sources:
        for name in SAME:
            wanted, found = getattr(first.header, name), getattr(source.header, name)
            if wanted != found:
                raise QkovError(
                    f"{source.path}: {name}",
                    expected=f"{wanted!r}, as in {Path(first.path).name}",
                    got=repr(found),
                    remedy="Keep the partial files of one run, started with one number of ranks, in a folder.",
                )
    _check_ranks(folder, [source.header.rank for source in sources], first.header.world_size)
    if unfinished := [source for source in sources if source.missing]:
        listed = [f"layers {source.missing} of rank {source.header.rank}" for source in unfinished[:NUM_LISTED]]
        more = f", and of {len(unfinished) - NUM_LISTED} more ranks" if len(unfinished) > NUM_LISTED else ""
        raise QkovError(
            str(folder),
            expected=f"all {len(first.header.layers)} layers from each of {len(sources)} ranks",
            got=f"no {', '.join(listed)}{more}",
            remedy="`qkov run` with the same configuration and output.resume=true goes on from what is there.",
        )


def _check_ranks(folder: Path, ranks: Sequence[int], world_size: int) -> None:
    missing = sorted(set(range(world_size)) - set(ranks))
    twice = sorted(rank for rank, times in Counter(ranks).items() if times > 1)
    if missing or twice:
        raise QkovError(
            str(folder),
            expected=f"one partial file of each of {world_size} ranks",
            got=f"none of ranks {written(missing)}" if missing else f"two of ranks {twice}",
            remedy="Collect them from the nodes' own disks, or run `qkov run` with the same configuration and as many "
            "ranks: it goes on from what is there."
            if missing
            else "Remove the copies: each would count twice.",
        )


def _sources(world: World, mine: Sequence[Partial]) -> tuple[Source, ...]:
    """All processes' files, by the rank that wrote them."""
    described: list[list[Any]] = [[str(p.path), asdict(p.header), list(p.complete)] for p in mine]
    sources = [
        Source(path, PartialHeader(**{**header, "layers": tuple(header["layers"])}), tuple(complete))
        for part in world.all_gather(described)
        for path, header, complete in part
    ]
    return tuple(sorted(sources, key=lambda source: (source.header.rank, source.path)))
