"""Factors or gradient, whichever is smaller: by brute force over lengths, and against what a store really holds."""

from __future__ import annotations

import pytest
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.forms import factor_bytes, gradients_above, shared_inputs
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import sequence
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.tiles import Selection, make_tile_plan


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon_new"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_threshold_is_where_the_gradient_becomes_smaller(name, itemsize):
    layer = resolve(TINY[name].build()).layers[0]
    above = gradients_above([layer], itemsize)
    for group in shared_inputs(layer):
        width = group[0][1].shape[1] + sum(rect.shape[0] for _, rect in group)
        gradient = 4 * sum(rect.shape[0] * (rect.shape[1] + 1) for _, rect in group)
        smaller = next(tokens for tokens in range(1, 10_000) if tokens * width * itemsize > gradient)
        assert {above[site] for site, _ in group} == {smaller - 1}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon_new"])
@pytest.mark.parametrize("forms", [True, False])
def test_the_bytes_are_those_that_a_store_holds(name, forms):
    model = TINY[name].build()
    layout = resolve(model)
    samples = mixed_samples(12, VOCAB, seed=3, lengths=(3, 40))
    tile_plan = make_tile_plan(layout, Selection(), include_bias=False, num_samples=12)
    above = gradients_above(layout.layers, 4) if forms else {}
    store = FactorStore(2**30, gradients_above=above)
    Collection(store, tile_plan.sites).run(model, "a", samples)
    lengths = [len(sequence(sample, "causal").input_ids) for sample in samples]
    counted = sum(factor_bytes(layout.layer(x.layer), x.sites, lengths, 4) for x in tile_plan.layers)
    if forms:
        assert any(store.sample_index(site).whole for site in tile_plan.sites)
        assert store.bytes_in_memory == counted
    else:
        assert store.bytes_in_memory > counted
    store.close()
