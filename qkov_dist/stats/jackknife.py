r"""How far a head's statistics would move with other samples: delete-one jackknife over the samples of both tasks.

    theta_-i       the statistic without sample i;  n, m the numbers of samples of A and B
    bias           (n - 1) (mean_{i in A} theta_-i - theta) + (m - 1) (mean_{j in B} theta_-j - theta)
    variance       v_A + v_B,  v_A = (n - 1) / n sum_{i in A} (theta_-i - mean)^2,  v_B alike
    interval       theta - bias ± t sqrt(variance), t of Satterthwaite's degrees of freedom of v_A + v_B
    of overlap     every x with |theta - x| <= t sqrt(variance (1 + min(|x / theta|, 1)) / 2)
                   v_A = sum_{i in A} h_i (theta_-i - mean)^2,  h_i = (1 - p_i)^2 / (1 - 2 p_i + sum_k p_k^2)

Pairs share samples, so that samples are left out, never pairs. ``cross_mean`` of non-negative scores is taken on the
log scale, where its distribution is less skewed. ``overlap`` is a logarithm as it is; its theta is first freed of what
samples of unequal norms do to it (``loud_samples``), which is its bias correction: what bias the jackknife still finds
there is noise. So an interval need not hold the value that it belongs to. The interval of an effect size is that of its
distance from the null, both without the same sample: the null under some of the labellings, from all of which sample i
is taken; without bias correction, because an effect size grows with the number of samples.

Where samples are not equally loud, (n - 1) / n is too much. Be p_i how much of its task sample i is, as in a mean that
weighs samples by p. Without i that mean moves by p_i r_i / (1 - p_i), r_i being how far i is from it; and r_i has
1 - 2 p_i + sum p^2 of a sample's variance. With h_i the sum is the variance of the mean, without bias; it is
(n - 1) / n where all p are 1 / n. p_i is the mean of a sample's shares in both roles (``loud_samples``); where
samples move scores through the Fisher, too, the share in the role of i, in which ``interference`` squares gradients as
I does. Degrees of freedom of overlap are Satterthwaite's without the bias that estimated variances bring (Welch, The
generalization of Student's problem, Biometrika 34, 1947): (v_A + v_B)^2 / (v_A^2 / (n + 1) + v_B^2 / (m + 1)) - 2.

Near 0, where tasks are alike, overlap is of second order in the samples: single ones have no share in it, pairs alone
have. The jackknife counts the variance of pairs twice, V_1 + 2 V_2 for V_1 + V_2, and is twice what it should be where
V_1 is 0. V_1, what single samples add, grows about as overlap does from 0 on. A true overlap x is therefore judged by
the variance that belongs to it: half the jackknife's at 0, all of it from theta on. Between them that is no less than
V_1 x / theta + V_2; it shortens an interval on the side of 0 alone. (To subtract an estimate of V_2 everywhere does not
do: V_2 is large where samples are loud and variances least certain, and too few of those intervals held the truth.)
For ``interference`` overlap can also be 0 between tasks that differ; V_1 is not 0 there, and intervals hold such a 0 a
little less often than they should.

The Fisher is the mean over the very samples that are scored. Where it is known what single samples do through it,
theta and theta_-i of overlap are without their own shares (``without_own_shares``), and theta_-i is under a Fisher
without sample i: a sample that is large where its task is large makes that weight count for less, so that overlap
varies less than scores under a given Fisher would have it. All else takes the Fisher as given.
How often intervals cover is in tests/studies/results/coverage.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from qkov_dist.scoring.own_share_records import KNOWN
from qkov_dist.stats import loud_samples, pair_sums
from qkov_dist.stats.without_own_shares import has_copies, without_own_shares

from .permutation import Labels, PairCounts, mean_of_all_pairs, mean_of_pairs, overlap_of_pairs

LABELLINGS = 100  # under which the null is looked at again without each sample
_CACHED_BYTES = 512 << 10  # of an array [heads, N, P]: some heads at a time where samples are few


class Interval(NamedTuple):
    """Both ends of an interval, each [heads]; NaN where there is none."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class LeftOut:
    """What the intervals of all heads share.

    Attributes:
        a: The labellings that are looked at without each sample [N, P], the observed one first.
        pairs: Which pairs are of different samples, bool [N, N].
        counts: How many these are under each labelling [1, P], and without each sample [1, N, P].
        n_a: Samples of A.
    """

    a: Tensor
    pairs: Tensor
    counts: tuple[PairCounts, PairCounts]
    n_a: int

    @staticmethod
    def of(labels: Labels, pairs: Tensor) -> LeftOut:
        """The observed labelling and some of the others."""
        others = labels.a.shape[1] - 1
        chosen = torch.linspace(1, others, min(others, LABELLINGS), dtype=torch.float64).round().long()
        a = labels.a[:, torch.cat([chosen.new_zeros(1), chosen])]
        sums = pair_sums.left_out_sums(pairs.unsqueeze(0).double(), a, pairs)  # of a matrix of ones
        whole, left_out = map(PairCounts.of, sums)
        return LeftOut(a, pairs, (whole, left_out), labels.n_a)

    def overlap(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """That of scores [heads, N, N] as they are labelled [heads], and without each sample [heads, N]."""
        sums = pair_sums.left_out_sums(scores, self.a[:, :1].to(scores.device), self.pairs)
        counts = (PairCounts._make(of[..., :1] for of in part) for part in self.counts)
        value, left_out = (overlap_of_pairs(*part)[..., 0] for part in zip(sums, counts, strict=True))
        return value, left_out


def intervals(
    scores: Tensor,
    shared: LeftOut,
    effects: Mapping[Any, Tensor],
    confidence: float,
    known: Tensor | None = None,
) -> dict[Any, tuple[Interval, Interval]]:
    """By statistic, the interval of its value and that of its effect size.

    Args:
        scores: [heads, N, N], NaN for an absent head.
        shared: Labellings and pairs.
        effects: Statistic -> the effect size of each head [heads]; these are the statistics looked at.
        confidence: Of the intervals.
        known: What samples do through the Fisher (``scoring.own_share_records``), [heads, KNOWN, N]; None where it is
            not known.
    """
    at_once = _CACHED_BYTES if scores.device.type == "cpu" else pair_sums.GPU_BYTES
    step = max(at_once // (8 * shared.a.numel()), 1)
    of_parts = [None] * len(scores) if known is None else torch.split(known, step)
    looked_at = [
        _left_out(heads, shared, effects, of_heads)
        for heads, of_heads in zip(torch.split(scores, step), of_parts, strict=False)
    ]
    found = {}
    for name, effect in effects.items():
        value, values, of_effects, *parts = map(torch.cat, zip(*(of[name] for of in looked_at), strict=True))
        value = torch.where(effect.isnan(), torch.nan, value)  # undefined under some labelling
        if name == "overlap":
            own = _interval_of_overlap(value, values, parts[0], shared.n_a, confidence)
        else:
            own = _interval_of_value(value, values, shared.n_a, confidence, log="overlap" in effects)
        width = _half_width(of_effects, shared.n_a, confidence)
        found[name] = own, Interval(effect - width, effect + width)
    return found


def _left_out(
    scores: Tensor, shared: LeftOut, names: Iterable[Any], known: Tensor | None
) -> dict[Any, tuple[Tensor, ...]]:
    """By statistic, each head's value [heads], and its values and effect sizes without each sample [heads, N].

    An effect size without a sample is the distance from the null's mean, in sd about it, all without that sample. An
    overlap is freed of what unequal norms do to it, and of what own shares of the Fisher do; with it comes how much of
    its task each sample is [heads, N].
    """
    sums = pair_sums.left_out_sums(scores, shared.a.to(scores.device), shared.pairs)
    found: dict[Any, tuple[Tensor, ...]] = {}
    for name in names:
        values, left_out = (_statistic(name, *part) for part in zip(sums, shared.counts, strict=True))
        null, of_all = left_out[..., 1:], mean_of_all_pairs(sums[1], shared.counts[1])
        mean = of_all if name == "cross_mean" else null.mean(-1)
        effects = (left_out[..., 0] - mean) / (null - mean.unsqueeze(-1)).square().mean(-1).sqrt()
        found[name] = values[:, 0], left_out[..., 0], effects
    if "overlap" in found:
        value, left_out, effects = found["overlap"]
        known = None if has_copies(shared.pairs) else known
        if known is not None:
            scores = without_own_shares(scores, known, shared.pairs, shared.n_a)
            value, left_out = shared.overlap(scores)
            left_out = left_out + known[:, KNOWN.index("overlap")].to(left_out)
        shift = loud_samples.shift(scores, shared.pairs, shared.n_a)
        part = (shift.rows + shift.columns) / 2 if known is None else shift.rows
        found["overlap"] = value + shift.whole, left_out + shift.left_out, effects, part
    return found


def _statistic(name: str, sums: pair_sums.PairSums, counts: PairCounts) -> Tensor:
    return mean_of_pairs(sums, counts) if name == "cross_mean" else overlap_of_pairs(sums, counts)


def _interval_of_value(value: Tensor, left_out: Tensor, n_a: int, confidence: float, *, log: bool) -> Interval:
    """Value [heads] and without each sample [heads, N] -> its interval."""
    if log:
        value, left_out = value.log(), left_out.log()
    width = _half_width(left_out, n_a, confidence)
    parts = left_out[..., :n_a], left_out[..., n_a:]
    value = value - sum((part.shape[-1] - 1) * (part.mean(-1) - value) for part in parts)
    low, high = value - width, value + width
    return Interval(low.exp(), high.exp()) if log else Interval(low, high)


def _interval_of_overlap(value: Tensor, left_out: Tensor, part: Tensor, n_a: int, confidence: float) -> Interval:
    """The same of an overlap, which is bias-corrected already; ``part`` is how much of its task a sample is."""
    width = _half_width(left_out, n_a, confidence, part)
    inner = _width_towards_zero(value, width)
    return Interval(value - torch.where(value > 0, inner, width), value + torch.where(value < 0, inner, width))


def _width_towards_zero(value: Tensor, width: Tensor) -> Tensor:
    """How far an interval reaches from an overlap towards 0 and beyond, as far as ``width`` on the other side.

    With w = width and v = |value| it is where d^2 = w^2 (1 + |v - d| / v) / 2, at most w. Short of 0 that is
    d = w (sqrt(1 + q^2) - q), q = w / 4v; beyond 0 it is d = w^2 / 2v, the larger of the two there and only there.
    """
    ratio = torch.where(value == 0, torch.inf, width / (4 * value.abs()))
    return width * torch.maximum(1 / ((1 + ratio.square()).sqrt() + ratio), (2 * ratio).clamp(max=1))


def _half_width(left_out: Tensor, n_a: int, confidence: float, part: Tensor | None = None) -> Tensor:
    """Of statistics without each sample [heads, N]; ``part`` is how much of its task each is, None for all alike."""
    tasks = slice(0, n_a), slice(n_a, left_out.shape[-1])
    sizes = [task.stop - task.start for task in tasks]
    if min(sizes) < 3:  # without one of two samples a task has no pair
        return left_out.new_full(left_out.shape[:-1], torch.nan)
    if part is None:
        variances = [_variance(left_out[..., task], (n - 1) / n) for n, task in zip(sizes, tasks, strict=True)]
        more, less = -1, 0
    else:
        variances = [_variance(left_out[..., task], _of_unequal(part[..., task])) for task in tasks]
        more, less = 1, 2
    total = variances[0] + variances[1]
    spread = sum(v.square() / (n + more) for n, v in zip(sizes, variances, strict=True))
    freedom = torch.where(total > 0, total.square() / spread - less, torch.where(total.isnan(), torch.nan, 1.0))
    quantile = stdtrit(freedom.numpy(force=True), 0.5 + confidence / 2)  # of Student's t
    return torch.as_tensor(quantile, dtype=total.dtype, device=total.device) * total.sqrt()


def _variance(left_out: Tensor, factors: Tensor | float) -> Tensor:
    return (factors * (left_out - left_out.mean(-1, keepdim=True)).square()).sum(-1)


def _of_unequal(part: Tensor) -> Tensor:
    """The h_i of samples that are so much of their task, [heads, n]; 1 where one is all of it."""
    rest = (1 - part).square()
    of_mean = rest + part.square().sum(-1, keepdim=True) - part.square()  # 1 - 2 p_i + sum p^2
    return torch.where(of_mean > 0, rest / of_mean, 1.0)
