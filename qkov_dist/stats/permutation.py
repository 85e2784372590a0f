"""What a head's statistics become when samples are relabelled.

M [N, N] holds one head's scores among all pooled samples: the n_a samples of task A first, M[i, j] with i in the left
role and j in the right. A labelling is a vector a of zeros and ones with n_a ones, b = 1 - a, and m_xy is the mean of
M over pairs (x, y) of different samples. A sample against itself or a copy of itself says nothing about its task: such
pairs are left out wherever a labelling puts them, and the numbers of pairs follow the labelling:

    cross_mean = m_ab                    overlap = 1/2 log(m_ab m_ba / (m_aa m_bb))

The sums under these means are products with the labels (``pair_sums``), so that all labellings of a head cost one
matrix product. Column 0 of the labels is always the observed one. Hence a p-value is a plain count over the columns
divided by P: (1 + #{as extreme}) / (1 + K) with K drawn labellings, and #{as extreme} / C(N, n_a) when all labellings
are enumerated. Differences that rounding explains are ties and count as extreme: equal labellings, or the swapped one
(which has the same overlap when n_a = n_b), give different last bits in different columns of one product.

Two-sided, as extreme means as far from the mean over labellings. That of ``cross_mean`` is known without drawing any:
every ordered pair of different samples is as often in (A, B) as any other, so that it is the mean over all of them.
The mean over K drawn labellings in its place moves by 1 / sqrt(K) of the null's sd from seed to seed, which up to
doubles the noise of p. As a number that no relabelling changes, the exact mean leaves p valid. Where copies make the
number of pairs depend on the labelling, it is the ratio of the expectations of sum and number: off from the expectation
of the ratio by at most the relative sd of that number (of the order of 1 / N^2 for a few copies), in sd of the
statistic. For ``overlap``, a logarithm of ratios, there is no such formula; where all labellings are enumerated none is
needed.

Labellings depend on the seed and the two sample counts alone, never on heads, blocks or ranks, so that processes
holding different heads relabel them together, and the family-wise p-value needs one all-reduce (max) of P numbers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkov_dist.stats import pair_sums

from .pair_sums import PairSums

Alternative = Literal["greater", "less", "two-sided"]
_SIGNS: dict[Alternative, tuple[int, ...]] = {"greater": (1,), "less": (-1,), "two-sided": (1, -1)}


@dataclass(frozen=True)
class Labels:
    """P labellings of N samples: ``a`` [N, P] float64, 1 where the sample is called A; column 0 is the observed one."""

    a: Tensor
    n_a: int
    n_b: int
    exhaustive: bool


class PairCounts(NamedTuple):
    """How many pairs of different samples each sum runs over, each [..., P]; (b, a) has as many as (a, b).

    ``log`` is what the numbers of pairs add to the logarithm of sums in ``overlap``.
    """

    aa: Tensor
    ab: Tensor
    bb: Tensor
    log: Tensor

    @staticmethod
    def of(sums: PairSums) -> PairCounts:
        """From the sums of a matrix of ones."""
        aa, ab, bb = (part.round() for part in (sums.aa, sums.ab, sums.bb))
        return PairCounts(aa, ab, bb, 0.5 * (aa.log() + bb.log()) - ab.log())


@dataclass(frozen=True)
class Null:
    """One statistic of some heads under every labelling.

    ``values`` [..., P] float64, NaN for an absent head; ``rounding`` [...] is the most that arithmetic moves a value.
    ``exact_mean`` [...] is the mean over all labellings that exist, where it is known without them.
    """

    values: Tensor
    rounding: Tensor
    exact_mean: Tensor | None = None

    def reference(self, exhaustive: bool) -> Tensor:
        """The null distribution: all labellings where they are enumerated, else those drawn (column 0 was not)."""
        return self.values if exhaustive else self.values[..., 1:]

    def mean(self, reference: Tensor) -> Tensor:
        """The null's mean [...], exact where it is known, else that of ``reference`` [..., any] of its values."""
        return reference.mean(-1) if self.exact_mean is None else self.exact_mean


class Standardised(NamedTuple):
    """One statistic of some heads in units of its own spread: ``z`` [..., P], NaN for an absent head.

    Two z that differ by less than ``tolerance`` [...] are a tie. A head that no relabelling changes has z = 0 and an
    infinite tolerance: all its labellings are ties, hence p = 1.
    """

    z: Tensor
    tolerance: Tensor


def draw_labels(seed: int, n_a: int, n_b: int, num_permutations: int) -> Labels:
    """All labellings where there are at most ``num_permutations``, else the observed one and that many drawn."""
    total = n_a + n_b
    if math.comb(total, n_a) <= num_permutations:
        chosen = np.array(list(itertools.combinations(range(total), n_a)))  # the first is 0 .. n_a - 1: the observed
        a = np.zeros((len(chosen), total))
        np.put_along_axis(a, chosen, 1.0, axis=1)
        return Labels(torch.from_numpy(a.T.copy()), n_a, n_b, exhaustive=True)
    observed = (np.arange(total) < n_a).astype(np.float64)
    rng = np.random.default_rng((seed, n_a, n_b, 0))
    drawn = rng.permuted(np.tile(observed, (num_permutations, 1)), axis=1)
    return Labels(torch.from_numpy(np.vstack([observed, drawn]).T.copy()), n_a, n_b, exhaustive=False)


def pair_counts(labels: Labels, pairs: Tensor) -> PairCounts:
    """Pairs under every labelling, each [P]: the sums of a matrix of ones."""
    return PairCounts.of(pair_sums.relabelled_sums(pairs.double(), labels.a, pairs))


def head_nulls(
    scores: Tensor, labels: Labels, pairs: Tensor, counts: PairCounts, *, with_overlap: bool = True
) -> dict[str, Null]:
    """``cross_mean`` and, on request, ``overlap`` of each head under every labelling.

    An overlap whose four means are not all above rounding in *every* labelling is NaN in all of them. That rule treats
    the observed labelling like the others, so leaving such heads out of the corrections keeps these valid.

    Args:
        scores: [..., N, N], heads leading, any float dtype, on any device with float64; NaN for an absent head.
        labels: The labellings, the same for all heads of all blocks and on all ranks.
        pairs: Which pairs are of different samples, bool [N, N].
        counts: How many these are under every labelling.
        with_overlap: False for signed scores, whose means may be negative.
    """
    sums = pair_sums.relabelled_sums(scores, labels.a.to(scores.device), pairs)
    exact_mean = None if labels.exhaustive else mean_of_all_pairs(sums, counts)
    nulls = {"cross_mean": Null(mean_of_pairs(sums, counts), sums.rounding / float(counts.ab.min()), exact_mean)}
    if with_overlap:
        values = overlap_of_pairs(sums, counts)
        values = torch.where(values.isfinite().all(-1, keepdim=True), values, torch.nan)
        slope = sum((1 / part[..., 0] for part in sums[:4]), start=torch.zeros_like(sums.rounding))  # of log(sum)
        nulls["overlap"] = Null(values, 0.5 * sums.rounding * slope)
    return nulls


def mean_of_pairs(sums: PairSums, counts: PairCounts) -> Tensor:
    """``cross_mean`` [..., P]."""
    return sums.ab / counts.ab.to(sums.ab)


def mean_of_all_pairs(sums: PairSums, counts: PairCounts) -> Tensor:
    """The mean [...] of M over all ordered pairs of different samples: what ``cross_mean`` is on average."""
    total, pairs = (of.aa[..., 0] + of.bb[..., 0] for of in (sums, counts))
    return (total + sums.ab[..., 0] + sums.ba[..., 0]) / (pairs + 2 * counts.ab[..., 0]).to(total)


def overlap_of_pairs(sums: PairSums, counts: PairCounts) -> Tensor:
    """``overlap`` [..., P]; NaN where a sum is not above its rounding: its logarithm would be noise."""
    values = (sums.ab / sums.aa).mul_(sums.ba / sums.bb).log_().mul_(0.5).add_(counts.log.to(sums.ab))
    smallest = torch.minimum(sums.aa, sums.ab)
    smallest = torch.minimum(torch.minimum(smallest, sums.ba, out=smallest), sums.bb, out=smallest)
    return values.masked_fill_(~(smallest > sums.rounding.unsqueeze(-1)), torch.nan)


def standardise(null: Null) -> Standardised:
    """How far from its mean over the labellings each head is under every labelling, in sd.

    Each head is centred by its own mean, exact or over the labellings, and scaled by its sd about it. Without that,
    the maximum over heads would be that of the few heads with the largest scores (they differ by orders of magnitude
    between layers), and all others would be tested against it in vain. The observed labelling is one of the P, so
    that all are treated alike and p-values from z are exact.
    """
    deviation = null.values - null.mean(null.values).unsqueeze(-1)
    sd = deviation.square().mean(-1).sqrt()
    moves = ~(sd <= null.rounding)
    z = torch.where(moves.unsqueeze(-1), deviation / sd.unsqueeze(-1), 0.0)
    return Standardised(z, torch.where(moves, 4 * null.rounding / sd, torch.inf))


def directed(values: Tensor, alternative: Alternative) -> Tensor:
    """Deviations from a mean, turned so that larger is more extreme."""
    return {"greater": values, "less": -values, "two-sided": values.abs()}[alternative]


def threshold(standardised: Standardised, alternative: Alternative) -> Tensor:
    """The least directed z [...] that is as extreme as the observed one, ties included; NaN for an absent head."""
    z, tolerance = standardised
    return directed(z[..., 0], alternative) - tolerance


def p_value(standardised: Standardised, alternative: Alternative) -> Tensor:
    """The p-value [...] of each head by itself."""
    return count_p(threshold(standardised, alternative), directed(standardised.z, alternative))


def count_p(least: Tensor, extremes: Tensor) -> Tensor:
    """Share of labellings whose directed z [..., P] is at least the threshold ``least`` [...]; NaN stays NaN."""
    extreme = extremes >= least.unsqueeze(-1)
    return torch.where(least.isnan(), torch.nan, extreme.sum(-1).to(torch.float64) / extremes.shape[-1])


def family_wise_p(least: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Westfall-Young single-step p-value [...] of heads with a ``threshold`` [...] each; NaN stays NaN.

    It is the share of labellings under which the largest directed z of any head, ``max_over_heads`` [P], is as extreme:
    never less than the head's own, as the head itself is among those the maximum runs over.
    """
    less = np.searchsorted(np.sort(largest), least)
    return np.where(np.isnan(least), np.nan, (len(largest) - less) / len(largest))


def max_over_heads(standardised: Standardised, alternative: Alternative) -> Tensor:
    """The largest directed z [P] of any head under each labelling; -inf where no head takes part."""
    z, tolerance = standardised
    takes_part = tolerance.isfinite()  # not an absent head, nor one that no relabelling changes
    return torch.where(takes_part.unsqueeze(-1), directed(z, alternative), -torch.inf).reshape(-1, z.shape[-1]).amax(0)


def effect_size(null: Null, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Cohen's d of the observed value against the null distribution, and the null sd in it, both [...]."""
    reference = null.reference(exhaustive)
    mean = null.mean(reference)
    sd = (reference - mean.unsqueeze(-1)).square().mean(-1).sqrt()
    d = (null.values[..., 0] - mean) / sd
    return torch.where(sd <= null.rounding, 0.0, d), sd


def in_order(null: Null, exhaustive: bool) -> Tensor:
    """The null distribution from the least to the largest; absent heads stay NaN."""
    return _sorted(null.reference(exhaustive))


def detectable_shift(
    null: Null, ordered: Tensor, labels: Labels, alternative: Alternative, alpha: float, power: float
) -> Tensor:
    """The smallest shift [...] of a head's null distribution that a test of this head alone finds with ``power``.

    It is the distance from the critical value to the quantile of the null that ``power`` of it lies beyond (for a
    normal null 2.49 sd, one-sided at 0.05 and 0.8); two-sided it is the worse of the two directions. Infinite where
    so few labellings exist that no p-value can be as small as alpha; NaN where no relabelling changes the head.
    ``ordered`` is the null ``in_order``.
    """
    deviation = ordered - null.mean(null.reference(labels.exhaustive)).unsqueeze(-1)
    turned = {1: deviation, -1: -deviation.flip(-1)}  # both from the least to the largest
    signs = _SIGNS[alternative]
    critical = _quantile(_sorted(deviation.abs()) if len(signs) > 1 else turned[signs[0]], 1 - alpha)
    starts = [_quantile(turned[sign], 1 - power) for sign in signs]
    shift = critical - torch.stack(starts).amin(0)
    if alpha * labels.a.shape[1] < 1:
        shift = torch.where(shift.isnan(), shift, torch.inf)
    return torch.where(deviation.square().mean(-1).sqrt() <= null.rounding, torch.nan, shift)


def null_band(null: Null, ordered: Tensor, exhaustive: bool, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the null distribution, ``in_order`` too, and both ends of its middle ``share``, each [...]."""
    tail = (1 - share) / 2
    return null.mean(null.reference(exhaustive)), _quantile(ordered, tail), _quantile(ordered, 1 - tail)


def _sorted(values: Tensor) -> Tensor:
    """Along the last dimension, NaN last; on a CPU by numpy, whose sort uses its vector units."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort().values


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """``torch.quantile`` of the last dimension of values in order."""
    last = ordered.shape[-1] - 1
    place = int(share * last)
    return ordered[..., place].lerp(ordered[..., min(place + 1, last)], share * last - place)
