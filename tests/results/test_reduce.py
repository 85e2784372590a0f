from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from jobs import Job
from owners import flat_owner
from rounding import SCORES, assert_same_fisher
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.assemble import assemble
from qkov_dist.results.fisher_warnings import warnings_of
from qkov_dist.results.metadata import from_json, make_metadata, to_json
from qkov_dist.results.reduce import add_layers, layer_partial
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.tiles import Selection, make_tile_plan


def scored(name: str, world_sizes=(1,), *, include_bias=False, heads=None, num_tokens=None):
    """Partials of every layer by simulated ranks, and the metadata."""
    model = TINY[name].build()
    layout, job = resolve(model), Job(mixed_samples(3, VOCAB, seed=1), mixed_samples(2, VOCAB, seed=2))
    if num_tokens is not None:
        job = Job(*([cut(sample, num_tokens) for sample in samples] for samples in (job.a, job.b)))

    def tile_plan_for(owned):
        return make_tile_plan(layout, Selection(heads=heads), include_bias=include_bias, num_samples=5, owned=owned)

    tile_plan, store = tile_plan_for(None), FactorStore(2**30)
    collection = Collection(store, tile_plan.sites)
    collection.run(model, "a", job.a)
    collection.run(model, "b", job.b)
    records = (collection.records[:3], collection.records[3:])
    attributes = {"score": "interference", "estimator": "ema", "scope": "pooled"}
    metadata = make_metadata(tile_plan, layout, ("a", "b"), records, pooled=False, attributes=attributes)
    parts = {
        world_size: [
            {
                layer.layer: layer_partial(score_layer(layer, store, job.roles(), job.settings))
                for layer in tile_plan_for(flat_owner(rank, world_size)).layers
            }
            for rank in range(world_size)
        ]
        for world_size in world_sizes
    }
    return metadata, parts


def summed(ranks):
    return [(layer, add_layers([rank[layer] for rank in ranks])) for layer in ranks[0]]


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma4_kv_shared"])
def test_partials_of_any_number_of_ranks_add_up_to_one_process(name):
    metadata, parts = scored(name, (1, 2, 3, 4), include_bias=True)
    one = assemble(metadata, summed(parts[1]))
    for world_size in (2, 3, 4):
        many = assemble(metadata, summed(parts[world_size]))
        for block in one.blocks:
            largest = np.nanmax(np.abs(one.cross[block]))
            np.testing.assert_allclose(many.cross[block], one.cross[block], atol=SCORES * largest, rtol=0)
            assert_same_fisher(many.fisher[block], one.fisher[block])
            bound = SCORES * np.nanmax(np.abs(one.influences[block]), axis=(0, 1, 3), keepdims=True)
            assert (np.abs(many.influences[block] - one.influences[block]) <= bound)[one.present[block]].all()
        doubled = assemble(metadata, summed([*parts[world_size], parts[world_size][0]]))
        assert np.nanmax(np.abs(doubled.cross["Q"] - one.cross["Q"])) > 1e-2 * np.nanmax(one.cross["Q"])
        assert not np.allclose(doubled.influences["Q"], one.influences["Q"], rtol=1e-2, equal_nan=True)
    assert ("O_bias" in one.shared) == (name in ("gpt2", "gpt_neox"))


@pytest.mark.long
def test_layers_without_a_block_are_nan_and_marked_absent():
    metadata, parts = scored("gemma4_kv_shared")
    heatmap = assemble(metadata, summed(parts[1]))
    assert heatmap.present["K"].tolist() == [[True, True]] * 2 + [[False, False]] * 2
    assert np.isnan(heatmap.mean["K"][2:]).all()
    assert np.isfinite(heatmap.mean["Q"]).all()


@pytest.mark.long
def test_head_counts_that_differ_by_layer_share_one_axis():
    metadata, parts = scored("gemma4_k_eq_v")
    heatmap = assemble(metadata, summed(parts[1]))
    assert heatmap.kv_heads == (0, 1)
    assert heatmap.present["K"].tolist() == [[True, True], [True, False]] * 2
    assert heatmap.present["V"].tolist() == [[True, True], [False, False]] * 2
    assert heatmap.groups.tolist() == [2, 4, 2, 4]


@pytest.mark.long
def test_a_missing_layer_or_head_is_an_error():
    metadata, parts = scored("llama", (1, 4))
    with pytest.raises(QkovError, match=r"no scores of layers \[1\]"):
        assemble(metadata, [(0, parts[1][0][0])])
    with pytest.raises(QkovError, match=r"layer 0, block Q: expected scores of heads \[0, 1, 2, 3\], got"):
        assemble(metadata, parts[4][0].items())


def test_metadata_survives_json():
    metadata, parts = scored("gpt2", include_bias=True, heads=(1, 3))
    again = from_json(json.loads(json.dumps(to_json(metadata))), "here")
    one, other = (assemble(f, summed(parts[1])) for f in (metadata, again))
    assert (one.layers, one.heads, one.kv_heads) == (other.layers, other.heads, other.kv_heads)
    assert one.samples_a.ids == other.samples_a.ids
    np.testing.assert_array_equal(one.samples_b.losses, other.samples_b.losses)
    with pytest.raises(QkovError, match="here: expected a description"):
        from_json({"tasks": ["a"]}, "here")


def test_a_dominant_ridge_is_a_warning():
    metadata, parts = scored("llama")
    layer = parts[1][0][0]
    layer.blocks["K"].fisher_sums[1, 3] = layer.blocks["K"].fisher_sums[1, 1]
    (warning,) = assemble(metadata, parts[1][0].items()).attributes["warnings"]
    assert warning.startswith(
        "K: lambda exceeds I on more than half of the elements of 1 head (most in layer 0, head 1"
    )


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize(
    ("now", "what", "advice"),
    [
        ((0.0, 0.0, 1e-3), "lambda", {"relative": 1e-5}),
        ((1e-10, 1e-8, 0.0), "lambda", {"epsilon": 0, "absolute": 0, "relative": 1e-3}),
        ((1e-10, 0.0, 1e-3), "epsilon", {"epsilon": 0}),
        ((1e-10, 0.0, 0.5), "epsilon", {"epsilon": 0, "relative": 1e-3}),
        ((1e-30, 1e-8, 1e-4), "lambda", {"absolute": 0}),
    ],
)
def test_the_advice_of_a_warning_depends_on_what_is_set_now(now, what, advice, in_python):
    """The mean of I is 1e-12; following the advice leaves something above 0, and nothing above a thousandth of I."""
    keys = ("epsilon", "absolute", "relative")
    names = ("epsilon", "ridge_lambda", "ridge_relative") if in_python else tuple(f"ridge.{key}" for key in keys)
    if in_python:
        attributes = dict(zip(("epsilon", "ridge_absolute", "ridge_relative"), now, strict=True))
    else:
        attributes = {"config": {"ridge": dict(zip(keys, now, strict=True))}}
    metadata, _ = scored("llama")
    metadata = replace(metadata, attributes=attributes)
    shape = (len(metadata.layers), 4)
    fisher = {"mean": np.full(shape, 1e-12), "ridge_share": np.full(shape, 0.9), "share_a": np.full(shape, 0.5)}
    (warning,) = warnings_of(metadata, {"Q": fisher})
    assert warning.startswith(f"Q: {what} exceeds I")
    said = warning.partition("Set ")[2].rstrip(".").replace(" and ", ", ")
    assert dict(part.split("=") for part in said.split(", ")) == {
        names[keys.index(key)]: f"{value:g}" for key, value in advice.items()
    }
    after = dict(zip(keys, now, strict=True)) | advice
    assert max(after.values()) > 0
    assert max(after["epsilon"], after["absolute"] + after["relative"] * 1e-12) <= 1e-15


def test_gradients_whose_squares_float32_cannot_hold_are_a_warning():
    metadata, _ = scored("llama")
    shape = (len(metadata.layers), 4)
    fisher = {"mean": np.full(shape, 1e-33), "ridge_share": np.zeros(shape), "share_a": np.full(shape, 0.5)}
    (warning,) = warnings_of(metadata, {"Q": fisher})
    assert "float32 loses digits" in warning
    wide = replace(metadata, attributes={**metadata.attributes, "dtype": "float64"})
    assert warnings_of(wide, {"Q": fisher}) == []
    assert warnings_of(metadata, {"Q": {**fisher, "mean": np.full(shape, 1e-14)}}) == []


@pytest.mark.long
def test_scores_of_fourth_order_leave_float32_before_squares_do():
    """Of samples with gradients 1e-4 of the usual, at a mean I of 1e-25: 1e-16 of it, below 1e-38."""
    metadata, _ = scored("llama")
    shape = (len(metadata.layers), 4)
    fisher = {"mean": np.full(shape, 1e-25), "ridge_share": np.zeros(shape), "share_a": np.full(shape, 0.5)}
    assert warnings_of(metadata, {"Q": fisher}) == []
    of_fourth_order = replace(metadata, attributes={**metadata.attributes, "score": "curvature"})
    (warning,) = warnings_of(of_fourth_order, {"Q": fisher})
    assert "mean I below 1e-22" in warning
    assert "loses digits of their scores" in warning
    assert warnings_of(of_fourth_order, {"Q": {**fisher, "mean": np.full(shape, 1e-20)}}) == []


def cut(sample, num_tokens):
    return replace(sample, input_ids=sample.input_ids[:num_tokens], labels=sample.input_ids[:num_tokens])


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_of_rounding_errors_are_a_warning(name):
    """Of two tokens only the first predicts, and its softmax over itself is constant: Q and K have no gradient."""
    for num_tokens, noisy in ((2, {"Q", "K"}), (5, set())):
        metadata, parts = scored(name, num_tokens=num_tokens)
        warnings = assemble(metadata, summed(parts[1])).attributes["warnings"]
        assert {text[0] for text in warnings if re.search("rounding errors|heads? is zero", text)} == noisy


def test_tensors_are_not_copied_needlessly():
    _, parts = scored("llama")
    assert add_layers([parts[1][0][0]]).blocks["Q"].scores is parts[1][0][0].blocks["Q"].scores
