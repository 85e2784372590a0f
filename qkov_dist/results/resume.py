"""Layers that the same run finished on other ranks, so that it can go on with these.

Partial scores of W ranks are of no use to another number of ranks, or to W that are cut otherwise, but the sum of all
W is everybody's. Rank 0 adds up every layer that all W ranks finished, into ``carried.h5``; then the old files go
(what is not used up, into a folder of its own). The new ranks take the carried layers over: rank 0 whole, the others
as layers of which they own nothing. Whatever kills this, the same steps lead on: a layer is removed at one place only
after it is on disk at the next. While there is a ``carried.h5``, nothing has been scored since: whatever partial
files lie beside it hold what it holds, and go, whichever ranks' they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from qkov_dist.console import SILENT, Console

from .disk import file_errors
from .hdf5_write import remove_leftovers
from .partial_schema import PartialHeader
from .partials import Partial, PartialWriter, layer_folder, list_partials, partial_path, read_partial, remove_unfinished
from .reduce import add_layers

CARRIED = "carried.h5"


def carry_over(folder: Path, header: PartialHeader, console: Console = SILENT) -> list[int]:
    """Add up what other numbers of ranks finished; returns the layers that ``carried.h5`` has then.

    One process calls this, before any rank opens its partial file.

    Args:
        folder: The output folder; it may not exist yet.
        header: That of rank 0 in this run.
        console: Is told what was found.

    Raises:
        QkovError: for damaged files, and a folder that cannot be written.
    """
    if not folder.is_dir():
        return []
    found = [read_partial(path) for path in list_partials(folder)]
    same = [partial for partial in found if partial.header.run_id == header.run_id]
    path = folder / CARRIED
    others = [partial for partial in same if path.exists() or _ranks(partial.header) != _ranks(header)]
    _remove_empty(folder, header.world_size)
    if not others:
        return sorted(read_partial(path).complete) if path.exists() else []
    first = next((partial.header.extra for partial in others if partial.header.extra), {})
    with PartialWriter(path, replace(header, rank=0, world_size=1, cut="", extra=first)) as writer:
        for ranks in sorted({_ranks(partial.header) for partial in others}):
            of_world = [partial for partial in others if _ranks(partial.header) == ranks]
            for layer in _finished(of_world, ranks[0]):
                if layer not in writer.completed:
                    total = add_layers(partial.read_layer(layer) for partial in of_world)
                    writer.write_layer(layer, total.blocks, total.shared)
        carried = sorted(writer.completed)
    for partial in others:
        _put_away(partial, set(carried))
    worlds = ", ".join(str(n) for n in sorted({partial.header.world_size for partial in others}))
    console.say(f"{len(carried)} layers of this run were finished on {worlds} ranks and are taken over")
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


def remove_run(folder: Path, run_id: str) -> None:
    """Remove a run's partial files, of whichever ranks; those of other runs stay.

    One process calls this, while no rank has its partial file open.

    Raises:
        QkovError: for damaged files, and a folder that cannot be written.
    """
    if not folder.is_dir():
        return
    for partial in map(read_partial, list_partials(folder)):
        if partial.header.run_id == run_id:
            with file_errors(partial.path, OSError):
                if layer_folder(partial.path).is_dir():
                    shutil.rmtree(layer_folder(partial.path))
                partial.path.unlink(missing_ok=True)
    forget(folder)


def forget(folder: Path) -> None:
    """Remove ``carried.h5``, once all ranks have taken over what it holds, or what was to become it."""
    path = folder / CARRIED
    with file_errors(path, OSError):
        if layer_folder(path).is_dir():
            shutil.rmtree(layer_folder(path))
        remove_leftovers(path)
        path.unlink(missing_ok=True)


def _ranks(header: PartialHeader) -> tuple[int, str]:
    """How many ranks there were, and how they were cut: only partial scores of the same add up."""
    return header.world_size, header.cut


def _finished(partials: Sequence[Partial], world_size: int) -> list[int]:
    """Layers that every rank of a world finished."""
    if sorted(partial.header.rank for partial in partials) != list(range(world_size)):
        return []
    return sorted(set.intersection(*(set(partial.complete) for partial in partials)))


def _put_away(partial: Partial, carried: set[int]) -> None:
    """Remove what is carried now; what is not goes where it is in nobody's way, and can be had back."""
    places = [path for path in (layer_folder(partial.path), partial.path) if path.exists()]
    aside = f"unfinished_of_{partial.header.world_size}_ranks"
    with file_errors(partial.path, OSError):
        remove_leftovers(partial.path)
        for path in places:
            if path.is_dir():
                remove_unfinished(path)
            if set(partial.complete) <= carried:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            folders = (path.with_name(f"{aside}_{n}" if n > 1 else aside) for n in count(1))
            free = next(folder for folder in folders if not (folder / path.name).exists())
            free.mkdir(exist_ok=True)
            path.rename(free / path.name)


def _remove_empty(folder: Path, world_size: int) -> None:
    """Remove what ranks that are no more left without finishing a layer; others clear their own folders."""
    needed = [*list_partials(folder), *(partial_path(folder, rank) for rank in range(world_size))]
    with file_errors(folder, OSError):
        for path in set(folder.glob("partial_rank*.layers")) - {layer_folder(path) for path in needed}:
            shutil.rmtree(path)
