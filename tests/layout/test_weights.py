"""Regions of weights, changed where they lie and put back exactly; what is whole and what is stored of a projection."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qkov_dist.layout.heads import Projection
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.weights import changed, region_of

RECT = Rect(1, 3, 0, 2)


def projection(transposed: bool) -> Projection:
    return Projection("q", (4, 3), transposed, True, (), "H*q")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_region_lies_in_the_weight_as_out_by_in(transposed):
    linear = Conv1D(4, 3) if transposed else nn.Linear(3, 4)
    region_of(linear, projection(transposed), RECT).fill_(7.0)
    weight = linear.weight.T if transposed else linear.weight
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[1:3, :2] = True
    assert ((weight == 7.0) == expected).all()


def test_a_rectangle_in_storage_is_that_of_the_weight_turned_back():
    assert projection(True).stored(RECT) == Rect(0, 2, 1, 3)
    assert projection(True).stored(projection(True).stored(RECT)) == RECT
    assert projection(False).stored(RECT) == RECT
    assert (projection(True).whole().shape, projection(True).whole(bias=True).shape) == ((4, 3), (4, 1))


def test_regions_are_put_back_also_where_a_change_fails_halfway():
    linear = nn.Linear(3, 4)
    before = linear.weight.detach().clone()

    def change(region):
        region.add_(1.0)
        if region is regions[1]:
            raise ZeroDivisionError

    regions = [linear.weight.detach()[:2], linear.weight.detach()[2:]]
    with pytest.raises(ZeroDivisionError), changed(regions, change):
        pass
    assert torch.equal(linear.weight, before)
    with changed(regions[:1], lambda region: region.mul_(2.0)):
        assert torch.equal(linear.weight[:2], 2 * before[:2])
        assert torch.equal(linear.weight[2:], before[2:])
    assert torch.equal(linear.weight, before)
