"""Layers that the same run finished on another number of ranks, so that it can go on with this one.

Partial scores of W ranks are of no use to any other number of ranks, but the sum of all W is everybody's. Rank 0 adds
up every layer that all W ranks finished, into ``carried.h5``; then the old files go (what is not used up, into a folder
of its own). The new ranks take the carried layers over: rank 0 whole, the others as layers of which they own nothing.
Whatever kills this, the same steps lead on: a layer is removed at one place only after it is on disk at the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from .errors import QkovError
from .hdf5_read import file_errors
from .merge import add_layers
from .partial_schema import PartialHeader
from .partials import (
    Partial,
    PartialWriter,
    layer_folder,
    list_partials,
    partial_path,
    read_partial,
    remove_unfinished,
)

CARRIED = "carried.h5"


def carry_over(folder: Path, header: PartialHeader, say: Callable[[str], object]) -> list[int]:
    """Add up what other numbers of ranks finished; returns the layers that ``carried.h5`` has then.

    One process calls this, before any rank opens its partial file.

    Args:
        folder: The output folder; it may not exist yet.
        header: That of rank 0 in this run.
        say: Takes a line about what was found.

    Raises:
        QkovError: for damaged files, and a folder that cannot be written.
    """
    if not folder.is_dir():
        return []
    found = [read_partial(path) for path in list_partials(folder)]
    same = [partial for partial in found if partial.header.run_id == header.run_id]
    others = [partial for partial in same if partial.header.world_size != header.world_size]
    path = folder / CARRIED
    _remove_empty(folder, header.world_size)
    if not others:
        return sorted(read_partial(path).complete) if _is_there(path) else []
    first = next((partial.header.extra for partial in others if partial.header.extra), {})
    with PartialWriter(path, replace(header, rank=0, world_size=1, extra=first)) as writer:
        for world_size in sorted({partial.header.world_size for partial in others}):
            of_world = [partial for partial in others if partial.header.world_size == world_size]
            for layer in _finished(of_world, world_size):
                if layer not in writer.completed:
                    total = reduce(lambda a, b: add_layers([a, b]), (p.read_layer(layer) for p in of_world))
                    writer.write_layer(layer, total.blocks, total.shared)
        carried = sorted(writer.completed)
    for partial in others:
        _put_away(partial, set(carried))
    worlds = ", ".join(str(n) for n in sorted({partial.header.world_size for partial in others}))
    say(f"{len(carried)} layers of this run were finished on {worlds} ranks and are taken over")
    return carried


def take_over(folder: Path, layers: Sequence[int], writer: PartialWriter, *, whole: bool) -> None:
    """Record carried layers in a rank's partial file: with their scores, or as layers of which it owns nothing."""
    missing = [layer for layer in layers if layer not in writer.completed]
    if not missing:
        return
    carried = read_partial(folder / CARRIED)
    if not writer.header.extra:
        writer.header = replace(writer.header, extra=carried.header.extra)
    for layer in missing:
        part = carried.read_layer(layer) if whole else None
        writer.write_layer(layer, part.blocks if part else {}, part.shared if part else {})


def forget(folder: Path) -> None:
    """Remove ``carried.h5``, once all ranks have taken over what it holds."""
    with file_errors(folder / CARRIED, OSError):
        (folder / CARRIED).unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    return path.exists() or layer_folder(path).is_dir()


def _finished(partials: Sequence[Partial], world_size: int) -> list[int]:
    """Layers that every rank of a world finished."""
    if sorted(partial.header.rank for partial in partials) != list(range(world_size)):
        return []
    return sorted(set.intersection(*(set(partial.complete) for partial in partials)))


def _put_away(partial: Partial, carried: set[int]) -> None:
    """Remove what is carried now; what is not goes where it is in nobody's way, and can be had back."""
    places = [path for path in (layer_folder(partial.path), partial.path) if path.exists()]
    aside = partial.path.parent / f"unfinished_of_{partial.header.world_size}_ranks"
    with file_errors(partial.path, OSError):
        for path in places:
            if path.is_dir():
                remove_unfinished(path)
            if set(partial.complete) <= carried:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            aside.mkdir(exist_ok=True)
            if (target := aside / path.name).exists():
                remedy = "Move this folder away, and start again."
                raise QkovError(str(target), expected="no file there", got="one of an earlier run", remedy=remedy)
            path.rename(target)


def _remove_empty(folder: Path, world_size: int) -> None:
    """Remove what ranks that are no more left without finishing a layer; others clear their own folders."""
    needed = [*list_partials(folder), *(partial_path(folder, rank) for rank in range(world_size))]
    with file_errors(folder, OSError):
        for path in set(folder.glob("partial_rank*.layers")) - {layer_folder(path) for path in needed}:
            shutil.rmtree(path)
