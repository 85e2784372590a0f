r"""Scores without what each sample's own share of the Fisher does, from a few sums: for intervals of ``overlap``.

In a run I is the mean over the very samples that are scored. A sample's own square in I damps its scores, each weight's
by as much as the sample stands out in it, and so the scores of a task among itself more than those with the other:
overlap comes out too high, by 0.01 to 0.07 with 16 to 64 samples, where intervals of a head of a thousand weights may
be that narrow. Looked for is M'_ij, with sample i's share taken out of the I that its row is divided by. (Not j's too:
a row's scores with both tasks then have one and the same I, of which each task has as many samples, and what is left of
the two shares is about what dividing by an I that varies costs.)

Of M' is known what its rows and columns add up to in either task, as multiples of those of M (``scoring.own_shares``).
The matrix closest to M that adds up so is

    M'_ij = r_i M_ij c_j     in each of the four parts AA, AB, BA and BB,

which a few rounds of setting rows, then columns, find (iterative proportional fitting). It has the means of M' exactly,
and its leave-one-out values but for what a single pair has of its own.

Of samples that have copies it is not known: a copy's share would have to be taken out too, and sums have its pairs.
Intervals then take the Fisher as given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_sums import counted_pairs

ROUNDS = 4  # elements are then at their limit to 1e-3, whatever the spread of norms; rows add up exactly


def without_own_shares(scores: Tensor, known: Tensor, pairs: Tensor, num_a: int) -> Tensor:
    """M' [heads, N, N] of different samples, where none has a copy (``has_copies``).

    Args:
        scores: M, [heads, N, N], A's samples first; NaN for an absent head.
        known: What single samples do through the Fisher, [heads, KNOWN, N] (``scoring.own_share_records``).
        pairs: Which pairs are of different samples, bool [N, N].
        num_a: Samples of A.
    """
    counted, known = counted_pairs(scores, pairs), known.to(scores.device, torch.float64)
    tasks = slice(0, num_a), slice(num_a, len(pairs))
    most = max(num_a, len(pairs) - num_a)
    parts = counted.new_zeros(4, len(counted), most, most)  # together, as each is little work; zeros change nothing
    of_rows, of_columns = (parts.new_ones(4, len(counted), most) for _ in range(2))
    places = [(rows, columns, task, other) for task, rows in enumerate(tasks) for other, columns in enumerate(tasks)]
    for place, (rows, columns, task, other) in enumerate(places):
        part = counted[:, rows, columns]
        parts[place, :, : part.shape[1], : part.shape[2]] = part
        of_rows[place, :, : part.shape[1]] = known[:, other, rows]
        of_columns[place, :, : part.shape[2]] = known[:, 2 + task, columns]
    flat = parts.flatten(0, 1)
    fitted = _adding_up(flat, flat.sum(2).mul_(of_rows.flatten(0, 1)), flat.sum(1).mul_(of_columns.flatten(0, 1)))
    for found, (rows, columns, *_) in zip(fitted.view_as(parts), places, strict=True):
        part = counted[:, rows, columns]
        part.copy_(found[:, : part.shape[1], : part.shape[2]])
    return counted


def has_copies(pairs: Tensor) -> bool:
    """Whether pairs of different samples [N, N] are not all but those of a sample with itself."""
    return bool((~pairs).sum() > len(pairs))


def _adding_up(part: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Matrices [heads, n, m] whose rows and columns add up to given sums; rows do exactly."""
    c = torch.ones_like(of_columns)
    for _ in range(ROUNDS):
        r = _quotient(of_rows, torch.bmm(part, c.unsqueeze(2)).squeeze(2))
        c = _quotient(of_columns, torch.bmm(r.unsqueeze(1), part).squeeze(1))
    r = _quotient(of_rows, torch.bmm(part, c.unsqueeze(2)).squeeze(2))
    return part * r.unsqueeze(2) * c.unsqueeze(1)


def _quotient(wanted: Tensor, found: Tensor) -> Tensor:
    return torch.where(found > 0, wanted / found, 1.0)
