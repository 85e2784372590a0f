"""Where heads lie, as files say it: every element of a projection's heads, in the orientation of storage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from heatmaps import ATTRIBUTES, make_heatmap
from zoo import RELATIVES, TINY

from qkov_dist import QkovError, load_heatmap
from qkov_dist.config_file import from_dict
from qkov_dist.layout.names import plain_name
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.head_slices import are_slices, head_ranges, slices_of
from qkov_dist.results.metadata import from_json, run_attributes

ZOO = {**TINY, **RELATIVES}


@pytest.mark.parametrize("name", ZOO)
def test_ranges_are_the_rectangles_of_the_layout_in_the_stored_parameter(name):
    model = ZOO[name].build()
    layout, parameters = resolve(model), dict(model.named_parameters(remove_duplicate=False))
    stored = json.loads(json.dumps(slices_of(layout, include_bias=False)))  # as a file gives it back
    assert are_slices(stored)
    found = head_ranges({"slices": stored})
    assert {key[:2] for key in found} == {(block, layer.index) for layer in layout.layers for block in layer.blocks}
    for layer in layout.layers:
        for block in layer.blocks:
            for head in layer.heads(block):
                for piece in found[block, layer.index, head]:
                    mask = np.zeros(parameters[piece.parameter].shape, bool)
                    mask[(slice(None),) * (piece.axis == "cols") + (slice(piece.start, piece.stop),)] = True
                    np.testing.assert_array_equal(mask, _by_layout(layer, block, head, piece, found, mask.shape))


def _by_layout(layer, block, head, piece, found, shape):
    """The elements of one range by the rectangles of the layout, of which the others of this head are taken away."""
    mask = np.zeros(shape, bool)
    for projection in layer.projections:
        if plain_name(f"{projection.module}.weight") == piece.parameter:
            for part in projection.slices:
                if (part.block, part.head) == (block, head):
                    rect = projection.stored(part.rect)
                    mask[rect.rows, rect.cols] = True
    for other in found[block, layer.index, head]:
        if other.parameter == piece.parameter and other != piece:
            mask[(slice(None),) * (other.axis == "cols") + (slice(other.start, other.stop),)] = False
    return mask


def test_a_head_has_its_part_of_the_bias_where_biases_count():
    layout = resolve(TINY["gpt2"].build())
    ranges = head_ranges({"slices": slices_of(layout, include_bias=True)})
    weight, bias = ranges["K", 1, 2]
    assert (weight.parameter, weight.axis, bias.parameter, bias.axis) == (
        "transformer.h.1.attn.c_attn.weight",
        "cols",
        "transformer.h.1.attn.c_attn.bias",
        "rows",
    )
    assert (weight.start, weight.stop) == (bias.start, bias.stop) == (48, 56)
    assert [piece.parameter for piece in ranges["O", 1, 2]] == ["transformer.h.1.attn.c_proj.weight"]


def test_heads_that_follow_each_other_are_one_band():
    records = slices_of(resolve(TINY["llama"].build()), include_bias=False)
    assert [record["heads"] for record in records[:4]] == [
        {"Q": [[0, 4, 0, 16]]},
        {"K": [[0, 2, 0, 16]]},
        {"V": [[0, 2, 0, 16]]},
        {"O": [[0, 4, 0, 16]]},
    ]


def test_they_lie_in_the_attributes_of_a_run_and_its_partial_files():
    layout, tasks = resolve(TINY["gpt2"].build()), [{"name": name, "path": name} for name in "ab"]
    config = from_dict({"model": {"path": "m"}, "tasks": tasks, "metric": {"include_bias": True}})
    attributes = run_attributes(config, layout, "run-1")
    assert attributes["slices"] == slices_of(layout, include_bias=True)
    raw = {
        "tasks": ["a", "b"],
        "layers": [],
        "samples": [{"ids": [], "num_tokens": [], "losses": []}] * 2,
        "pooled": False,
        "attributes": json.loads(json.dumps(attributes)),
    }
    assert from_json(raw, "file").attributes["slices"] == attributes["slices"]
    raw["attributes"]["slices"][0]["heads"]["Q"][0][3] = 10**6
    with pytest.raises(QkovError, match="attribute slices: expected where heads lie"):
        from_json(raw, "file")


def test_a_file_gives_them_back_also_where_they_are_long(tmp_path):
    long = [
        {
            "layer": layer,
            "parameter": f"model.layers.{layer}.self_attn.qkv_proj.weight",
            "shape": [64 * 192, 4096],
            "transposed": False,
            "heads": {block: [[n, 1, 192 * n + 64 * at, 64] for n in range(64)] for at, block in enumerate("QKV")},
        }
        for layer in range(80)
    ]
    assert len(json.dumps(long)) > 2**17  # more than an attribute of HDF5 used to hold
    make_heatmap(attributes={**ATTRIBUTES, "slices": long}).save(tmp_path / "heatmap.h5")
    assert load_heatmap(tmp_path).attributes["slices"] == long


GOOD = {
    "layer": 0,
    "parameter": "q.weight",
    "shape": [64, 32],
    "transposed": False,
    "heads": {"Q": [[0, 4, 0, 16]]},
}


@pytest.mark.parametrize(
    "change",
    [
        {"layer": -1},
        {"layer": True},
        {"parameter": 3},
        {"shape": [64, 32, 1]},
        {"shape": "64"},
        {"transposed": 0},
        {"heads": {"X": []}},
        {"heads": {"Q": [[0, 4, 0]]}},
        {"heads": {"Q": [[0, 5, 0, 16]]}},
        {"heads": {"Q": [[0, 0, 0, 16]]}},
        {"heads": {"Q": [[0, 10**9, 0, 10**9]]}},
        {"heads": []},
    ],
)
def test_what_is_no_such_record_is_known(change):
    assert are_slices([GOOD])
    assert not are_slices([GOOD, {**GOOD, **change}])
    assert not are_slices([{name: GOOD[name] for name in GOOD if name not in change}])


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("model.layers.0.self_attn.q_proj.weight",) * 2,
        ("module.base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.q_proj.modules_to_save.default.weight", "q_proj.weight"),
        ("base_model.model.q_proj.original_module.weight", "q_proj.weight"),
        ("base_model.embed.weight", "base_model.embed.weight"),
    ],
)
def test_names_are_those_of_the_plain_model(wrapped, plain):
    assert plain_name(wrapped) == plain
