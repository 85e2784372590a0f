"""What a matrix of tasks answers: pairs that hurt and help, over all pairs; a mix without harm; like tasks together."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from matrices import matrix_of_camps
from scipy.stats import false_discovery_control, ttest_ind

from qkov_dist.results.effects import Total
from qkov_dist.results.influences import summed
from qkov_dist.results.matrix_order import clustered, cosines_of
from qkov_dist.results.matrix_pairs import PairRecord, PairTotal, chance, heads_in
from qkov_dist.results.matrix_verdict import in_words, mix_without_harm
from qkov_dist.results.task_matrix import TaskMatrix


@pytest.fixture(scope="module")
def matrix() -> TaskMatrix:
    return matrix_of_camps("+-+0", num_layers=2)


def record(tasks: tuple[str, str], change: float, width: float = 0.5, q_value: float = 0.01) -> PairRecord:
    total = Total(change, width / 2, (change - width, change + width), {}, {}, {}, 0.01)
    return PairRecord(tasks, (8, 8), 0.05, {"adam": PairTotal(total, (1, 1), (1, 1), q_value)}, {})


def test_the_answer_names_who_hurts_and_helps_whom_and_a_mix(matrix) -> None:
    verdict = matrix.verdict
    count, hurt, help_, mix, heads = verdict.sentences
    assert count.startswith("Of 6 pairs of 4 tasks, 2 hurt each other, 1 helps each other, and of 3 it is not known")
    assert sorted(re.findall(r"(\S+ × \S+) \(", hurt)) == ["minus1 × plus2", "plus0 × minus1"]
    assert help_.startswith("Help: plus0 × plus2 (plus0's loss -")
    assert verdict.mix == ("plus0", "plus2", "none3")
    assert mix.startswith("To train together: plus0, plus2, none3;")
    assert mix.endswith("Left out: minus1.")
    assert "of all tasks minus1 has most" in heads
    assert verdict.direction == "harm"


def test_commands_name_the_pair_by_its_places_and_quote_it(matrix) -> None:
    of_matrix = [action.command for action in matrix.verdict.actions]
    assert of_matrix[0].startswith("qkov heads runs/camps --pair ")
    assert of_matrix[0].endswith(" --by change_adam --significant")
    assert of_matrix[-1] == "qkov report runs/camps"
    heatmap = matrix.heatmap("plus0", "minus1")
    assert heatmap.verdict.actions[0].command.startswith("qkov heads runs/camps --pair plus0 minus1 --by change_adam")
    (more,) = (a.command for a in matrix.heatmap("minus1", "none3").verdict.actions if a.command.startswith("qkov run"))
    assert more.split()[3:5] == [f"tasks.{place}.max_samples={more.split('=')[1].split()[0]}" for place in (1, 3)]


def test_totals_of_pairs_are_one_family(matrix) -> None:
    heatmaps = [matrix.heatmaps[pair] for pair in matrix.pairs]
    p_values = []
    for heatmap in heatmaps:
        together, counted = summed(heatmap.influences)[1], heatmap.counted
        first, second = together[counted.a], together[counted.b]
        p_values.append(ttest_ind(first, second - second.mean(), equal_var=False).pvalue)
    np.testing.assert_allclose([r.totals["adam"].total.p_value for r in matrix.records], p_values)
    q_values = false_discovery_control(p_values)
    np.testing.assert_allclose([r.totals["adam"].q_value for r in matrix.records], q_values)
    assert record(("a", "b"), 1.0, q_value=0.06).direction() == "harm"
    assert record(("a", "b"), 1.0, q_value=0.06).verdict() == "unknown"


def test_a_practical_step_is_that_of_the_pairs_own_answer(matrix) -> None:
    heatmap, found = matrix.heatmap("plus0", "minus1"), matrix.records[0].totals["adam"]
    for harmed, table, stepped in ((0, heatmap.samples_a, "b"), (1, heatmap.samples_b, "a")):
        step = heatmap.verdict.practical["adam"][stepped]
        expected = step * found.total.change / table.losses.mean()
        assert found.relative(harmed)[0] == pytest.approx(expected)
        assert found.relative(harmed)[1] < expected < found.relative(harmed)[2]


def test_codes_count_the_significant_heads_of_either_sign(matrix) -> None:
    in_conflict: dict[str, object] = dict.fromkeys(matrix.blocks, 0)
    for of_pair in matrix.records:
        heatmap = matrix.heatmaps[of_pair.tasks]
        for kind in ("adam", "sgd"):
            arrays = [of_block[kind] for of_block in heatmap.effects.values()]
            for sign in (1, -1):
                wanted = sum(((of["q_value"] <= 0.05) & (np.sign(of["change"]) == sign)).sum() for of in arrays)
                assert of_pair.count(kind, sign) == wanted
        for block, of_block in heatmap.effects.items():
            in_conflict[block] += ((of_block["adam"]["q_value"] <= 0.05) & (of_block["adam"]["change"] > 0)).astype(int)
        tests = heatmap.tests["Q"]
        assert of_pair.count("scores", -1, "Q") == ((tests["q_value"] <= 0.05) & (tests["effect_size"] < 0)).sum()
    for block, counts in in_conflict.items():
        np.testing.assert_array_equal(heads_in(matrix.records, "adam", 1, block), counts)
    expected = chance(matrix.records)
    assert (expected.pairs, expected.families) == (6, 24)
    assert expected.false_finds == pytest.approx(0.05 * expected.found)


def test_families_over_all_pairs_are_said(matrix) -> None:
    over_all = [dataclasses.replace(record, families={"adam": "all", "sgd": "all"}) for record in matrix.records]
    assert (chance(over_all).families, chance(over_all, "scores").families) == (4, 24)
    said = in_words(chance(over_all), 0.05)
    assert said.startswith("Tests of heads are corrected within a block over all pairs: 6 pairs make 4 such families.")
    config = {**matrix.attributes["config"], "statistics": {"family": "all"}}
    attributes = {**matrix.attributes, "config": config}
    heatmaps = {pair: dataclasses.replace(heatmap, attributes=attributes) for pair, heatmap in matrix.heatmaps.items()}
    run = dataclasses.replace(matrix, heatmaps=heatmaps)
    assert "within a block over all pairs" in run.verdict.sentences[-1]
    assert run.records[0].families["scores"] == "pair"


def test_a_mix_keeps_what_fits() -> None:
    tasks = ("a", "b", "c", "d")
    star = [record(("a", other), 1.0) for other in "bcd"]
    assert mix_without_harm(tasks, star) == ("b", "c", "d")
    own_alone = [record(("a", "b"), 1.0, q_value=0.9)]  # a sign of harm that does not hold over all pairs
    assert len(mix_without_harm(tasks, own_alone)) == 3
    chain = [record(pair, 1.0) for pair in (("a", "b"), ("b", "c"), ("c", "d"))]
    assert len(mix_without_harm(tasks, chain)) == 2
    assert mix_without_harm(tasks, [record(("a", "b"), 0.1)]) == tasks


def test_cosines_and_an_order_by_them() -> None:
    directions = np.array([[1, 0.1], [-1, 0.2], [0.9, 0.1], [-0.9, 0.1], [0.1, 1]])
    sizes = np.array([1.0, 3.0, 0.5, 2.0, 1.0])
    gradients = directions * sizes[:, None]
    cosines = cosines_of(-gradients @ gradients.T)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, unit @ unit.T)
    order = clustered(cosines)
    assert {frozenset(order[:2]), frozenset(order[-2:])} == {frozenset((0, 2)), frozenset((1, 3))}
    assert order[0] < order[-1]
    upward = cosines_of(np.array([[1.0, -1.0], [-1.0, -4.0]]))  # a step on the first task does not lower its own loss
    assert np.isnan(upward[0]).all()
    assert upward[1, 1] == 1
    assert sorted(clustered(np.full((3, 3), np.nan))) == [0, 1, 2]


def test_without_effects_there_is_no_answer_and_overlap_orders(matrix) -> None:
    heatmaps = {
        pair: dataclasses.replace(heatmap, effects=None, influences=None) for pair, heatmap in matrix.heatmaps.items()
    }
    values = {block: {name: of[name] for name in ("mean", "overlap")} for block, of in matrix.values.items()}
    bare = dataclasses.replace(matrix, heatmaps=heatmaps, values=values)
    assert bare.verdict is None
    assert sorted(bare.order) == [0, 1, 2, 3]
    assert "<b>" not in bare._repr_html_()


def test_other_tools_have_every_pair_and_head(matrix) -> None:
    table = matrix.to_pandas()
    heads = sum(int(mask.sum()) for mask in matrix.present.values())
    assert len(table) == 6 * heads
    at = table.query("task_a == 'minus1' and task_b == 'none3' and block == 'K' and layer == 1 and head == 2")
    assert at["change_adam"].item() == matrix.values["K"]["change_adam"][1, 3, 1, 2]
    array = matrix.to_xarray()["change_adam_V"]
    assert array.dims == ("task", "task_right", "layer", "kv_head")
    assert array.attrs["units"] == "nats per labelled token per unit step"
    found = array.sel(task="minus1", task_right="none3", layer=1, kv_head=0).item()
    assert found == matrix.values["V"]["change_adam"][1, 3, 1, 0]


def test_a_notebook_shows_answer_picture_and_tasks(matrix) -> None:
    named = dataclasses.replace(matrix, tasks=("<b>", *matrix.tasks[1:]))
    shown = dataclasses.replace(
        named, heatmaps={p: matrix.heatmaps[q] for p, q in zip(named.pairs, matrix.pairs, strict=True)}
    )
    text = shown._repr_html_()
    assert "2 hurt each other" in text
    assert "data:image/png;base64," in text
    assert "&lt;b&gt;" in text
    assert "<td><b></td>" not in text


def test_a_plot_is_clustered_and_refuses_other_names(matrix) -> None:
    axis = matrix.plot("cosine").axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [matrix.tasks[place] for place in matrix.order]
    drawn = np.asarray(axis.images[0].get_array())
    order = list(matrix.order)
    np.testing.assert_allclose(drawn, matrix.cosines()[np.ix_(order, order)])
    with pytest.raises(ValueError, match="one of Q, K, V, O"):
        matrix.plot(block="X")
