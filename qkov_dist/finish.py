"""From every rank's partial layers to one tested ``heatmap.h5``, as the configuration says, layer by layer.

A layer's heads are dealt to the ranks. Each rank is sent all partial scores of its heads, adds them up, has them tested
while the next layer comes, and passes on to rank 0 what the heatmap keeps. A layer that a GPU has whole it has tested
already, while it scored the next (``PairTests``): nothing of it is dealt. Every rank takes the same steps; with one
process nothing is sent.

Of more than two tasks every pair is tested and put together as two are, from its part of the scores of all.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from itertools import combinations
from pathlib import Path
from typing import cast

import torch

from .config import FEWEST_TASKS, RunConfig
from .console import Console
from .distributed.world import World
from .layout.heads import BLOCKS
from .results.assemble import Assembly, assemble
from .results.gather import Read
from .results.heatmap import Heatmap
from .results.heatmap_data import Pairs
from .results.matrix_sums import MatrixSums
from .results.metadata import HeatmapMetadata, LayerAxes
from .results.partial_schema import LayerPartial
from .results.reduce import add_dealt, bring_to_first
from .results.task_matrix import TaskMatrix
from .results.task_pairs import of_pair
from .scoring.engine import BlockScores
from .scoring.own_share_records import no_shares
from .scoring.settings import may_stay
from .scoring.tiles import TilePlan
from .stats.effect_tests import effect_tests, notes_on_effects
from .stats.families import note_on_families, over_all_pairs
from .stats.head_tests import CPU, testing_device
from .stats.pair_tests import Both, PairTests, tests_at_once
from .stats.statistics import Family, QKOVStatistics


def statistics_of(config: RunConfig) -> QKOVStatistics | None:
    """The tests that a configuration asks for."""
    settings = config.statistics
    if not settings.enabled:
        return None
    return QKOVStatistics(
        settings.fdr_alpha,
        settings.permutations,
        seed=settings.seed,
        confidence=settings.confidence,
        family=cast(Family, settings.family),
    )


def finish(
    metadata: HeatmapMetadata,
    read: Read,
    config: RunConfig,
    path: Path,
    world: World,
    console: Console,
    statistics: QKOVStatistics | None,
    device: torch.device = CPU,
    begun: PairTests | None = None,
) -> Heatmap | TaskMatrix | None:
    """Add up, test and write as a configuration says, and pass on warnings and notes.

    Args:
        metadata: Axes, samples and provenance.
        read: This rank's partial of a layer.
        config: Whose output this is.
        path: The heatmap's file.
        world: The ranks; all of them call this alike.
        console: Takes warnings and notes, and shows progress.
        statistics: The tests; None leaves them out.
        device: Where heads are tested.
        begun: Tests of layers that were tested as they were scored.

    Returns:
        On rank 0 the heatmap as written, or the matrix of more than two tasks; None elsewhere.
    """
    pairs = cast(Pairs, config.output.pairs)
    what = "adding up" if statistics is None else "testing"
    combined = combine_tasks if len(metadata.tasks) > FEWEST_TASKS else combine
    with console.bar(what, len(metadata.layers), "layer") as advance:
        found = combined(
            metadata,
            read,
            world,
            statistics=statistics,
            pairs=pairs,
            folder=path.parent,
            on_layer=advance,
            device=device,
            begun=begun,
        )
    if found is None:
        return None
    found.save(path, pairs)
    for warning in found.attributes["warnings"]:
        console.say(f"warning: {warning}")
    for note in notes_of(found):
        console.say(f"note: {note}")
    return found


def notes_of(found: Heatmap | TaskMatrix) -> list[str]:
    """What a reader of the tests should know, once."""
    if isinstance(found, Heatmap):
        return [*(found.statistics or {}).get("notes", ())]
    alike: dict[str, list[str]] = {}  # pairs differ in numbers alone
    for heatmap in found.heatmaps.values():
        for note in (heatmap.statistics or {}).get("notes", ()):
            alike.setdefault(re.sub(r"[0-9][0-9.]*", "0", note), []).append(note)
    return [
        f"{notes[0]} (and alike of {len(notes) - 1} more pairs)" if notes[1:] else notes[0] for notes in alike.values()
    ]


def combine(
    metadata: HeatmapMetadata,
    read: Read,
    world: World,
    *,
    statistics: QKOVStatistics | None = None,
    pairs: Pairs = "cross",
    folder: Path | None = None,
    on_layer: Callable[[int], object] = lambda count: None,
    device: torch.device = CPU,
    begun: PairTests | None = None,
) -> Heatmap | None:
    """Add up all partial layers, test every head where its sum is, and put the heatmap together on rank 0.

    Args:
        metadata: Axes, samples and provenance, the same on every rank.
        read: This rank's partial of a layer; called once for each layer, in the metadata's order.
        world: The ranks.
        statistics: The tests; None leaves them out.
        pairs: Scores among all pooled samples are kept with ``all`` alone.
        folder: Where scores wait that are too large for memory.
        on_layer: Called with 1 after each layer.
        device: Where heads are tested.
        begun: Tests of layers that ranks have whole, and tested as they scored them; all ranks bring some, or none.

    Returns:
        The heatmap on rank 0, None elsewhere.

    Raises:
        QkovError: for a layer or head that is missing, and as the tests do.
    """
    keeps_pooled, both = metadata.pooled and pairs == "all", (0, 1)

    def summed(tested: PairTests) -> Iterator[tuple[int, LayerPartial]]:
        for layer, part in _tested_layers(metadata, read, world, tested):
            yield layer.layer, bring_to_first(part if keeps_pooled else _between_tasks(part, metadata), world)
            on_layer(1)

    heatmap = None
    with nullcontext(begun) if begun else PairTests(statistics, {both: metadata}, device) as tested:
        if world.rank == 0:
            heatmap = assemble(metadata, summed(tested), pooled=keeps_pooled, folder=folder)
        else:
            deque(summed(tested), maxlen=0)
        tests = tested.of_all_ranks(world)
    if heatmap is None:
        return None
    heatmap = with_tested_effects(heatmap, statistics)
    if statistics is None:
        return heatmap
    return heatmap.with_statistics(statistics.results(heatmap, tested.designs[both], tests[both]))


def combine_tasks(
    metadata: HeatmapMetadata,
    read: Read,
    world: World,
    *,
    statistics: QKOVStatistics | None = None,
    pairs: Pairs = "cross",
    folder: Path | None = None,
    on_layer: Callable[[int], object] = lambda count: None,
    device: torch.device = CPU,
    begun: PairTests | None = None,
) -> TaskMatrix | None:
    """The same of more than two tasks: a matrix of them, and every pair's heatmap, on rank 0.

    Arguments and errors are those of ``combine``.
    """
    of_pairs = pairs_of(metadata)
    putting = _Putting(metadata, of_pairs, pairs, folder) if world.rank == 0 else None
    with nullcontext(begun) if begun else PairTests(statistics, of_pairs, device) as tested:
        for layer, part in _tested_layers(metadata, read, world, tested):
            whole = bring_to_first(part, world)
            if putting is not None:
                putting.take(layer.layer, whole)
            on_layer(1)
        tests = tested.of_all_ranks(world)
    if putting is None:
        return None
    heatmaps = {}
    for both, assembly in putting.assemblies.items():
        heatmap = with_tested_effects(assembly.heatmap(), statistics)
        if statistics is not None:
            heatmap = heatmap.with_statistics(statistics.results(heatmap, tested.designs[both], tests[both]))
        heatmaps[heatmap.task_a, heatmap.task_b] = heatmap
    family = "pair" if statistics is None else statistics.family
    if family == "all":
        heatmaps = over_all_pairs(heatmaps)
    matrix = putting.sums.matrix(heatmaps)
    notes = [*matrix.attributes["notes"], note_on_families(len(heatmaps), family)]
    return dataclasses.replace(matrix, attributes={**matrix.attributes, "notes": notes})


def pairs_of(metadata: HeatmapMetadata) -> dict[Both, HeatmapMetadata]:
    """Every pair of tasks, with its own metadata."""
    if len(metadata.tasks) == FEWEST_TASKS:
        return {(0, 1): metadata}
    return {both: metadata.of_pair(*both) for both in combinations(range(len(metadata.tasks)), 2)}


def _tested_layers(
    metadata: HeatmapMetadata, read: Read, world: World, tested: PairTests
) -> Iterator[tuple[LayerAxes, LayerPartial]]:
    """Each layer's sums of the heads that this rank tests, those it scored whole or is dealt; their tests are begun."""
    known = tested.taken(world)
    for layer in metadata.layers:
        part = read(layer)
        if layer.layer not in known:
            part = add_dealt(part, layer, world)
            tested.take(layer.layer, part, metadata.sizes)
        yield layer, part


class EarlyTests:
    """Tests of layers that one GPU scores whole: begun right after, from where their scores were formed.

    Args:
        config: Says how heads are tested.
        device: Where they are scored.
        tile_plan: What this rank scores; all ranks bring theirs.
        of_a_head: Bytes of one head's scores.
        world: The ranks.
        threads: Ends those that test.

    Attributes:
        layers: Those that this rank has whole, and whose scores are to stay where they are formed.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        tile_plan: TilePlan,
        of_a_head: int,
        world: World,
        threads: ExitStack,
    ) -> None:
        self._statistics, self._device, self._threads = statistics_of(config), testing_device(device), threads
        self._begun: PairTests | None = None
        self._wanted = config.statistics.enabled and tests_at_once(self._device)
        owners = world.all_gather([layer.layer for layer in tile_plan.layers if layer.tiles])
        times = Counter(layer for theirs in owners for layer in theirs)
        heads = {layer.layer: sum(len(layer.heads.get(block, ())) for block in BLOCKS) for layer in tile_plan.layers}
        whole = (layer for layer in owners[world.rank] if times[layer] == 1 and may_stay(heads[layer], of_a_head))
        self.layers = frozenset(whole) if self._wanted else frozenset()

    def begun(self, metadata: HeatmapMetadata) -> PairTests | None:
        """The tests, which some layers may have been taken into; None where all layers are tested later."""
        if self._begun is None and self._wanted:
            tests = PairTests(self._statistics, pairs_of(metadata), self._device)
            self._begun = self._threads.enter_context(tests)
        return self._begun

    def take(
        self, metadata: HeatmapMetadata, layer: int, part: LayerPartial, blocks: Mapping[str, BlockScores]
    ) -> None:
        """Have a layer tested, if it is whole and its scores are still where they were formed."""
        tests = self.begun(metadata)
        there = {block: scores for block in part.blocks if (scores := blocks[block].kept) is not None}
        if tests is not None and layer in self.layers and len(there) == len(part.blocks):
            tests.take(layer, part, metadata.sizes, there)


class _Putting:
    """What rank 0 puts together of more than two tasks, layer by layer."""

    def __init__(
        self, metadata: HeatmapMetadata, of_pairs: Mapping[Both, HeatmapMetadata], pairs: Pairs, folder: Path | None
    ) -> None:
        self.sums, self._sizes, self._pooled = MatrixSums(metadata), metadata.sizes, pairs == "all"
        keeps = pairs != "none"
        self.assemblies = {
            both: Assembly(of_two, pooled=self._pooled, folder=folder, keeps_scores=keeps)
            for both, of_two in of_pairs.items()
        }

    def take(self, number: int, whole: LayerPartial) -> None:
        """Take one layer's sums of all tasks."""
        self.sums.take(number, whole)
        for both, assembly in self.assemblies.items():
            assembly.take(number, of_pair(whole, self._sizes, *both, pooled=self._pooled))


def with_tested_effects(heatmap: Heatmap, statistics: QKOVStatistics | None = None) -> Heatmap:
    """The heatmap with its effects, tested with as many draws, the seed and the confidence of the other tests."""
    if heatmap.influences is None:
        return heatmap
    settings = statistics or QKOVStatistics()
    tested = effect_tests(
        heatmap.influences,
        heatmap.counted,
        num_draws=settings.n_permutations,
        seed=settings.seed,
        confidence=settings.confidence,
    )
    known = heatmap.effects or {}
    effects = {
        block: {optimizer: {**arrays, **known[block][optimizer]} for optimizer, arrays in of_block.items()}
        for block, of_block in tested.items()
    }
    notes = [*heatmap.attributes.get("notes", ()), *notes_on_effects(heatmap.influences, heatmap.counted)]
    return dataclasses.replace(heatmap, effects=effects, attributes={**heatmap.attributes, "notes": notes})


def _between_tasks(part: LayerPartial, metadata: HeatmapMetadata) -> LayerPartial:
    """The scores between the two tasks alone."""
    if not metadata.pooled:
        return part
    num_a = len(metadata.samples[0])
    blocks = {
        block: found._replace(scores=found.scores[:, :num_a, num_a:], own_shares=no_shares(len(found.heads)))
        for block, found in part.blocks.items()
    }
    return LayerPartial(blocks, {name: scores[:num_a, num_a:] for name, scores in part.shared.items()})
