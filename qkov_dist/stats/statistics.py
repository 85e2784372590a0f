"""Which heads do two tasks fight over? Permutation tests on pooled scores: arrays in, results out.

The null hypothesis is that task labels are exchangeable over the pooled samples. All heads of all blocks are relabelled
together (``permutation``), then corrected: Benjamini-Hochberg and Benjamini-Yekutieli per block over its native heads,
and the family-wise maximum over all heads of all blocks. Absent heads are NaN and take part in nothing.

Two statistics are tested; one, ``overlap`` where it is defined, decides ``results["fdr_corrected"]``. By default the
test is two-sided: it finds every head in which the labels matter, and ``direction``, the sign of the effect size, says
how. One-sided p-values are stored beside it.

    overlap               above its null   contested: gradients of one task are large where the other's are, more than
                                           for random halves of the pool
                          below            apart: less than for random halves, which may still be above 0
    cross_mean of signed  above            their gradients agree more than those of random halves: synergy
                          below            less; conflict where the mean itself is negative

``greater`` alone hardly rejects: for symmetric scores the overlap of two populations never exceeds 0 (Cauchy-Schwarz),
and for ``interference`` that takes weights on which one task presses rarely but hard while the other depends on them
steadily. ``less`` alone would call heads in conflict that the tasks share without touching the same weights. Nor does a
signed mean of two populations lie above its null, with as many samples of each: tasks that share a direction show it by
a mean above 0.

Both are valid tests of exchangeability, but ``cross_mean`` answers another question. If B's gradients equal A's but for
a factor, the ``interference`` m_ab exceeds its mean over labellings whenever A's are up to 1 + sqrt(2) times larger
(the root of 4 r^2 = (1 + r^2)(1 + r)): every head becomes "significant" because one task has the larger loss. For
``symmetric`` it never does, as r <= (1 + r)^2 / 4. The observed ``overlap`` has no such factor in it: m_ab m_ba and
m_aa m_bb scale alike. Unequal scales still widen and raise its *null* (mixed groups are more varied), which makes
``greater`` conservative but lets ``less`` and ``two-sided`` find scale alone: a head below its null may be one that the
tasks merely use at another scale. Self-pairs being excluded, the null lies above 0, the more the samples' norms vary:
what is tested is the distance from it (``null_mean`` with its band ``null_low`` to ``null_high``, ``effect_size``), not
from 0. A head below its null may lie above 0. For ``signed``, whose means may be negative, only ``cross_mean`` exists.

Ranks that hold the scores of different layers test them there (``layer_tests``) and ask ``results`` together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qkov_dist.data.copies import different_pairs
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.scoring.score_kinds import may_be_negative
from qkov_dist.stats import permutation

from .families import over_all_pairs
from .head_tests import CPU, Design, LayerTests, Statistic, layer_tests, threads_that_test
from .permutation import Alternative
from .significance import StatisticsResult, corrected, notes_on, refuse_untested, significant_heads, without_overlap

Family = Literal["pair", "all"]


@dataclass(frozen=True)
class QKOVStatistics:
    """The tests of a heatmap and their settings.

    Args:
        fdr_alpha: A head is significant where its Benjamini-Hochberg q-value is at most this.
        n_permutations: Labellings to draw; where no more than these exist, all are enumerated instead.
        seed: Of labellings.
        alternative: ``two-sided`` (distance from the null mean), ``greater`` or ``less``.
        statistic: Which one decides ``fdr_corrected``; None is ``overlap``, or ``cross_mean`` for signed scores.
        confidence: Of the jackknife's intervals, and the share of the null that its band holds.
        power: At which the smallest detectable effect is given, for one head tested alone at ``fdr_alpha``.
        family: Of more than two tasks: ``pair`` corrects within each pair, ``all`` over all pairs (``stats.families``).

    Raises:
        QkovError: for a setting out of range.
    """

    fdr_alpha: float = 0.05
    n_permutations: int = 1000
    seed: int = 0
    alternative: Alternative = "two-sided"
    statistic: Statistic | None = None
    confidence: float = 0.95
    power: float = 0.8
    family: Family = "pair"

    def __post_init__(self) -> None:
        between = {name: 0 < getattr(self, name) < 1 for name in ("fdr_alpha", "confidence", "power")}
        at_least = {"n_permutations": 2, "seed": 0}
        choices = {
            "alternative": get_args(Alternative),
            "statistic": (None, *get_args(Statistic)),
            "family": get_args(Family),
        }
        wrong = (
            [(name, "a number between 0 and 1") for name, is_right in between.items() if not is_right]
            + [(name, f"at least {least}") for name, least in at_least.items() if getattr(self, name) < least]
            + [(name, f"one of {known}") for name, known in choices.items() if getattr(self, name) not in known]
        )
        for name, expected in wrong:
            got = repr(getattr(self, name))
            raise QkovError(f"statistics.{name}", expected=expected, got=got, remedy="Change this setting.")

    def names(self, score: str) -> tuple[Statistic, ...]:
        """The statistics to test for a kind of score, as ``metric.score`` names it.

        Raises:
            QkovError: where ``overlap`` is asked of signed scores.
        """
        if not may_be_negative(score):
            return ("cross_mean", "overlap")
        if self.statistic == "overlap":
            remedy = "Use statistic='cross_mean', or another score."
            raise QkovError(
                "statistics.statistic", expected="cross_mean for signed scores", got="overlap", remedy=remedy
            )
        return ("cross_mean",)

    def design(
        self,
        n_a: int,
        n_b: int,
        names: tuple[Statistic, ...] = ("cross_mean", "overlap"),
        contents: Sequence[str] | None = None,
        device: torch.device = CPU,
    ) -> Design:
        """What the tests of all heads share: a function of the settings and the samples alone.

        Args:
            n_a: Samples of A.
            n_b: Samples of B.
            names: The statistics.
            contents: Of all samples, A's first (``SampleTable.contents``), by which copies are known; None: no copies.
            device: Where heads are tested.

        Raises:
            QkovError: for fewer than two samples of a task.
        """
        for task, num_samples in (("a", n_a), ("b", n_b)):
            if num_samples < 2:
                remedy = "Raise max_samples, or add samples to the task."
                raise QkovError(
                    f"statistics, task {task}", expected="at least 2 samples", got=f"{num_samples}", remedy=remedy
                )
        labels = permutation.draw_labels(self.seed, n_a, n_b, self.n_permutations)
        pairs = torch.from_numpy(different_pairs([""] * (n_a + n_b) if contents is None else contents))
        return Design(labels, pairs, names, self.alternative, self.fdr_alpha, self.power, self.confidence, device)

    def test_heatmap(self, heatmap: Heatmap) -> StatisticsResult:
        """Test every native head of every block.

        Raises:
            QkovError: without pooled scores, with fewer than two samples of a task, for a score of a present head
                that is not finite, and where ``overlap`` is asked of signed scores.
        """
        names = self.names(str(heatmap.attributes["score"]))
        pooled = _pooled_scores(heatmap)
        ids_a, ids_b = heatmap.samples_a.ids, heatmap.samples_b.ids
        contents = (*heatmap.samples_a.contents, *heatmap.samples_b.contents)
        design = self.design(len(ids_a), len(ids_b), names, contents)
        heads, shares = {block: heatmap.natives(block) for block in pooled}, heatmap.own_shares
        with threads_that_test() as submit:
            tests = LayerTests.joined(
                layer_tests(
                    submit,
                    design,
                    layer,
                    _layer_scores(pooled, place),
                    heads,
                    (*ids_a, *ids_b),
                    None if shares is None else _layer_scores(shares, place),
                )()
                for place, layer in enumerate(heatmap.layers)
            )
        return self.results(heatmap, design, tests)

    def test_matrix(self, matrix: TaskMatrix) -> TaskMatrix:
        """Test every pair of tasks, each among its own samples, under the Fisher of all.

        Returns:
            The matrix with tested heatmaps.

        Raises:
            QkovError: as ``test_heatmap`` does.
        """
        heatmaps = {pair: matrix.heatmap(*pair) for pair in matrix.pairs}
        tested = {pair: found.with_statistics(self.test_heatmap(found)) for pair, found in heatmaps.items()}
        return replace(matrix, heatmaps=over_all_pairs(tested) if self.family == "all" else tested, whole=None)

    def results(self, heatmap: Heatmap, design: Design, tests: LayerTests) -> StatisticsResult:
        """What the tests of all layers say, corrected for their number.

        Args:
            heatmap: Whose axes, samples and attributes these are; its scores are not looked at.
            design: That of the tests.
            tests: Of every present head.

        Raises:
            QkovError: for a present head without a test.
        """
        refuse_untested(heatmap, tests)
        blocks = [block for block in BLOCKS if any(block in layer for layer in tests.layers.values())]
        result = StatisticsResult()
        for name in design.names:
            result[name] = {block: corrected(heatmap, tests, block, name) for block in blocks}
        deciding = self.statistic or design.names[-1]
        result["fdr_corrected"] = {
            block: significant_heads(heatmap, block, deciding, arrays, self.fdr_alpha)
            for block, arrays in result[deciding].items()
        }
        result["undefined"] = {block: without_overlap(heatmap, block, result) for block in blocks}
        result["settings"] = self._settings(heatmap, design, deciding)
        without_pairs = not bool(design.counts.log.isfinite().all())
        result["notes"] = notes_on(
            result, str(heatmap.attributes["scope"]), without_pairs=without_pairs, knows_own_shares=tests.freed
        )
        return result

    def _settings(self, heatmap: Heatmap, design: Design, deciding: Statistic) -> dict[str, Any]:
        labels, attributes = design.labels, heatmap.attributes
        num_labellings = labels.a.shape[1]
        return asdict(self) | {
            "statistic": deciding,
            "n_a": labels.n_a,
            "n_b": labels.n_b,
            "method": "exhaustive" if labels.exhaustive else "monte-carlo",
            "n_labellings": num_labellings,
            "smallest_p": 1 / num_labellings,
            "exactly_exchangeable": attributes["estimator"] == "mean" and attributes["scope"] == "pooled",
        }


def _pooled_scores(heatmap: Heatmap) -> Mapping[str, Any]:
    if heatmap.pooled is None:
        raise QkovError(
            "statistics",
            expected="scores among all pooled samples",
            got="scores between the two tasks only",
            remedy='Use compute_heatmap(..., pairs="all"), or statistics.enabled: true in the run\'s configuration.',
        )
    return heatmap.pooled


def _layer_scores(pooled: Mapping[str, Any], place: int) -> dict[str, Tensor]:
    layer = {block: scores[place] for block, scores in pooled.items()}
    return {
        block: scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores))  # a copy: may be read-only
        for block, scores in layer.items()
    }
