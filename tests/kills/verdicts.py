"""What must hold after every kill, after every attempt, and at the end: sentences about what does not, or none."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from attempts import Kill, Outcome
from rounding import passes
from scene import LAYERS

from qkov_dist import Heatmap, load_heatmap
from qkov_dist.distributed.preemption import EXIT_CODE
from qkov_dist.errors import QkovError
from qkov_dist.results.heatmap_file import HEATMAP_FILE
from qkov_dist.results.partials import layer_folder, list_partials, read_partial
from qkov_dist.results.resume import CARRIED

TOLERANCE = passes(layers=len(LAYERS))  # of a block's largest score: sums of float32 in another order
ORDINARY_TOLERANCE = 1e-4  # of other numbers, where ranks sum in another order
P_TOLERANCE = 0.1  # a sum in another order may turn the comparison with a few labellings
NAMES_THE_RUN = "config"  # the one attribute that may differ between runs of one process: it has the folder's name
KILLED, USERS_ERROR = -signal.SIGKILL, 2
NEVER_MET = "ranks to meet"  # what ranks say that wait for one that died before they knew each other


@dataclass(frozen=True)
class Standing:
    """The finished layers in a folder.

    Attributes:
        by_rank: (ranks of the run, rank) -> layers that this rank has finished.
        carried: Layers that were added up for other ranks.
        moving: Whether layers were on their way to other ranks: what a rank finished alone is then put aside.
    """

    by_rank: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    carried: frozenset[int] = frozenset()
    moving: bool = False

    @property
    def whole(self) -> frozenset[int]:
        """Layers that all ranks of one run have finished."""
        found = set(self.carried)
        for num_ranks in {size for size, _ in self.by_rank}:
            ranks = [self.by_rank.get((num_ranks, rank), frozenset()) for rank in range(num_ranks)]
            found |= frozenset.intersection(*ranks)
        return frozenset(found)


def standing(folder: Path) -> Standing:
    """Read every finished layer that there is, against its checksums.

    Raises:
        QkovError: for what cannot be read.
    """
    if not folder.is_dir():
        return Standing()
    by_rank = {}
    for partial in map(read_partial, list_partials(folder)):
        for layer in partial.complete:
            partial.read_layer(layer)
        by_rank[partial.header.world_size, partial.header.rank] = frozenset(partial.complete)
    path, carried = folder / CARRIED, frozenset[int]()
    if path.exists() or any(layer_folder(path).glob("layer_*.h5")):
        carried = frozenset(read_partial(path).complete)
    return Standing(by_rank, carried, path.exists())


def of_ranks(before: Standing, num_ranks: int, *, same_cut: bool) -> dict[int, frozenset[int]]:
    """What each rank had finished, whether or not the others had, and an attempt on so many ranks goes on from.

    Args:
        before: What was there before.
        num_ranks: Of the attempt.
        same_cut: Whether as many ranks were always cut alike; if not, what one of them finished alone is put aside.
    """
    if before.moving or not same_cut:
        return {}
    return {rank: layers for (size, rank), layers in before.by_rank.items() if size == num_ranks}


def folder_faults(
    folder: Path, before: Standing, num_ranks: int, alone: Mapping[int, frozenset[int]], *, partials: bool
) -> Iterator[str]:
    """What an attempt did to finished layers that it must not; ``alone`` is what :func:`of_ranks` says."""
    try:
        now = standing(folder)
    except QkovError as error:
        yield f"a partial file cannot be read: {error}"
        return
    if (folder / HEATMAP_FILE).exists() and not partials:
        return
    if lost := before.whole - now.whole:
        yield f"layers {sorted(lost)} were finished and are no more"
    for rank, layers in alone.items():
        if lost := layers - now.by_rank.get((num_ranks, rank), frozenset()):
            yield f"layers {sorted(lost)} of rank {rank} were finished and are no more"


def work_faults(outcome: Outcome, before: Standing, alone: Mapping[int, frozenset[int]]) -> Iterator[str]:
    """What was scored although it was on disk, or twice."""
    for rank, seen in enumerate(outcome.seen):
        if again := sorted((before.whole | alone.get(rank, frozenset())) & set(seen.scored)):
            yield f"rank {rank} scored layers {again} again, which were finished"
        if twice := [layer for layer, count in Counter(seen.scored).items() if count > 1]:
            yield f"rank {rank} scored layers {twice} twice"


def ending_faults(outcome: Outcome, kill: Kill | None, *, has_heatmap: bool) -> Iterator[str]:
    """What is wrong with how ranks ended."""
    if outcome.hung:
        phases = {rank: outcome.seen[rank].phase for rank in sorted(outcome.hung)}
        yield f"hang of ranks {phases}"
        return
    for rank, said in enumerate(outcome.said):
        if outcome.codes[rank] == 1 or "internal error" in said:
            yield f"rank {rank} ended with {outcome.codes[rank]}: {_last_line(said)}"
    if kill is None or not outcome.struck:
        if not outcome.finished:
            yield f"nobody was killed, but ranks ended with {outcome.codes}: {_last_line(*outcome.said)}"
        return
    yield from _faults_of_struck(outcome, kill)
    dead = [rank for rank in outcome.struck if outcome.codes[rank] == -kill.signal]
    if not dead:
        return
    for rank in sorted(set(range(len(outcome.codes))) - outcome.struck):
        code, said = outcome.codes[rank], outcome.said[rank]
        if code == 0 and has_heatmap:
            continue
        if code != USERS_ERROR or not (_names(said, dead) or NEVER_MET in said):
            yield f"rank {rank} ended with {code} and does not name rank {dead}: {_last_line(said)}"


def _names(said: str, ranks: Sequence[int]) -> bool:
    """Whether what a rank said names one of some ranks; how it calls itself does not count."""
    of_others = re.sub(r"^qkov: rank \d+: |seen by rank \d+", "", said, flags=re.MULTILINE)
    return any(re.search(rf"\branks? ([0-9, ]*\b)?{rank}\b", of_others) for rank in ranks)


def _faults_of_struck(outcome: Outcome, kill: Kill) -> Iterator[str]:
    """A rank that was killed is dead; one that was asked to stop where it may, stops with all others."""
    codes = {rank: outcome.codes[rank] for rank in sorted(outcome.struck)}
    if kill.signal == signal.SIGKILL:
        if KILLED not in codes.values() and not outcome.finished:  # it may have ended just then
            yield f"SIGKILL, but ranks ended with {outcome.codes}"
        return
    asked = [rank for rank in codes if outcome.seen[rank].told]
    if asked and len(asked) == len(codes) and set(outcome.codes) != {EXIT_CODE}:
        yield f"SIGTERM while it may be answered, but ranks ended with {outcome.codes}: {_last_line(*outcome.said)}"
    if wrong := {rank: code for rank, code in codes.items() if code not in (EXIT_CODE, 0, -kill.signal, USERS_ERROR)}:
        yield f"SIGTERM, but ranks ended with {wrong}"


def leftovers(folder: Path, num_ranks: int, *, partials: bool) -> Iterator[str]:
    """What a finished run leaves besides its results; ``num_ranks`` wrote them."""
    allowed = {HEATMAP_FILE, "report.html", *(f"partial_rank{rank:05d}.h5" for rank in range(num_ranks) if partials)}
    for path in sorted(folder.iterdir()):
        if path.name not in allowed and not re.fullmatch(r"unfinished_of_\d+_ranks(_\d+)?", path.name):
            yield f"{path.name} is left over"


def heatmap_faults(path: Path, reference: Path, *, same_bits: bool) -> Iterator[str]:
    """What is wrong with a heatmap: that it cannot be read, or is not the undisturbed run's."""
    try:
        found = load_heatmap(path)
    except QkovError as error:
        yield f"half a heatmap: {error}"
        return
    yield from _bit_faults(path, reference) if same_bits else _value_faults(found, load_heatmap(reference))


def deviation(path: Path, reference: Path) -> float:
    """Largest deviation of a score, as a share of its block's largest."""
    found, expected = load_heatmap(path), load_heatmap(reference)
    return max(_share(found.cross[block], expected.cross[block]) for block in expected.blocks)


def _bit_faults(path: Path, reference: Path) -> Iterator[str]:
    found, expected = (_content(file) for file in (path, reference))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"{name} is not bit for bit that of an undisturbed run"


def _content(path: Path) -> dict[str, bytes]:
    """Every dataset and attribute as bytes; references among datasets are places in the file, and are left out."""
    content: dict[str, bytes] = {}

    def see(name: str, item: Any) -> None:
        for key, value in item.attrs.items():
            if key not in ("DIMENSION_LIST", "REFERENCE_LIST") and (name, key) != ("", NAMES_THE_RUN):
                content[f"attribute {key} of /{name}"] = repr((getattr(value, "dtype", ""), value)).encode()
        if isinstance(item, h5py.Dataset):
            content[f"/{name}"] = repr((item.dtype, item.shape)).encode() + item[()].tobytes()

    with h5py.File(path, "r") as file:
        see("", file)
        file.visititems(see)
    return content


def _value_faults(found: Heatmap, expected: Heatmap) -> Iterator[str]:
    """Scores to a share of the block's largest; what follows from them, as ranks that sum in another order allow."""
    if (found.run_id, found.layers, found.heads, found.blocks) != (
        expected.run_id, expected.layers, expected.heads, expected.blocks
    ):  # fmt: skip
        yield "the heatmap is of another run, or has other axes"
        return
    for block in expected.blocks:
        if not (share := _share(found.cross[block], expected.cross[block])) <= TOLERANCE:
            yield f"{block}: scores are off by {share:.1e} of the largest"
        if not np.array_equal(found.present[block], expected.present[block]):
            yield f"{block}: other heads are present"
        for key, values in expected.fisher[block].items():
            if not np.allclose(found.fisher[block][key], values, rtol=ORDINARY_TOLERANCE, atol=ORDINARY_TOLERANCE):
                yield f"{block}: the Fisher's {key} is off"
        p_values = (heatmap.tests[block]["p_value"] for heatmap in (found, expected))
        if not np.allclose(*p_values, rtol=0, atol=P_TOLERANCE):
            yield f"{block}: p-values are off"
    for mine, theirs in ((found.samples_a, expected.samples_a), (found.samples_b, expected.samples_b)):
        if mine.ids != theirs.ids or not np.allclose(mine.losses, theirs.losses, rtol=ORDINARY_TOLERANCE):
            yield "the samples are others"


def _share(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _last_line(*said: str) -> str:
    """What a rank said last, or the first of several that said anything."""
    lines: Sequence[str] = [line for text in said for line in text.splitlines()[-1:]]
    return " | ".join(lines)[:1500]
