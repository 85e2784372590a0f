from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import ema_fisher

from qkov_dist.scoring.fisher import fisher_steps, fisher_weights


def test_batches_alternate_until_both_tasks_are_used_up():
    assert fisher_steps((5, 2), batch_size=2, scope="pooled") == [[0, 1], [5, 6], [2, 3], [4]]
    assert fisher_steps((1, 3), batch_size=2, scope="pooled") == [[0], [1, 2], [3]]
    assert fisher_steps((3, 3), batch_size=2, scope="a") == [[0, 1], [2]]
    assert fisher_steps((3, 3), batch_size=2, scope="b") == [[3, 4], [5]]


@pytest.mark.parametrize(("num", "size"), [(9, 8), (17, 8), (16, 8), (5, 4), (1, 8), (100, 7)])
def test_a_tasks_batches_are_of_nearly_one_size_so_that_no_sample_outweighs_the_others(num, size):
    steps = fisher_steps((num, 0), batch_size=size, scope="pooled")
    assert [n for step in steps for n in step] == list(range(num))
    sizes = [len(step) for step in steps]
    assert len(steps) == -(-num // size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    weights = fisher_weights(steps, num, estimator="ema", decay=1 - 1e-9)  # but for forgetting
    assert weights.max() / weights.min() <= max(sizes) / min(sizes) * (1 + 1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 1 - 1e-9])
def test_weights_equal_the_recursion(decay: float):
    squares = torch.from_numpy(np.random.default_rng(0).random((7, 11)))
    steps = fisher_steps((4, 3), batch_size=2, scope="pooled")
    weights = fisher_weights(steps, 7, estimator="ema", decay=decay)
    expected = ema_fisher(list(squares), steps, decay)
    # 1 - beta loses digits to cancellation when beta is near 1, in the recursion as well
    torch.testing.assert_close(torch.from_numpy(weights) @ squares, expected, rtol=1e-6, atol=0)
    assert weights.sum() == pytest.approx(1.0, rel=1e-6)


def test_mean_weighs_each_sample_of_the_scope_alike():
    steps = fisher_steps((3, 5), batch_size=2, scope="b")
    weights = fisher_weights(steps, 8, estimator="mean", decay=0.99)
    np.testing.assert_allclose(weights, [0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2], rtol=1e-15)
