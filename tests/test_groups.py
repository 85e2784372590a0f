"""Groups of samples: every sample once, roles kept together, padding that adds nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qkov_dist.capture.factors import SampleIndex, Whole
from qkov_dist.scoring.padded_groups import order_samples


def index_of(lengths: list[int], above: int) -> SampleIndex:
    index = SampleIndex()
    for number, length in enumerate(lengths):
        index.add(number, length, as_gradient=length > above)
    return index


@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.integers(0, 70), st.data())
def test_padded_products_are_those_of_each_sample_alone(lengths, above, data):
    index = index_of(lengths, above)
    cuts = [data.draw(st.integers(0, len(lengths))) for _ in range(2)]
    ordering = order_samples(range(len(lengths)), index, cuts)
    assert sorted(ordering.order) == list(range(len(lengths)))
    assert [ordering.order[place] for place in ordering.place] == list(range(len(lengths)))
    for cut in cuts:
        assert sorted(ordering.order[:cut]) == list(range(cut))
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(index.num_rows, width, generator=generator).double() for width in (3, 2))
    whole = Whole(torch.randn(len(index.whole), 2, 4, generator=generator).double())
    covered = []
    for group in ordering.groups:
        members = ordering.order[group.first : group.last]
        covered += members
        kept = group.wholes(whole)
        for n, member in enumerate(members):
            if kept is not None:
                assert torch.equal(kept.values[n], whole.values[index.whole[member]])
                continue
            start, stop = index.spans[member]
            alone = d[start:stop].t() @ x[start:stop]
            padded = group.outputs(d)[n].t() @ group.inputs(x)[n]
            torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)
    assert tuple(covered) == ordering.order


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_padding_is_bounded(lengths):
    ordering = order_samples(range(len(lengths)), index_of(lengths, 10**6), [])
    for group in ordering.groups:
        shortest = min(lengths[n] for n in ordering.order[group.first : group.last])
        assert shortest >= min(group.length * 7 / 8, group.length - 4)


def test_samples_of_one_length_one_behind_another_are_a_view():
    (group,) = order_samples(range(4), index_of([5, 5, 5, 5], 100), []).groups
    values = torch.randn(20, 3)
    assert group.inputs(values).data_ptr() == group.outputs(values).data_ptr() == values.data_ptr()
    assert group.inputs(values).shape == (4, 5, 3)
