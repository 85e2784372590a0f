"""Which heads do two tasks fight over? Permutation tests on pooled scores: arrays in, results out.

The null hypothesis is that task labels are exchangeable over the pooled samples. All heads of all blocks are relabelled
together (``permutation``), then corrected: Benjamini-Hochberg and Benjamini-Yekutieli per block over its native heads,
and the family-wise maximum over all heads of all blocks. Absent heads are NaN and take part in nothing.

Two statistics are tested; one, ``overlap`` where it is defined, decides ``results["fdr_corrected"]``. Both are valid
tests of exchangeability, but ``cross_mean`` answers another question. If B's gradients equal A's but for a factor, the
``interference`` m_ab exceeds its mean over labellings whenever A's are up to 1 + sqrt(2) times larger (the root of
4 r^2 = (1 + r^2)(1 + r)): every head becomes "significant" because one task has the larger loss. For ``symmetric`` it
never does, as r <= (1 + r)^2 / 4. The observed ``overlap`` has no such factor in it: m_ab m_ba and m_aa m_bb scale
alike. Unequal scales still widen and raise its *null* (mixed groups are more varied), which makes ``greater``
conservative but lets ``less`` and ``two-sided`` find scale alone: do not read those as a lack of conflict. Self-pairs
being excluded, the null mean is slightly above 0: compare with the null (``effect_size``), not with 0.
For ``signed``, whose means may be negative, only ``cross_mean`` exists: ``greater`` finds synergy, ``less`` conflict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from . import permutation
from .errors import QkovError
from .head_tests import Design, Floats, HeadTests, Statistic, correct, family_max, head_tests, join
from .permutation import Alternative
from .results import Heatmap


class StatisticsResult(dict[str, Any]):
    """What was tested, how, and what is significant.

    ``fdr_corrected``: block -> records of its significant heads by q-value: dicts of block, layer, head (the model's
        numbers), statistic (its name), value, p_value, q_value, q_value_by, p_max, effect_size.
    ``cross_mean`` and, but for signed scores, ``overlap``: block -> name -> [layer, native head], NaN where absent.
    ``undefined``: block -> (layer, head) of present heads without an overlap, as one of its means is zero.
    ``settings``: numbers, names and flags. ``notes``: sentences that a reader of the p-values should see.
    """

    def arrays(self) -> dict[str, dict[str, dict[str, Floats]]]:
        """Statistic -> block -> name -> [layer, native head] float64, as stored under ``/statistics``."""
        return {name: self[name] for name in get_args(Statistic) if name in self}


@dataclass(frozen=True)
class QKOVStatistics:
    """The tests of a heatmap and their settings.

    Args:
        fdr_alpha: A head is significant where its Benjamini-Hochberg q-value is at most this.
        n_permutations: Labellings to draw; where no more than these exist, all are enumerated instead.
        n_bootstrap: Resamples for the intervals; 0 leaves these NaN.
        seed: Of labellings and resamples.
        alternative: ``greater``, ``less`` or ``two-sided`` (deviation from the null mean).
        statistic: Which one decides ``fdr_corrected``; None is ``overlap``, or ``cross_mean`` for signed scores.
        confidence: Of the percentile bootstrap intervals.
        power: At which the smallest detectable effect is given, for one head tested alone at ``fdr_alpha``.

    Raises:
        QkovError: for a setting out of range.
    """

    fdr_alpha: float = 0.05
    n_permutations: int = 1000
    n_bootstrap: int = 1000
    seed: int = 0
    alternative: Alternative = "greater"
    statistic: Statistic | None = None
    confidence: float = 0.95
    power: float = 0.8

    def __post_init__(self) -> None:
        between = {name: 0 < getattr(self, name) < 1 for name in ("fdr_alpha", "confidence", "power")}
        at_least = {"n_permutations": 2, "n_bootstrap": 0, "seed": 0}
        choices = {"alternative": get_args(Alternative), "statistic": (None, *get_args(Statistic))}
        wrong = (
            [(name, "a number between 0 and 1") for name, is_right in between.items() if not is_right]
            + [(name, f"at least {least}") for name, least in at_least.items() if getattr(self, name) < least]
            + [(name, f"one of {known}") for name, known in choices.items() if getattr(self, name) not in known]
        )
        for name, expected in wrong:
            got = repr(getattr(self, name))
            raise QkovError(f"statistics.{name}", expected=expected, got=got, remedy="Change this setting.")

    def design(self, n_a: int, n_b: int, names: tuple[Statistic, ...] = ("cross_mean", "overlap")) -> Design:
        """What the tests of all heads share: a function of the settings and the sample counts alone."""
        labels = permutation.draw_labels(self.seed, n_a, n_b, self.n_permutations)
        resamples = permutation.draw_resamples(self.seed, n_a, n_b, self.n_bootstrap)
        return Design(labels, resamples, names, self.alternative, self.fdr_alpha, self.power, self.confidence)

    def test_heatmap(self, heatmap: Heatmap) -> StatisticsResult:
        """Test every native head of every block.

        Raises:
            QkovError: without pooled scores, with fewer than two samples of a task, for a score of a present head
                that is not finite, and where ``overlap`` is asked of signed scores.
        """
        names = self._names(str(heatmap.attributes["score"]))
        pooled = _pooled_scores(heatmap)
        design = self.design(len(heatmap.samples_a.ids), len(heatmap.samples_b.ids), names)
        tests = {
            block: [head_tests(_layer_scores(heatmap, block, place), design) for place in range(len(heatmap.layers))]
            for block in pooled
        }
        return self._result(heatmap, design, tests)

    def _names(self, score: str) -> tuple[Statistic, ...]:
        if score != "signed":
            return ("cross_mean", "overlap")
        if self.statistic == "overlap":
            remedy = "Use statistic='cross_mean', or score: interference or symmetric."
            raise QkovError(
                "statistics.statistic", expected="cross_mean for signed scores", got="overlap", remedy=remedy
            )
        return ("cross_mean",)

    def _result(
        self, heatmap: Heatmap, design: Design, tests: Mapping[str, Sequence[Mapping[Statistic, HeadTests]]]
    ) -> StatisticsResult:
        result = StatisticsResult()
        for name in design.names:
            joined = {block: join([layer[name] for layer in layers]) for block, layers in tests.items()}
            max_z = family_max(joined.values())
            shape = (len(heatmap.layers), -1)
            result[name] = {
                block: {key: array.reshape(shape) for key, array in correct(part, max_z).items()}
                for block, part in joined.items()
            }
        deciding = self.statistic or design.names[-1]
        result["fdr_corrected"] = {
            block: significant_heads(heatmap, block, deciding, arrays, self.fdr_alpha)
            for block, arrays in result[deciding].items()
        }
        result["undefined"] = {block: _undefined(heatmap, block, result) for block in tests}
        result["settings"] = self._settings(heatmap, design, deciding)
        result["notes"] = _notes(result)
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


def significant_heads(
    heatmap: Heatmap, block: str, name: Statistic, arrays: Mapping[str, Floats], alpha: float
) -> list[dict[str, Any]]:
    """Records of the heads of one block with q-value at most alpha: by q, then p, then distance from the null."""
    keys = ("p_value", "q_value", "q_value_by", "p_max", "effect_size")
    heads = heatmap.natives(block)
    records = [
        {"block": block, "layer": heatmap.layers[layer], "head": heads[head], "statistic": name}
        | {"value": float(arrays["statistic"][layer, head])}
        | {key: float(arrays[key][layer, head]) for key in keys}
        for layer, head in np.argwhere(arrays["q_value"] <= alpha)
    ]
    return sorted(records, key=lambda record: (record["q_value"], record["p_value"], -abs(record["effect_size"])))


def _undefined(heatmap: Heatmap, block: str, result: StatisticsResult) -> list[tuple[int, int]]:
    if "overlap" not in result:
        return []
    without = np.isnan(result["overlap"][block]["statistic"]) & np.isfinite(result["cross_mean"][block]["statistic"])
    return [(heatmap.layers[layer], heatmap.natives(block)[head]) for layer, head in np.argwhere(without)]


def _notes(result: StatisticsResult) -> tuple[str, ...]:
    settings, notes = result["settings"], []
    if not settings["exactly_exchangeable"]:
        notes.append(
            "Labels are nearly, not exactly, exchangeable: the Fisher weights samples by their place or task. "
            "fisher.estimator: mean with fisher.scope: pooled makes them exactly so."
        )
    blocks = result[settings["statistic"]].values()
    most = max((int(np.isfinite(arrays["p_value"]).sum()) for arrays in blocks), default=0)
    if most * settings["smallest_p"] > settings["fdr_alpha"]:
        needed, method = math.ceil(most / settings["fdr_alpha"]), settings["method"]
        remedy = "more samples" if method == "exhaustive" else f"statistics.permutations: {needed}"
        notes.append(
            f"With {settings['n_labellings']} labellings no p-value is below {settings['smallest_p']:.2g}, so that a "
            f"single head among {most} cannot pass the FDR correction on its own; that takes {remedy}."
        )
    if missing := sum(map(len, result["undefined"].values())):
        notes.append(f"{missing} heads have no overlap, as a mean score of theirs is zero; they are not tested for it.")
    return tuple(notes)


def _pooled_scores(heatmap: Heatmap) -> Mapping[str, Any]:
    if heatmap.pooled is None:
        raise QkovError(
            "statistics",
            expected="scores among all pooled samples",
            got="scores between the two tasks only",
            remedy='Use compute_heatmap(..., pairs="all"), or statistics.enabled: true in the run\'s configuration.',
        )
    for task, samples in (("a", heatmap.samples_a), ("b", heatmap.samples_b)):
        if len(samples.ids) < 2:
            got, remedy = f"{len(samples.ids)}", "Raise max_samples, or add samples to the task."
            raise QkovError(f"statistics, task {task}", expected="at least 2 samples", got=got, remedy=remedy)
    return heatmap.pooled


def _layer_scores(heatmap: Heatmap, block: str, place: int) -> Tensor:
    """The scores [head, N, N] of one layer, checked; a head is absent where all of them are NaN."""
    assert heatmap.pooled is not None
    stored = heatmap.pooled[block][place]
    scores = stored if isinstance(stored, Tensor) else torch.from_numpy(np.array(stored))  # a copy: may be read-only
    present = ~scores.isnan().all(-1).all(-1)
    wrong = ~scores.isfinite() & present[:, None, None]
    if wrong.any():
        head, left, right = wrong.nonzero()[0].tolist()
        ids = (*heatmap.samples_a.ids, *heatmap.samples_b.ids)
        where = f"layer {heatmap.layers[place]}, block {block}, head {heatmap.natives(block)[head]}"
        raise QkovError(
            f"{where}, samples {ids[left]!r} and {ids[right]!r}",
            expected="a finite score",
            got=f"{scores[head, left, right].item()}",
            remedy="These samples' gradients overflow: widen compute.score_dtype or model.dtype, or leave them out.",
        )
    return scores
