"""What a small part of a planned run takes on the processor at hand: its own kernels, at its own shapes, timed.

    product   tokens of a batch times a matrix as wide as the model, in the model's type
    element   heads of all samples at their lengths, scored by the engine itself, some a worker
    test      heads among as many samples under as many labellings, tested by all workers

All cores work on each, as in a run. Parts are so small that all of it takes half a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, SampleIndex, Whole
from qkov_dist.capture.forms import gradients_above
from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.extent import sides
from qkov_dist.scoring.head_batches import heads_at_a_time
from qkov_dist.scoring.influence_records import mean_weights
from qkov_dist.scoring.native_kernel import has_native_kernel
from qkov_dist.scoring.own_share_records import formed_with
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import LayerTiles, Tile, cut
from qkov_dist.stats.head_tests import head_tests
from qkov_dist.stats.statistics import QKOVStatistics

from .hardware import shortest
from .statistics_cost import flops_of_a_head
from .workload import Workload

OPERATIONS = 1.5e9  # of a part, about
MOST_BYTES = 96 * 2**20  # of a part's factors
SCORED = 4, 1  # heads a worker scores; with one alone, what a layer takes beside them is half as much again
DRAWN = 4096  # rows of factors that are random; others are these again
LEAST_COLUMNS, MOST_ROWS, MOST_TOKENS = 16, 128, 512
HEADS, TESTED = 12, 4e8  # that a worker tests at most, and operations of their tests
FLOATS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
SITE = Site(0, "probe")


@dataclass(frozen=True)
class Probes:
    """What was found.

    Attributes:
        product: Operations a second of passes' products.
        element: Seconds for an element of a sample's gradient, from factors to scores; None where samples are so many
            that a part would be large.
        tests: By the samples of both tasks of a pair, seconds for a head's tests; None likewise.
    """

    product: float
    element: float | None
    tests: Mapping[tuple[int, int], float | None]


def probed(work: Workload, elements: int) -> Probes:
    """Time parts of a run's work on this machine, of which a rank has so many elements of samples' gradients."""
    tests = {sizes: test_seconds(work, *sizes) for sizes in {*work.sizes_of_pairs}}
    return Probes(product_rate(work), element_seconds(work, compiled=work.compiles(elements)), tests)


def product_rate(work: Workload) -> float:
    """Operations a second of a batch's tokens times a matrix."""
    sizes, dtype = work.model_sizes, FLOATS[work.model_sizes.itemsize]
    tokens, width = min(work.batch_tokens, MOST_TOKENS), sizes.hidden
    widest = max((matrix.size // width for matrix in sizes.matrices if matrix.layer is not None), default=width)
    columns = max(min(widest, int(OPERATIONS / (2 * tokens * width))), LEAST_COLUMNS)
    left, right = torch.randn(tokens, width).to(dtype), torch.randn(columns, width).to(dtype)
    return 2 * tokens * width * columns / shortest(lambda: left @ right.T)


def element_seconds(work: Workload, *, compiled: bool = False) -> float | None:
    """Seconds for an element of a sample's gradient: the engine, on some heads for each worker."""
    config, num, layer = work.config, sum(work.num_samples), work.layout.layer(work.layers[0])
    above = max(gradients_above([layer], work.scoring.factor_itemsize).values())
    rows, columns = min(layer.head_dim, MOST_ROWS), work.model_sizes.hidden
    left, right = sides(work.num_samples, pooled=config.pooled)
    operations = 2 * rows * work.workers * (work.padded_tokens(above) + num * (len(work.tasks) + num))
    columns = min(columns, max(int(OPERATIONS / operations), LEAST_COLUMNS))
    in_all = sum(work.lengths_pooled) * work.scoring.itemsize
    fitting = [of for of in SCORED if in_all * (rows * work.workers * of + columns) <= MOST_BYTES]
    if not fitting:
        return None
    heads = tuple(range(work.workers * fitting[0]))
    slices = tuple(Tile(SITE, "Q", head, Rect(head * rows, (head + 1) * rows, 0, columns)) for head in heads)
    tiles = tuple(
        Tile(SITE, "Q", head.head, part) for head in slices for part in cut(head.rect, work.scoring.max_elements)
    )
    area = len(heads) * rows * columns
    layer_tiles = LayerTiles(0, (SITE,), heads, {"Q": heads}, tiles, slices, {"Q": area})
    by_task = np.repeat(np.arange(len(work.tasks)), work.num_samples) == np.arange(len(work.tasks))[:, None]
    means = mean_weights(np.ones(num, bool), work.num_samples)
    roles = Roles(
        tuple(range(num)),
        by_task / num,
        left,
        right,
        means,
        work.num_samples,
        own_shares=formed_with(config.metric.score, pooled=config.pooled),
    )
    settings = ScoreSettings.of(config)
    of_layer = sum(len(layer.heads(block)) for block in layer.blocks)
    settings = replace(
        settings,
        compile=compiled and has_native_kernel(settings.dtype),
        kernel_heads=min(heads_at_a_time(of_layer, work.workers), fitting[0]),
    )
    source = MadeFactors.of(work, above, (len(heads) * rows, columns))
    return shortest(lambda: score_layer(layer_tiles, source, roles, settings)) / (num * area)


@dataclass(frozen=True)
class MadeFactors:
    """Random factors of all samples at one projection, in the form in which each would be kept."""

    index: SampleIndex
    inputs: Tensor
    outputs: Tensor
    kept: Tensor

    @staticmethod
    def of(work: Workload, above: int, shape: tuple[int, int]) -> MadeFactors:
        """Of a workload's samples; those of more tokens than ``above`` are gradients."""
        index, dtype = SampleIndex(), FLOATS[work.scoring.factor_itemsize]
        for number, length in enumerate(work.lengths_pooled):
            index.add(number, length, as_gradient=length > above)
        rows, columns = shape
        made = torch.Generator().manual_seed(0)
        places = torch.arange(index.num_rows) % DRAWN
        inputs, outputs = (torch.randn(DRAWN, width, generator=made).to(dtype)[places] for width in (columns, rows))
        return MadeFactors(index, inputs, outputs, torch.randn(len(index.whole), rows, columns + 1, generator=made))

    def sample_index(self, site: Site) -> SampleIndex:
        """Where each sample is."""
        return self.index

    def x_site(self, site: Site) -> Site:
        """The one site."""
        return site

    def x(self, site: Site) -> FeatureSlice:
        """Inputs."""
        return FeatureSlice(self.inputs)

    def d(self, site: Site) -> FeatureSlice:
        """Output gradients."""
        return FeatureSlice(self.outputs)

    def g(self, site: Site) -> Whole | None:
        """Gradients of the samples that are kept as such."""
        return Whole(self.kept) if len(self.kept) else None


def test_seconds(work: Workload, num_a: int, num_b: int) -> float | None:
    """Seconds for a head's tests between two tasks of so many samples."""
    settings, workers, num = work.config.statistics, work.workers, num_a + num_b
    if not settings.enabled:
        return 0.0
    heads = min(HEADS, int(TESTED / flops_of_a_head(num_a, num_b, settings.permutations)))
    if not heads or min(num_a, num_b) < 2:
        return None
    statistics = QKOVStatistics(n_permutations=settings.permutations)
    design = statistics.design(num_a, num_b)
    scores = torch.rand(heads * workers, num, num, generator=torch.Generator().manual_seed(0)) + 0.5
    return shortest(lambda: head_tests({"Q": scores}, design)) / len(scores)
