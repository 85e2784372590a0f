"""The permutation test of single heads, a few at a time, and its correction over many.

A head's test needs no other head; only the correction does. Several ranks may therefore each call ``head_tests`` on the
heads they hold with the same ``Design`` (``layer_tests`` does it for whole layers). ``correct`` then needs all heads of
a block (``join``), and of all heads of all blocks the largest z under each labelling (``MaxZ``, ``largest``).

The tests of layers, as ranks hold, send and join them: each head is tested where its scores are.

    with threads_that_test() as submit:
        begun = [layer_tests(submit, design, layer, scores[layer], heads, ids) for layer in layers]
        mine = LayerTests.joined(wait() for wait in begun)
    tests = LayerTests.joined(map(LayerTests.from_json, world.all_gather(mine.to_json())))

holds on every rank what one process would have found, and a rank sends one ``max_z`` for each statistic. ``heads`` may
be any of a layer's heads; a head's numbers do not depend on those that it is tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from torch import Tensor

from qkov_dist.capture.finite import refuse_not_finite
from qkov_dist.errors import QkovError
from qkov_dist.memory import is_shortage, moved
from qkov_dist.stats import jackknife, permutation
from qkov_dist.stats.without_own_shares import has_copies

from .permutation import Alternative, Standardised

Floats = NDArray[np.float64]
Statistic = Literal["cross_mean", "overlap"]
Submit = Callable[..., Callable[[], Any]]  # has work done by a thread; returns what waits for it
MaxZ = Mapping[Statistic, Floats]  # statistic -> [P], the largest directed z of any head under each labelling
# Of an array [heads, P]: few heads, so that cores have equal shares, but not too few for Python, whose lock is shared;
# of a GPU, a layer's.
_CHUNK_BYTES, _GPU_CHUNK_BYTES = 192 << 10, 16 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Design:
    """All that the tests of different heads share: drawn once, the same on every rank.

    Attributes:
        labels: The labellings.
        pairs: Which pairs are of different samples, bool [N, N].
        names: The statistics.
        alternative: Of the tests.
        alpha: At which a detectable shift is given.
        power: Likewise.
        confidence: Of intervals and null bands.
        device: Where heads are tested, in float64; what does not fit into a GPU's memory, on the CPU.
    """

    labels: permutation.Labels
    pairs: Tensor
    names: tuple[Statistic, ...]
    alternative: Alternative
    alpha: float
    power: float
    confidence: float
    device: torch.device = CPU

    @cached_property
    def counts(self) -> permutation.PairCounts:
        """Pairs of different samples under every labelling."""
        return permutation.pair_counts(self.labels, self.pairs)

    @cached_property
    def left_out(self) -> jackknife.LeftOut:
        """What the intervals of all heads share."""
        return jackknife.LeftOut.of(self.labels, self.pairs)


@dataclass(frozen=True)
class HeadTests:
    """One statistic of some heads: one float64 number a head in each array, NaN for absent heads.

    ``threshold`` is the least z that is as extreme as the head's own: with ``MaxZ`` it gives the family-wise p-value.
    """

    arrays: dict[str, Floats]
    threshold: Floats

    def part(self, start: int, stop: int) -> HeadTests:
        """Those of the heads from ``start`` to ``stop``."""
        arrays = {key: values[start:stop] for key, values in self.arrays.items()}
        return HeadTests(arrays, self.threshold[start:stop])

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values; Python's json keeps every bit, NaN and infinity included."""
        return {"arrays": {key: array.tolist() for key, array in self.arrays.items()}, "z": self.threshold.tolist()}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> HeadTests:
        """What ``to_json`` made them of."""
        arrays = {key: np.array(values, np.float64) for key, values in raw["arrays"].items()}
        return HeadTests(arrays, np.array(raw["z"], np.float64))


Tested = tuple[dict[str, dict[Statistic, HeadTests]], MaxZ]


def head_tests(scores: Mapping[str, Tensor], design: Design, known: Mapping[str, Tensor] | None = None) -> Tested:
    """Test heads, each by itself, on as many cores as torch has threads.

    Args:
        scores: Name of a group (a block) -> [heads, N, N], at least one head, all NaN where a head is absent.
        design: The same for all heads.
        known: Group -> what samples do through the Fisher (``scoring.own_share_records``), [heads, KNOWN, N]; None
            where that is not known.

    Returns:
        Group -> statistic -> its heads' tests, and the largest z of all groups' heads.
    """
    with threads_that_test(design.device) as submit:
        return _begin(submit, scores, design, known)()


def _begin(
    submit: Submit, scores: Mapping[str, Tensor], design: Design, known: Mapping[str, Tensor] | None
) -> Callable[[], Tested]:
    """Have heads tested, some by each thread; returns what waits for all of them."""
    chunk_bytes = _CHUNK_BYTES if design.device.type == "cpu" else _GPU_CHUNK_BYTES
    chunk = max(chunk_bytes // (8 * design.labels.a.shape[1]), 1)
    _ = design.counts, design.left_out  # once, before threads ask for them
    num_heads = sum(map(len, scores.values()))
    if not num_heads:
        return lambda: ({}, {})
    size = -(-num_heads // -(-num_heads // chunk))  # parts of nearly one size
    parts = torch.split(torch.cat(list(scores.values())), size)
    of_parts: Sequence[Tensor | None] = [None] * len(parts)
    if known is not None:
        of_parts = torch.split(torch.cat([known[group] for group in scores]), size)
    waiting = [submit(_chunk_tests, *part, design) for part in zip(parts, of_parts, strict=True)]
    sizes = {group: len(of_group) for group, of_group in scores.items()}
    return lambda: _joined([wait() for wait in waiting], sizes)


def _joined(done: Sequence[tuple[dict[Statistic, HeadTests], MaxZ]], sizes: Mapping[str, int]) -> Tested:
    """The tests of all parts' heads by group, of which there are so many."""
    tests = {name: join([found[name] for found, _ in done]) for name in done[0][0]}
    joined = {
        group: {name: of_name.part(end - sizes[group], end) for name, of_name in tests.items()}
        for group, end in zip(sizes, accumulate(sizes.values()), strict=True)
    }
    return joined, largest(max_z for _, max_z in done)


def testing_device(scored_on: torch.device) -> torch.device:
    """Where heads are tested that are scored on a device: on a GPU that has float64 too, else on the CPU."""
    return scored_on if scored_on.type == "cuda" else CPU


@contextmanager
def threads_that_test(device: torch.device = CPU) -> Iterator[Submit]:
    """Threads that take whole heads, as many as torch has, for as long as the block lasts; one has a GPU work.

    Torch's own would share single small operations and, on a busy machine, wait for each other in every one of them.

    Args:
        device: Where heads are tested.

    Yields:
        ``submit(work, *arguments)``: has a thread call ``work(*arguments)``; returns what waits for the result (and
        raises what the work raised).
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)  # in order with what the caller does there
        pool = ThreadPoolExecutor(1, "qkov-tests", torch.cuda.set_stream, (stream,))
    else:
        num_threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(num_threads, "qkov-tests", torch.set_num_threads, (1,))
    try:
        yield lambda work, *arguments: pool.submit(work, *arguments).result
    finally:
        pool.shutdown(cancel_futures=True)
        if device.type != "cuda":
            torch.set_num_threads(num_threads)


def _chunk_tests(scores: Tensor, known: Tensor | None, design: Design) -> tuple[dict[Statistic, HeadTests], MaxZ]:
    try:
        return _tests_of(moved(scores, design.device), known, design)
    except RuntimeError as error:
        if design.device.type == "cpu" or not is_shortage(error):
            raise
    return _tests_of(scores.cpu(), known, design)


def _tests_of(scores: Tensor, known: Tensor | None, design: Design) -> tuple[dict[Statistic, HeadTests], MaxZ]:
    """The tests of heads where their scores are."""
    with_overlap, labels = "overlap" in design.names, design.labels
    nulls = permutation.head_nulls(scores, labels, design.pairs, design.counts, with_overlap=with_overlap)
    standardised = {name: permutation.standardise(nulls[name]) for name in design.names}
    effects = {name: permutation.effect_size(nulls[name], labels.exhaustive) for name in design.names}
    found = jackknife.intervals(
        scores, design.left_out, {name: effect for name, (effect, _) in effects.items()}, design.confidence, known
    )
    tests = {
        name: _statistic_tests(nulls[name], standardised[name], effects[name], found[name], design)
        for name in design.names
    }
    max_z = {
        name: permutation.max_over_heads(z, design.alternative).numpy(force=True) for name, z in standardised.items()
    }
    return tests, max_z


def _statistic_tests(
    null: permutation.Null,
    standardised: Standardised,
    effect_and_sd: tuple[Tensor, Tensor],
    found: tuple[jackknife.Interval, jackknife.Interval],
    design: Design,
) -> HeadTests:
    labels, alternative = design.labels, design.alternative
    effect, sd = effect_and_sd
    ordered = permutation.in_order(null, labels.exhaustive)
    shift = permutation.detectable_shift(null, ordered, labels, alternative, design.alpha, design.power)
    null_mean, null_low, null_high = permutation.null_band(null, ordered, labels.exhaustive, design.confidence)
    arrays = {
        "statistic": null.values[..., 0],
        "p_value": permutation.p_value(standardised, alternative),
        "p_greater": permutation.p_value(standardised, "greater"),
        "p_less": permutation.p_value(standardised, "less"),
        "null_mean": null_mean,
        "null_low": null_low,
        "null_high": null_high,
        "ci_low": found[0].low,
        "ci_high": found[0].high,
        "effect_size": effect,
        "effect_low": found[1].low,
        "effect_high": found[1].high,
        "detectable": shift,
        "detectable_sd": shift / sd,
    }
    threshold = permutation.threshold(standardised, alternative)
    return HeadTests({key: value.numpy(force=True) for key, value in arrays.items()}, threshold.numpy(force=True))


def join(parts: Sequence[HeadTests]) -> HeadTests:
    """The tests of all parts' heads, in order."""
    return HeadTests(
        {key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays},
        np.concatenate([part.threshold for part in parts]),
    )


def largest(parts: Iterable[MaxZ]) -> MaxZ:
    """The largest z [P] of any head of any part under each labelling, for every statistic that a part has."""
    joined: dict[Statistic, Floats] = {}
    for part in parts:
        for name, max_z in part.items():
            joined[name] = np.maximum(joined[name], max_z) if name in joined else max_z
    return joined


def correct(tests: HeadTests, max_z: Floats) -> dict[str, Floats]:
    """Add q-values over one block's heads, and the family-wise p-value over all heads that ``max_z`` [P] covers."""
    return tests.arrays | {
        "q_value": q_values(tests.arrays["p_value"], "bh"),
        "q_value_by": q_values(tests.arrays["p_value"], "by"),
        "p_max": permutation.family_wise_p(tests.threshold, max_z),
    }


def q_values(p_values: Floats, method: Literal["bh", "by"]) -> Floats:
    """Benjamini-Hochberg or Benjamini-Yekutieli over all finite p-values, in their shape; NaN stays NaN."""
    present = np.isfinite(p_values)
    corrected = np.full_like(p_values, np.nan)
    if present.any():
        corrected[present] = false_discovery_control(p_values[present], method=method)
    return corrected


class BlockTests(NamedTuple):
    """The tests of one layer's heads in one block; every array runs along ``heads``, the model's numbers."""

    heads: tuple[int, ...]
    statistics: Mapping[Statistic, HeadTests]


@dataclass(frozen=True)
class LayerTests:
    """The tests of some layers, or of none.

    Attributes:
        layers: Layer number -> block -> the tests of its heads.
        max_z: The largest z of all these heads.
        freed: Whether all their intervals of overlap are freed of what samples' own shares of the Fisher do.
    """

    layers: Mapping[int, Mapping[str, BlockTests]]
    max_z: MaxZ
    freed: bool = True

    @staticmethod
    def joined(parts: Iterable[LayerTests]) -> LayerTests:
        """The tests of all parts' heads; a layer may be spread over several parts.

        Raises:
            QkovError: for a head that two parts have.
        """
        kept = tuple(parts)
        layers: dict[int, dict[str, BlockTests]] = {}
        for part in kept:
            for layer, blocks in part.layers.items():
                known = layers.setdefault(layer, {})
                for block, tests in blocks.items():
                    known[block] = (
                        _both(f"layer {layer}, block {block}", known[block], tests) if block in known else tests
                    )
        return LayerTests(layers, largest(part.max_z for part in kept), all(part.freed for part in kept))

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        layers = {
            str(layer): {
                block: {"heads": list(of.heads), **{name: tests.to_json() for name, tests in of.statistics.items()}}
                for block, of in blocks.items()
            }
            for layer, blocks in self.layers.items()
        }
        max_z = {name: max_z.tolist() for name, max_z in self.max_z.items()}
        return {"layers": layers, "max_z": max_z, "freed": self.freed}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> LayerTests:
        """What ``to_json`` made JSON of."""
        layers = {
            int(layer): {block: _block_from_json(of) for block, of in blocks.items()}
            for layer, blocks in raw["layers"].items()
        }
        max_z = {name: np.array(max_z, np.float64) for name, max_z in raw["max_z"].items()}
        return LayerTests(layers, max_z, bool(raw["freed"]))


def _both(where: str, first: BlockTests, second: BlockTests) -> BlockTests:
    if twice := sorted(set(first.heads) & set(second.heads)):
        remedy = "Let one rank test each head."
        raise QkovError(f"statistics, {where}, head {twice[0]}", expected="one test", got="two", remedy=remedy)
    statistics = {name: join([tests, second.statistics[name]]) for name, tests in first.statistics.items()}
    return BlockTests((*first.heads, *second.heads), statistics)


def _block_from_json(raw: Mapping[str, Any]) -> BlockTests:
    statistics = {name: HeadTests.from_json(tests) for name, tests in raw.items() if name != "heads"}
    return BlockTests(tuple(raw["heads"]), statistics)  # type: ignore[arg-type]


def layer_tests(
    submit: Submit,
    design: Design,
    layer: int,
    scores: Mapping[str, Tensor],
    heads: Mapping[str, Sequence[int]],
    sample_ids: Sequence[str],
    known: Mapping[str, Tensor] | None = None,
    there: Mapping[str, Tensor] | None = None,
) -> Callable[[], LayerTests]:
    """Have the heads of one layer tested; returns what waits for their tests.

    Args:
        submit: Of ``threads_that_test``.
        design: The same for all layers and ranks.
        layer: Its number.
        scores: Block -> [heads, N, N] among all samples, A's first; all NaN for an absent head. Left alone.
        heads: Block -> the numbers of these heads; there may be none.
        sample_ids: Ids of the N samples, for errors.
        known: Block -> what samples do through the Fisher, as in ``head_tests``.
        there: The same scores where they are tested, if they are there already.

    Raises:
        QkovError: for a score of a present head that is not finite.
    """
    present = {block: of_block for block, of_block in scores.items() if len(heads[block])}
    for block, of_block in present.items():
        where = f"layer {layer}, block {block}"
        refuse_not_finite(of_block, where, heads[block], sample_ids, sample_ids, with_absent=True)
    wait = _begin(submit, present if there is None else {block: there[block] for block in present}, design, known)

    def found() -> LayerTests:
        tests, max_z = wait()
        of_blocks = {block: BlockTests(tuple(heads[block]), tests[block]) for block in present}
        freed = not present or (known is not None and not has_copies(design.pairs))
        return LayerTests({layer: of_blocks}, max_z, freed)

    return found
