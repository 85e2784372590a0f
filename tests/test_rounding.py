"""The bounds of the suite hold for any order of a sum, and are not so wide that any error would pass."""

from __future__ import annotations

import pytest
import torch
from rounding import PASSES, SCORES, passes, reordered


@pytest.mark.parametrize("num_terms", [3, 100, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orders_of_a_sum_differ_by_less_than_the_bound_and_not_by_much_less(num_terms, dtype):
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(num_terms, 50, generator=generator, dtype=torch.float64).to(dtype)
    totals = []
    for _ in range(20):
        total = torch.zeros(50, dtype=dtype)
        for n in torch.randperm(num_terms, generator=generator).tolist():
            total += terms[n]
        totals.append(total / terms.sum(dim=0))
    found = torch.stack(totals).double()
    largest = float((found - found[:1]).abs().max())
    assert largest < reordered(num_terms, dtype)
    assert largest > reordered(num_terms, dtype) / 20


def test_a_replica_counted_twice_would_be_far_out_of_every_bound():
    """One of a hundred ranks, of the deepest model that is run here."""
    assert max(SCORES, PASSES, passes(layers=40, tokens=50), passes(layers=30, hidden=576)) < 1e-2 / 50
