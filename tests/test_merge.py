from __future__ import annotations

import json

import numpy as np
import pytest
from jobs import Job, mixed_samples
from rounding import SCORES, assert_same_fisher
from test_plan import flat_owner
from zoo import TINY, VOCAB

from qkov_dist.assembly import assemble
from qkov_dist.collection import Collection
from qkov_dist.engine import score_layer
from qkov_dist.errors import QkovError
from qkov_dist.factors import FactorStore
from qkov_dist.frame import from_json, make_frame, to_json
from qkov_dist.layout import resolve
from qkov_dist.merge import add_layers, layer_partial
from qkov_dist.plan import Selection, make_plan


def scored(name: str, world_sizes=(1,), *, include_bias=False, heads=None):
    """Partials of every layer by pretended ranks, and the frame."""
    model = TINY[name].build()
    layout, job = resolve(model), Job(mixed_samples(3, VOCAB, seed=1), mixed_samples(2, VOCAB, seed=2))

    def plan_for(owned):
        return make_plan(layout, Selection(heads=heads), include_bias=include_bias, num_samples=5, owned=owned)

    plan, store = plan_for(None), FactorStore(2**30)
    collection = Collection(store, plan.sites)
    collection.run(model, "a", job.a)
    collection.run(model, "b", job.b)
    records = (collection.records[:3], collection.records[3:])
    attributes = {"score": "interference", "estimator": "ema", "scope": "pooled"}
    frame = make_frame(plan, layout, ("a", "b"), records, pooled=False, attributes=attributes)
    parts = {
        world_size: [
            {
                layer.layer: layer_partial(score_layer(layer, store, job.roles(), job.settings))
                for layer in plan_for(flat_owner(rank, world_size)).layers
            }
            for rank in range(world_size)
        ]
        for world_size in world_sizes
    }
    return frame, parts


def summed(ranks):
    return [(layer, add_layers([rank[layer] for rank in ranks])) for layer in ranks[0]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma4_kv_shared"])
def test_partials_of_any_number_of_ranks_add_up_to_one_process(name):
    frame, parts = scored(name, (1, 2, 3, 4), include_bias=True)
    one = assemble(frame, summed(parts[1]))
    for world_size in (2, 3, 4):
        many = assemble(frame, summed(parts[world_size]))
        for block in one.blocks:
            largest = np.nanmax(np.abs(one.cross[block]))
            np.testing.assert_allclose(many.cross[block], one.cross[block], atol=SCORES * largest, rtol=0)
            assert_same_fisher(many.fisher[block], one.fisher[block])
        doubled = assemble(frame, summed([*parts[world_size], parts[world_size][0]]))
        assert np.nanmax(np.abs(doubled.cross["Q"] - one.cross["Q"])) > 1e-2 * np.nanmax(one.cross["Q"])
    assert ("O_bias" in one.shared) == (name in ("gpt2", "gpt_neox"))


def test_layers_without_a_block_are_nan_and_marked_absent():
    frame, parts = scored("gemma4_kv_shared")
    heatmap = assemble(frame, summed(parts[1]))
    assert heatmap.present["K"].tolist() == [[True, True]] * 2 + [[False, False]] * 2
    assert np.isnan(heatmap.mean["K"][2:]).all()
    assert np.isfinite(heatmap.mean["Q"]).all()


def test_head_counts_that_differ_by_layer_share_one_axis():
    frame, parts = scored("gemma4_k_eq_v")
    heatmap = assemble(frame, summed(parts[1]))
    assert heatmap.kv_heads == (0, 1)
    assert heatmap.present["K"].tolist() == [[True, True], [True, False]] * 2
    assert heatmap.present["V"].tolist() == [[True, True], [False, False]] * 2
    assert heatmap.groups.tolist() == [2, 4, 2, 4]


def test_a_missing_layer_or_head_is_an_error():
    frame, parts = scored("llama", (1, 4))
    with pytest.raises(QkovError, match=r"no scores of layers \[1\]"):
        assemble(frame, [(0, parts[1][0][0])])
    with pytest.raises(QkovError, match=r"layer 0, block Q: expected scores of heads \[0, 1, 2, 3\], got"):
        assemble(frame, parts[4][0].items())


def test_a_frame_survives_json():
    frame, parts = scored("gpt2", include_bias=True, heads=(1, 3))
    again = from_json(json.loads(json.dumps(to_json(frame))), "here")
    one, other = (assemble(f, summed(parts[1])) for f in (frame, again))
    assert (one.layers, one.heads, one.kv_heads) == (other.layers, other.heads, other.kv_heads)
    assert one.samples_a.ids == other.samples_a.ids
    np.testing.assert_array_equal(one.samples_b.losses, other.samples_b.losses)
    with pytest.raises(QkovError, match="here: expected a description"):
        from_json({"tasks": ["a"]}, "here")


def test_a_dominant_ridge_is_a_warning():
    frame, parts = scored("llama")
    layer = parts[1][0][0]
    layer.blocks["K"].fisher_sums[1, 3] = layer.blocks["K"].fisher_sums[1, 1]
    (warning,) = assemble(frame, parts[1][0].items()).attributes["warnings"]
    assert warning.startswith(
        "K: lambda exceeds I on more than half of the elements of 1 heads (most in layer 0, head 1"
    )
    assert "ridge.relative" in warning


def test_tensors_are_not_copied_needlessly():
    _, parts = scored("llama")
    assert add_layers([parts[1][0][0]]).blocks["Q"].scores is parts[1][0][0].blocks["Q"].scores
