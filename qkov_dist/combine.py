"""From every rank's partial layers to one tested heatmap, one layer in memory at a time.

A layer's heads are dealt to the ranks. Each rank is sent all partial scores of its heads, adds them up, tests them, and
passes on to rank 0 what the heatmap keeps. Every rank takes the same steps; with one process nothing is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from .assembly import assemble
from .frame import Frame, FrameLayer
from .head_tests import Design
from .layer_tests import LayerTests, layer_tests
from .merge import add_dealt, bring_to_first
from .partial_schema import LayerPartial
from .results import Heatmap, Pairs
from .statistics import QKOVStatistics
from .world import World

Read = Callable[[FrameLayer], LayerPartial]


def combine(
    frame: Frame,
    read: Read,
    world: World,
    *,
    statistics: QKOVStatistics | None = None,
    pairs: Pairs = "cross",
    folder: Path | None = None,
    on_layer: Callable[[int], object] = lambda count: None,
) -> Heatmap | None:
    """Add up all partial layers, test every head where its sum is, and put the heatmap together on rank 0.

    Args:
        frame: Axes, samples and provenance, the same on every rank.
        read: This rank's partial of a layer; called once for each layer, in the frame's order.
        world: The ranks.
        statistics: The tests; None leaves them out.
        pairs: Scores among all pooled samples are kept with ``all`` alone.
        folder: Where scores wait that are too large for memory.
        on_layer: Called with 1 after each layer.

    Returns:
        The heatmap on rank 0, None elsewhere.

    Raises:
        QkovError: for a layer or head that is missing, and as the tests do.
    """
    design = None
    if statistics is not None:
        num_a, num_b = map(len, frame.samples)
        contents = [content for table in frame.samples for content in table.contents]
        design = statistics.design(num_a, num_b, statistics.names(str(frame.attributes["score"])), contents)
    tested: list[LayerTests] = []

    def summed() -> Iterator[tuple[int, LayerPartial]]:
        for layer in frame.layers:
            part = add_dealt(read(layer), layer, world)
            if design is not None:
                tested.append(_tests(design, layer, part, frame))
            yield layer.layer, bring_to_first(part if keeps_pooled else _between_tasks(part, frame), world)
            on_layer(1)

    keeps_pooled = frame.pooled and pairs == "all"
    heatmap = None
    if world.rank == 0:
        heatmap = assemble(frame, summed(), pooled=keeps_pooled, folder=folder)
    else:
        deque(summed(), maxlen=0)
    if statistics is None or design is None:
        return heatmap
    gathered = world.gather(LayerTests.joined(tested).to_json())
    if heatmap is None:
        return None
    tests = LayerTests.joined(map(LayerTests.from_json, gathered))
    return heatmap.with_statistics(statistics.results(heatmap, design, tests))


def _tests(design: Design, layer: FrameLayer, part: LayerPartial, frame: Frame) -> LayerTests:
    ids_a, ids_b = (table.ids for table in frame.samples)
    scores = {block: torch.from_numpy(np.ascontiguousarray(found.scores)) for block, found in part.blocks.items()}
    heads = {block: tuple(found.heads.tolist()) for block, found in part.blocks.items()}
    return layer_tests(design, layer.layer, scores, heads, (*ids_a, *ids_b))


def _between_tasks(part: LayerPartial, frame: Frame) -> LayerPartial:
    """The scores between the two tasks alone."""
    if not frame.pooled:
        return part
    num_a = len(frame.samples[0])
    blocks = {block: found._replace(scores=found.scores[:, :num_a, num_a:]) for block, found in part.blocks.items()}
    return LayerPartial(blocks, {name: scores[:num_a, num_a:] for name, scores in part.shared.items()})
