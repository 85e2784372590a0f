"""What a head's statistics become when samples are relabelled or resampled.

M [N, N] holds one head's scores among all pooled samples: the n_a samples of task A first, M[i, j] with i in the left
role and j in the right. A labelling is a vector a of zeros and ones with n_a ones, b = 1 - a, and m_xy is the mean of
M over pairs (x, y) of different samples (a sample against itself says nothing about its task, so the diagonal is
excluded throughout):

    cross_mean = m_ab                    overlap = 1/2 log(m_ab m_ba / (m_aa m_bb))

With the diagonal of M set to zero, r = M 1 and c = M' 1:

    a'Mb = a'r - a'Ma      b'Ma = a'c - a'Ma      b'Mb = 1'r - a'r - a'c + a'Ma

so that P labellings cost one product M @ L, L [N, P]. Column 0 of L is always the observed labelling. Hence a p-value
is a plain count over the columns divided by P: (1 + #{as extreme}) / (1 + K) with K drawn labellings, and
#{as extreme} / C(N, n_a) when all labellings are enumerated.

Sums are float64 because b'Mb is a difference: where task A's gradients are r times larger, it is about r^-3 of the
total, which leaves no digit in float32 at r = 200 and eight in float64. A sum is off by at most about N eps sum|M| for
each of its terms (``_rounding``). Differences below that are ties and count as extreme: equal labellings, or the
swapped one (which has the same overlap when n_a = n_b), give different last bits in different columns of one product.

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

Alternative = Literal["greater", "less", "two-sided"]
_SIGNS: dict[Alternative, tuple[int, ...]] = {"greater": (1,), "less": (-1,), "two-sided": (1, -1)}


@dataclass(frozen=True)
class Labels:
    """P labellings of N samples: ``a`` [N, P] float64, 1 where the sample is called A; column 0 is the observed one."""

    a: Tensor
    n_a: int
    n_b: int
    exhaustive: bool


class PairSums(NamedTuple):
    """Sums of M over the pairs (left role, right role) of two groups without self-pairs, each [..., P]."""

    aa: Tensor
    ab: Tensor
    ba: Tensor
    bb: Tensor


class PairCounts(NamedTuple):
    """How many pairs each sum runs over, each a scalar or [P]; (b, a) has as many as (a, b)."""

    aa: Tensor
    ab: Tensor
    bb: Tensor

    @staticmethod
    def of_groups(n_a: int, n_b: int) -> PairCounts:
        """The pairs of different samples among n_a and n_b of them."""
        numbers = (n_a * (n_a - 1), n_a * n_b, n_b * (n_b - 1))
        return PairCounts(*(torch.tensor(number, dtype=torch.float64) for number in numbers))


@dataclass(frozen=True)
class Null:
    """One statistic of some heads under every labelling.

    ``values`` [..., P] float64, NaN for an absent head; ``rounding`` [...] is the most that arithmetic moves a value.
    """

    values: Tensor
    rounding: Tensor

    def reference(self, exhaustive: bool) -> Tensor:
        """The null distribution: all labellings where they are enumerated, else those drawn (column 0 was not)."""
        return self.values if exhaustive else self.values[..., 1:]


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


def draw_resamples(seed: int, n_a: int, n_b: int, num_resamples: int) -> Tensor:
    """How often each sample is drawn, [N, num_resamples] float64, when each task is resampled with replacement.

    Resamples with fewer than two different samples of a task are drawn again: they have no pair of different samples.
    """
    rng = np.random.default_rng((seed, n_a, n_b, 1))
    counts = np.hstack([_draw_counts(rng, n_a, num_resamples), _draw_counts(rng, n_b, num_resamples)])
    return torch.from_numpy(counts.T.astype(np.float64).copy())


def _draw_counts(rng: np.random.Generator, num_samples: int, num_resamples: int) -> NDArray[np.int64]:
    probability = np.full(num_samples, 1 / num_samples)
    counts = rng.multinomial(num_samples, probability, size=num_resamples)
    while (alone := (counts > 0).sum(axis=1) < 2).any():
        counts[alone] = rng.multinomial(num_samples, probability, size=int(alone.sum()))
    return counts


def head_nulls(scores: Tensor, labels: Labels, *, with_overlap: bool = True) -> dict[str, Null]:
    """``cross_mean`` and, on request, ``overlap`` of each head under every labelling.

    An overlap whose four means are not all above rounding in *every* labelling is NaN in all of them. That rule treats
    the observed labelling like the others, so leaving such heads out of the corrections keeps these valid.

    Args:
        scores: [..., N, N], heads leading, any float dtype, on any device with float64; NaN for an absent head.
        labels: The labellings, the same for all heads of all blocks and on all ranks.
        with_overlap: False for signed scores, whose means may be negative.
    """
    off_diagonal = _without_self_pairs(scores)
    sums = _relabelled_sums(off_diagonal, labels.a.to(scores.device))
    counts = PairCounts.of_groups(labels.n_a, labels.n_b)
    rounding = _rounding(off_diagonal)
    nulls = {"cross_mean": Null(_cross_mean(sums, counts), rounding / float(counts.ab))}
    if with_overlap:
        values = _overlap(sums, counts, rounding)
        values = torch.where(values.isfinite().all(-1, keepdim=True), values, torch.nan)
        slope = sum((1 / part[..., 0] for part in sums), start=torch.zeros_like(rounding))  # of log(sum), per sum
        nulls["overlap"] = Null(values, 0.5 * rounding * slope)
    return nulls


def resampled_statistics(scores: Tensor, weights: Tensor, n_a: int, *, with_overlap: bool = True) -> dict[str, Tensor]:
    """The statistics [..., R] when sample i is counted ``weights[i]`` times (weights [N, R], scores [..., N, N]).

    Two copies of one sample are still a self-pair and are excluded: means run over the weight of different samples.
    """
    weights = weights.to(scores.device)
    off_diagonal = _without_self_pairs(scores)
    sums = _resampled_sums(off_diagonal, weights, n_a)
    in_a, in_b = weights[:n_a], weights[n_a:]
    sum_a, sum_b = in_a.sum(0), in_b.sum(0)
    counts = PairCounts(sum_a**2 - (in_a**2).sum(0), sum_a * sum_b, sum_b**2 - (in_b**2).sum(0))
    resampled = {"cross_mean": _cross_mean(sums, counts)}
    if with_overlap:
        resampled["overlap"] = _overlap(sums, counts, _rounding(off_diagonal))
    return resampled


def _without_self_pairs(scores: Tensor) -> Tensor:
    off_diagonal = scores.to(torch.float64, copy=True)
    off_diagonal.diagonal(dim1=-2, dim2=-1).zero_()
    return off_diagonal


def _rounding(off_diagonal: Tensor) -> Tensor:
    """Bound on the error of a sum over M's elements: 2 N eps for each of the at most four terms that make it up."""
    num_samples = off_diagonal.shape[-1]
    return 8 * num_samples * torch.finfo(torch.float64).eps * off_diagonal.abs().sum((-2, -1))


def _relabelled_sums(off_diagonal: Tensor, a: Tensor) -> PairSums:
    aa = (off_diagonal @ a).mul_(a).sum(-2)
    left, right = off_diagonal.sum(-1) @ a, off_diagonal.sum(-2) @ a  # a'r, a'c
    total = off_diagonal.sum((-2, -1)).unsqueeze(-1)
    return PairSums(aa, left - aa, right - aa, total - left - right + aa)


def _resampled_sums(off_diagonal: Tensor, weights: Tensor, n_a: int) -> PairSums:
    in_a, in_b = weights[:n_a], weights[n_a:]
    to_a, to_b = off_diagonal[..., :n_a] @ in_a, off_diagonal[..., n_a:] @ in_b
    return PairSums(
        aa=(to_a[..., :n_a, :] * in_a).sum(-2),
        ab=(to_b[..., :n_a, :] * in_a).sum(-2),
        ba=(to_a[..., n_a:, :] * in_b).sum(-2),
        bb=(to_b[..., n_a:, :] * in_b).sum(-2),
    )


def _cross_mean(sums: PairSums, counts: PairCounts) -> Tensor:
    return sums.ab / counts.ab.to(sums.ab)


def _overlap(sums: PairSums, counts: PairCounts, rounding: Tensor) -> Tensor:
    """NaN where a sum is not above its rounding: its logarithm would be noise."""
    log_counts = 0.5 * (counts.aa.log() + counts.bb.log()) - counts.ab.log()
    log_sums = 0.5 * (sums.ab.log() + sums.ba.log() - sums.aa.log() - sums.bb.log())
    smallest = torch.stack(sums).amin(0)
    return torch.where(smallest > rounding.unsqueeze(-1), log_sums + log_counts.to(log_sums), torch.nan)


def standardise(null: Null, alternative: Alternative) -> tuple[Tensor, Tensor]:
    """How extreme each labelling is, z [..., P], and the difference [...] below which two z are a tie.

    Each head is centred and scaled by its own mean and sd over the labellings. Without that, the maximum over heads
    would be that of the few heads with the largest scores (they differ by orders of magnitude between layers), and
    all others would be tested against it in vain. The observed labelling is one of the P, so that all are treated
    alike and p-values from z are exact. A head that no relabelling changes has z = -inf, hence p = 1.
    """
    deviation = null.values - null.values.mean(-1, keepdim=True)
    sd = deviation.square().mean(-1).sqrt()
    moves = ~(sd <= null.rounding)
    z = torch.where(moves.unsqueeze(-1), _directed(deviation / sd.unsqueeze(-1), alternative), -torch.inf)
    tolerance = torch.where(moves, 4 * null.rounding / sd, 0.0)  # two values and, if two-sided, the mean twice
    return z, tolerance


def _directed(deviation: Tensor, alternative: Alternative) -> Tensor:
    return {"greater": deviation, "less": -deviation, "two-sided": deviation.abs()}[alternative]


def max_over_heads(z: Tensor) -> Tensor:
    """The largest z [P] of any head per labelling, from z [..., P]. Ranks' results combine by max in turn."""
    return torch.where(z.isnan(), -torch.inf, z).reshape(-1, z.shape[-1]).amax(0)


def count_p(observed: Tensor, tolerance: Tensor, null_z: Tensor) -> Tensor:
    """Share of labellings at least as extreme as observed [...]; NaN stays NaN.

    With a head's own z [..., P] this is its p-value, with ``max_over_heads`` [P] the Westfall-Young single-step
    family-wise one. The latter is never smaller, as the head itself is among those the maximum runs over.
    """
    extreme = null_z >= (observed - tolerance).unsqueeze(-1)
    return torch.where(observed.isnan(), torch.nan, extreme.to(torch.float64).mean(-1))


def effect_size(null: Null, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Cohen's d of the observed value against the null distribution, and the null sd in it, both [...]."""
    reference = null.reference(exhaustive)
    sd = reference.std(-1, correction=0)
    d = (null.values[..., 0] - reference.mean(-1)) / sd
    return torch.where(sd <= null.rounding, 0.0, d), sd


def detectable_shift(null: Null, labels: Labels, alternative: Alternative, alpha: float, power: float) -> Tensor:
    """The smallest shift [...] of a head's null distribution that a test of this head alone finds with ``power``.

    It is the distance from the critical value to the quantile of the null that ``power`` of it lies beyond (for a
    normal null 2.49 sd, one-sided at 0.05 and 0.8); two-sided it is the worse of the two directions. Infinite where
    so few labellings exist that no p-value can be as small as alpha; NaN where no relabelling changes the head.
    """
    reference = null.reference(labels.exhaustive)
    deviation = reference - reference.mean(-1, keepdim=True)
    critical = torch.quantile(_directed(deviation, alternative), 1 - alpha, dim=-1)
    starts = [torch.quantile(sign * deviation, 1 - power, dim=-1) for sign in _SIGNS[alternative]]
    shift = critical - torch.stack(starts).amin(0)
    if alpha * labels.a.shape[1] < 1:
        shift = torch.where(shift.isnan(), shift, torch.inf)
    return torch.where(deviation.square().mean(-1).sqrt() <= null.rounding, torch.nan, shift)


def percentile_interval(resampled: Tensor, labels: Labels, confidence: float) -> tuple[Tensor, Tensor]:
    """Low and high ends [...] of the middle ``confidence`` of the resampled values [..., R] that are defined.

    NaN below three samples a task: with two, the only resample that has a pair of different samples is the task itself.
    """
    if min(labels.n_a, labels.n_b) < 3 or not resampled.shape[-1]:
        nothing = resampled.new_full(resampled.shape[:-1], torch.nan)
        return nothing, nothing
    tail = (1 - confidence) / 2
    low, high = torch.nanquantile(resampled, resampled.new_tensor([tail, 1 - tail]), dim=-1)
    return low, high
