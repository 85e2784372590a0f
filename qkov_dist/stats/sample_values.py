r"""What single samples have to do with a quantity of a head, so that runs can be compared sample by sample.

A quantity theta of a head is held with one number phi_n for each sample (the pseudo-values of its delete-one jackknife,
moved so that their mean over either task is theta):

    phi_n = theta + (n - 1) (mean_m theta_-m - theta_-n)        m over the n samples of the same task

Then var_A(phi) / n_A + var_B(phi) / n_B is its jackknife variance, and what ``results.influences.changes`` says of
influences holds of it. Influences are such numbers as they are: theta_-n = (n theta - t_n) / (n - 1).

    change_*        the influences
    relative_*      change / root mean square of change over the block's heads: free of the gradients' scale, and of the
                    step's; theta_-n takes the sample from all heads
    overlap         from scores among all pooled samples
    score_mean      from scores of the cross pairs

R is taken as given in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qkov_dist.data.copies import different_pairs
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import Estimate, Floats, Samples, changes
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .pair_sums import left_out_sums
from .permutation import PairCounts, overlap_of_pairs

ByBlock = Mapping[str, Floats]


@dataclass(frozen=True)
class SampleValues:
    """One quantity of one run.

    Attributes:
        values: Block -> [layer, native head], NaN where there is none.
        of_samples: Block -> [layer, native head, N], A's samples first; None where a file keeps too little for it.
        samples: Which samples count.
        errors: Block -> [layer, native head], standard errors that are known without ``of_samples``; None if not.
    """

    values: ByBlock
    of_samples: ByBlock | None
    samples: Samples
    errors: ByBlock | None = None

    def estimate(self, block: str) -> Estimate | None:
        """Values of one block with errors, as far as they are known."""
        if self.of_samples is not None:
            found = changes(self.of_samples[block], self.samples)
            return Estimate(self.values[block], found.standard_error, found.freedom)
        if self.errors is None:
            return None
        fewest = max(min(self.samples.sizes) - 1, 1)  # Welch's is between this and the sum of both
        return Estimate(self.values[block], self.errors[block], np.full(self.values[block].shape, float(fewest)))

    def in_order(self, order: npt.NDArray[np.intp]) -> SampleValues:
        """The same with its samples in another order."""
        if self.of_samples is None:
            return self
        of_samples = {block: of_block[..., order] for block, of_block in self.of_samples.items()}
        return SampleValues(self.values, of_samples, Samples(self.samples.a[order], self.samples.b[order]), self.errors)


def without_each(values: Floats, of_samples: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
    """The quantity without each of some samples of one task, [..., n], from itself [...] and its phi [..., N]."""
    own = of_samples[..., chosen]
    left_out: Floats = values[..., None] + (values[..., None] - own) / max(own.shape[-1] - 1, 1)
    return left_out


def quantities_of(heatmap: Heatmap) -> dict[str, SampleValues]:
    """Name -> quantity, of all that a heatmap knows, those of steps first."""
    found = {}
    if heatmap.influences is not None:
        influences = {o: {b: x[:, :, n] for b, x in heatmap.influences.items()} for n, o in enumerate(OPTIMIZERS)}
        for optimizer in reversed(OPTIMIZERS):
            found[f"change_{optimizer}"] = _change(influences[optimizer], heatmap.counted)
        for optimizer in reversed(OPTIMIZERS):
            found[f"relative_{optimizer}"] = _relative(influences[optimizer], heatmap.counted)
    tests, is_a = heatmap.statistics or {}, np.arange(num_samples(heatmap)) < len(heatmap.samples_a)
    everyone = Samples(is_a, ~is_a)
    if "overlap" in tests:
        found["overlap"] = _overlap(heatmap, tests["overlap"], everyone)
    if _has(tests.get("cross_mean"), heatmap, "effect_size"):
        sizes = {block: tests["cross_mean"][block]["effect_size"] for block in heatmap.blocks}
        found["cross_mean"] = SampleValues(sizes, None, everyone)
    of_pairs = None if heatmap.cross is None else {block: _mean(heatmap, block) for block in heatmap.blocks}
    means = {block: mean.astype(np.float64) for block, mean in heatmap.mean.items()}
    found["score_mean"] = SampleValues(means, of_pairs, everyone)
    return found


def num_samples(heatmap: Heatmap) -> int:
    """Samples of both tasks."""
    return len(heatmap.samples_a) + len(heatmap.samples_b)


def _has(of_blocks: object, heatmap: Heatmap, key: str) -> bool:
    return isinstance(of_blocks, Mapping) and all(key in of_blocks[block] for block in heatmap.blocks)


def _change(influences: ByBlock, samples: Samples) -> SampleValues:
    return SampleValues({b: changes(x, samples).value for b, x in influences.items()}, influences, samples)


def _relative(influences: ByBlock, samples: Samples) -> SampleValues:
    values, of_samples = {}, {}
    for block, of_block in influences.items():
        change = changes(of_block, samples).value
        values[block] = _over_size(change[..., None])[..., 0]
        of_samples[block] = np.full(of_block.shape, np.nan)
        for chosen in (samples.a, samples.b):
            left_out = _over_size(without_each(change, of_block, chosen))
            of_samples[block][..., chosen] = _pseudo(values[block], left_out)
    return SampleValues(values, of_samples, samples)


def _over_size(change: Floats) -> Floats:
    """Changes [layer, head, ...] over their root mean square over layers and heads."""
    present = ~np.isnan(change[..., 0])
    size = np.sqrt((change[present] ** 2).mean(axis=0)) if present.any() else np.zeros(change.shape[2:])
    over: Floats = np.divide(change, size, out=np.where(np.isnan(change), np.nan, 0.0), where=size > 0)
    return over


def _pseudo(value: Floats, left_out: Floats) -> Floats:
    """Phi [..., n] of one task's samples, from the quantity [...] and itself without each of them [..., n]."""
    num = left_out.shape[-1]
    if not num:
        return left_out
    phi: Floats = value[..., None] + (num - 1) * (left_out.mean(-1, keepdims=True) - left_out)
    return phi


def _both(value: Floats, left_out: Floats, samples: Samples) -> Floats:
    """Phi [..., N] of both tasks, from the quantity without each sample [..., N]."""
    parts = (_pseudo(value, left_out[..., chosen]) for chosen in (samples.a, samples.b))
    return np.concatenate(list(parts), axis=-1)


def _overlap(heatmap: Heatmap, tests: Mapping[str, Mapping[str, Floats]], samples: Samples) -> SampleValues:
    """From pooled scores; else as it was tested, with errors as wide as its intervals say."""
    values = {block: np.asarray(tests[block]["statistic"], np.float64) for block in heatmap.blocks}
    if heatmap.pooled is not None and min(samples.sizes) > 2:
        contents = (*heatmap.samples_a.contents, *heatmap.samples_b.contents)
        pairs, a = torch.from_numpy(different_pairs(contents)), torch.from_numpy(samples.a).double().unsqueeze(-1)
        counts = PairCounts.of(left_out_sums(pairs.unsqueeze(0).double(), a, pairs)[1])
        of_samples = {}
        for block, pooled in heatmap.pooled.items():
            left_out = np.stack(
                [
                    overlap_of_pairs(left_out_sums(torch.from_numpy(np.array(layer)), a, pairs)[1], counts)[..., 0]
                    for layer in pooled
                ]
            )
            of_samples[block] = _both(values[block], left_out, samples)
        return SampleValues(values, of_samples, samples)
    if not _has(tests, heatmap, "ci_low"):
        return SampleValues(values, None, samples)
    confidence = float((heatmap.statistics or {}).get("settings", {}).get("confidence", 0.95))
    return SampleValues(values, None, samples, _errors(heatmap, tests, confidence))


def _errors(heatmap: Heatmap, tests: Mapping[str, Mapping[str, Floats]], confidence: float) -> dict[str, Floats]:
    """Half of the width over the normal quantile, of intervals that are Student's t: rather too large than small."""
    from scipy.stats import norm

    quantile = norm.ppf(0.5 + confidence / 2)
    return {block: (tests[block]["ci_high"] - tests[block]["ci_low"]) / 2 / quantile for block in heatmap.blocks}


def _mean(heatmap: Heatmap, block: str) -> Floats:
    """Phi [layer, head, N] of the mean score, from its cross pairs of different samples."""
    different = heatmap.different
    found = np.full((*heatmap.mean[block].shape, num_samples(heatmap)), np.nan)
    num_a = len(heatmap.samples_a)
    is_a = np.arange(found.shape[-1]) < num_a
    counts = np.concatenate([different.sum(1), different.sum(0)])
    for layer, scores in enumerate(heatmap.cross[block]):  # type: ignore[index]
        kept = np.where(different, scores, 0.0).astype(np.float64)
        of_sample = np.concatenate([kept.sum(-1), kept.sum(-2)], axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            left_out = (kept.sum((-2, -1))[:, None] - of_sample) / (different.sum() - counts)
        found[layer] = _both(heatmap.mean[block][layer].astype(np.float64), left_out, Samples(is_a, ~is_a))
    return found
