"""Effects of a heatmap: what heads add up to, the harm of a step, and the way into files and tables and back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from comparing import assert_same_heatmap
from heatmaps import LAYERS, heatmap_with_tests
from influences import heatmap_with_effects, records_of

from qkov_dist.errors import QkovError
from qkov_dist.finish import with_tested_effects
from qkov_dist.results.effects import EFFECT_KEYS, TESTED_KEYS, counted_samples, untested_effects
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.influences import Samples, changes
from qkov_dist.scoring.influence_records import OPTIMIZERS, of_samples


@pytest.fixture(scope="module")
def heatmap():
    return heatmap_with_effects()


def rows_of(heatmap, optimizer, chosen=lambda block, layer: True):
    """(block, layer, head) of present heads, and their influences [heads, N]."""
    places = [(b, *map(int, at)) for b in heatmap for at in np.argwhere(heatmap.present[b]) if chosen(b, LAYERS[at[0]])]
    place = OPTIMIZERS.index(optimizer)
    return places, np.array([heatmap.influences[b][layer, head, place] for b, layer, head in places])


CHOSEN = {
    "all": ({}, lambda block, layer: True),
    "a block": ({"block": "V"}, lambda block, layer: block == "V"),
    "a layer": ({"layer": 5}, lambda block, layer: layer == 5),
    "both": ({"block": "O", "layer": 7}, lambda block, layer: (block, layer) == ("O", 7)),
}


@pytest.mark.parametrize("which", CHOSEN)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_total_is_the_sum_over_heads_with_the_error_of_the_sum(heatmap, optimizer, which):
    arguments, chosen = CHOSEN[which]
    places, rows = rows_of(heatmap, optimizer, chosen)
    total = heatmap.total_effect(optimizer, **arguments)

    def summed(name: str) -> float:
        return sum(heatmap.effects[b][optimizer][name][layer, head] for b, layer, head in places)

    assert total.change == pytest.approx(summed("change"), rel=1e-9)
    alone = changes(rows.sum(0), heatmap.counted)
    assert total.standard_error == pytest.approx(float(alone.standard_error), rel=1e-9)
    assert total.interval == pytest.approx([float(end) for end in alone.interval()], rel=1e-9)
    independent = sum(heatmap.effects[b][optimizer]["standard_error"][at, head] ** 2 for b, at, head in places) ** 0.5
    assert abs(total.standard_error - independent) > 1e-3 * independent  # heads have samples in common
    for task in "ab":
        assert total.curvature[task] == pytest.approx(summed(f"curvature_{task}"), rel=1e-9)
        assert total.own[task] == pytest.approx(summed(f"own_{task}"), rel=1e-9)
        of_task = rows.sum(0)[getattr(heatmap.counted, task)]
        assert total.curvature_along[task] == pytest.approx(0.5 * (of_task**2).mean(), rel=1e-9)


@pytest.mark.parametrize(("harms", "optimizer"), [("a", "sgd"), ("B", "adam")])
def test_harm_of_a_step_is_first_plus_second_order(heatmap, harms, optimizer):
    step = 3e-2
    harm = heatmap.harm(step, optimizer, harms)
    assert (harm.step, harm.optimizer, harm.harmed) == (step, optimizer, harms.lower())
    for block, arrays in heatmap.effects.items():
        known = arrays[optimizer]
        curvature = known[f"curvature_along_{harms.lower()}"]
        expected = {
            "first": step * known["change"],
            "second": step**2 * curvature,
            "value": step * known["change"] + step**2 * curvature,
            "standard_error": step * known["standard_error"],
            "ci_low": step * known["ci_low"] + step**2 * curvature,
            "ci_high": step * known["ci_high"] + step**2 * curvature,
            "overtakes": np.abs(known["change"]) / curvature,
        }
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(harm, name)[block], values, rtol=1e-12, err_msg=name)
    assert harm.total["first"] == pytest.approx(sum(np.nansum(values) for values in harm.first.values()), rel=1e-9)
    of_samples = sum(np.nansum(i, axis=(0, 1)) for i in heatmap.influences.values())[OPTIMIZERS.index(optimizer)]
    along = 0.5 * (of_samples[getattr(heatmap.counted, harms.lower())] ** 2).mean()
    assert harm.total["second"] == pytest.approx(step**2 * along, rel=1e-9)
    heads_alone = sum(np.nansum(values) for values in harm.second.values())
    assert abs(harm.total["second"] - heads_alone) > 1e-2 * heads_alone  # there are terms between heads
    assert harm.total["value"] == pytest.approx(harm.total["first"] + harm.total["second"], rel=1e-9)
    turn = harm.total["overtakes"]
    assert not heatmap.harm(0.9 * turn, optimizer, harms).near_optimum
    assert heatmap.harm(1.1 * turn, optimizer, harms).near_optimum


def test_effects_of_whole_gradients_are_the_sums_over_their_slices():
    rng = np.random.default_rng(4)
    samples = Samples(np.arange(7) < 4, np.arange(7) >= 4)
    gradients, regularised = rng.normal(size=(7, 30)), np.exp(rng.normal(size=30))
    whole = records_of(gradients, regularised, samples, 4)
    cuts = [slice(0, 11), slice(11, 12), slice(12, 30)]
    slices = np.stack([records_of(gradients[:, cut], regularised[cut], samples, 4) for cut in cuts])
    of_whole, of_slices = untested_effects(whole[None, None], samples), untested_effects(slices[None], samples)
    for optimizer in OPTIMIZERS:
        for name, values in of_whole[optimizer].items():
            is_sum = of_slices[optimizer][name].sum() == pytest.approx(values.item(), rel=1e-12)
            assert is_sum == ("along" not in name), name  # a curvature along a step has terms between slices
    np.testing.assert_allclose(of_samples(slices).sum(0), of_samples(whole), rtol=1e-12)


def test_a_file_gives_back_every_bit(heatmap, tmp_path):
    heatmap.save(tmp_path / "h.h5")
    loaded = load_heatmap(tmp_path / "h.h5")
    assert_same_heatmap(heatmap, loaded)
    assert {*loaded.effects["V"]["adam"]} == {*EFFECT_KEYS}
    assert np.isnan(loaded.influences["V"][2]).all()  # a layer without V
    assert loaded.harm(1e-2).total == heatmap.harm(1e-2).total


def test_files_from_before_effects_load_and_say_what_to_do(tmp_path):
    old = heatmap_with_tests()
    old.save(tmp_path / "h.h5")
    loaded = load_heatmap(tmp_path / "h.h5")
    assert (loaded.influences, loaded.effects) == (None, None)
    assert with_tested_effects(loaded) is loaded
    for ask in (loaded.total_effect, lambda: loaded.harm(1e-3)):
        with pytest.raises(QkovError, match=r"heatmap\.effects.*Run again") as refused:
            ask()
        assert "written before effects were" in str(refused.value)


def test_tables_and_datasets_name_effects_alike(heatmap):
    table, data = heatmap.to_pandas(), heatmap.to_xarray()
    for optimizer in OPTIMIZERS:
        for name in EFFECT_KEYS:
            found = table.set_index(["block", "layer", "head"])[f"{name}_{optimizer}"]
            for block in heatmap:
                values = heatmap.effects[block][optimizer][name]
                np.testing.assert_array_equal(data[f"effects_{block}_{name}"].sel(optimizer=optimizer), values)
                np.testing.assert_array_equal(found[block].to_numpy(), values[heatmap.present[block]])
        influences = heatmap.influences["K"][:, :, OPTIMIZERS.index(optimizer)]
        np.testing.assert_array_equal(data["influences_K"].sel(optimizer=optimizer), influences)
    assert data["influences_K"].dims == ("optimizer", "layer", "kv_head", "sample")
    assert not [column for column in table if "influence" in column]


def test_a_test_anew_keeps_what_needs_none_and_takes_its_own_settings(heatmap):
    again = with_tested_effects(heatmap)
    for block in heatmap:
        for optimizer in OPTIMIZERS:
            for name in set(EFFECT_KEYS) - {"p_max"}:  # of 1000 draws of signs in place of 200
                known = heatmap.effects[block][optimizer][name]
                np.testing.assert_array_equal(again.effects[block][optimizer][name], known)
    assert set(TESTED_KEYS) < set(EFFECT_KEYS)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda h: h.harm(0.0), "step: expected a finite number above 0"),
        (lambda h: h.harm(float("nan")), "step: expected a finite number above 0"),
        (lambda h: h.harm(1e-3, "adagrad"), "optimizer: expected .*sgd.*adam"),
        (lambda h: h.harm(1e-3, harms="c"), "harms: expected"),
        (lambda h: h.total_effect("lion"), "optimizer: expected"),
        (lambda h: h.total_effect(block="X"), "expected one of Q, K, V, O"),
        (lambda h: h.total_effect(layer=3), "layer: expected one of 2, 5, 7"),
    ],
)
def test_what_is_out_of_range_is_named(heatmap, ask, message):
    with pytest.raises(QkovError, match=message):
        ask(heatmap)


def test_influences_of_another_shape_are_refused(heatmap):
    cut = {block: values[..., 1:] for block, values in heatmap.influences.items()}
    with pytest.raises(QkovError, match="influences Q"):
        dataclasses.replace(heatmap, influences=cut)
    assert counted_samples([], []).sizes == (0, 0)
