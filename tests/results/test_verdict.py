"""The answer in words: each case it may be in, and that its numbers are those of the heatmap."""

from __future__ import annotations

import math
import re
import shlex

import numpy as np
import pytest
from influences import heatmap_with_effects

from qkov_dist.results.effects import Total
from qkov_dist.results.verdict import Facts, Verdict, verdict_of


def total(change: float, error: float = 0.1, *, curvature: float = 2.0, own: float = -0.5) -> Total:
    interval = change - 2 * error, change + 2 * error
    return Total(change, error, interval, {"a": curvature, "b": 4 * curvature}, {"a": 2 * own, "b": own})


def facts(adam: Total, sgd: Total | None = None, *, changes=(0.3, -0.2, 0.2, 0.1), q=(0.01, 0.02, 0.5, 0.6)) -> Facts:
    found = np.array(changes)
    return Facts(
        ("math", "code"),
        (8, 6),
        0.05,
        {"adam": adam, "sgd": sgd or adam},
        ["Q 14.2", "K 3.1", "V 0.0", "O 7.5"],
        {"adam": found, "sgd": found * (1, 1, -1, 1)},
        {"adam": np.array(q), "sgd": np.array(q)},
        "runs/it's",
    )


def commands(verdict: Verdict) -> list[str]:
    return [action.command for action in verdict.actions]


def test_harm_is_said_with_its_interval_and_in_relation_to_what_the_step_gains() -> None:
    verdict = verdict_of(facts(total(0.3)))
    assert verdict.direction == "harm"
    whole, heads = verdict.sentences
    assert whole.startswith("A step on code raises math's loss: by 0.3 (95% interval 0.1 to 0.5)")
    assert "for every 1.00 that code's loss falls, math's rises by 0.6" in whole
    assert heads == (
        "Of 4 heads 1 is in conflict and 1 in synergy (q <= 0.05); half of the estimated harm is in one head: Q 14.2."
    )
    assert "From a step of 0.15 (" in verdict.details[1]
    assert "for every 1.00 that math's loss falls, code's rises by 0.3; there" in verdict.details[2]
    assert "from a step of 0.0375 on" in verdict.details[2]
    first, second, third = commands(verdict)
    assert shlex.split(first) == ["qkov", "heads", "runs/it's", "--by", "change_adam", "--significant"]
    assert 'load_heatmap("runs/it\'s")' in second
    assert shlex.split(third)[3:] == ["--by", "harm", "--step", "0.003"]


def test_synergy_is_said_with_the_step_at_which_the_gain_is_used_up() -> None:
    verdict = verdict_of(facts(total(-0.3)))
    assert verdict.direction == "help"
    assert verdict.sentences[0].startswith("A step on code lowers math's loss: by 0.3 (95% interval 0.1 to 0.5)")
    assert "math's falls by 0.6" in verdict.sentences[0]
    assert "outweighs what the first order gains: a larger step on code raises math's loss" in verdict.details[1]
    assert verdict.actions[0].why == "Train on code: to first order it helps math as a whole, up to a step of 0.15."


def test_an_interval_that_holds_0_leaves_the_direction_open_and_asks_for_samples() -> None:
    verdict = verdict_of(facts(total(0.1, 0.1)))
    assert verdict.direction == "unknown"
    assert "is not known from 8 + 6 samples" in verdict.sentences[0]
    assert "[-0.1, 0.3] contains 0" in verdict.sentences[0]
    assert "rises by" not in verdict.details[2]
    wanted = math.ceil(2.8**2 * 8)  # 80% power: errors shrink with the root of the number
    assert shlex.split(commands(verdict)[0])[-1] == f"output.dir=runs/it's-{wanted}"
    assert f"tasks.1.max_samples={wanted}" in commands(verdict)[0]


def test_a_change_near_0_asks_for_no_samples() -> None:
    verdict = verdict_of(facts(total(0.001, 0.1)))
    assert "neutral" in verdict.actions[0].why
    assert not any(command.startswith("qkov run") for command in commands(verdict))


def test_without_errors_nothing_is_said_to_be_sure() -> None:
    verdict = verdict_of(facts(total(0.3, math.nan), q=(math.nan,) * 4))
    assert verdict.direction == "unknown"
    assert "fewer than two samples" in verdict.sentences[0]
    assert verdict.sentences[1].startswith("None of 4 heads is significantly in conflict or in synergy")
    assert not any("--significant" in command for command in commands(verdict))


def test_where_no_head_is_harmful_none_is_named() -> None:
    verdict = verdict_of(facts(total(-0.3), changes=(-1.0, -2.0, 0.0, -1.0)))
    assert verdict.carriers == ()
    assert verdict.sentences[1].endswith("no head's change is above 0.")


def test_a_task_that_gains_nothing_by_its_own_step_is_no_measure() -> None:
    assert "for every 1.00" not in verdict_of(facts(total(0.3, own=0.5))).sentences[0]
    assert "decides" in verdict_of(facts(total(0.3, curvature=0.0))).details[1]


def test_a_step_beyond_which_the_second_order_decides_early_is_the_one_to_begin_with() -> None:
    verdict = verdict_of(facts(total(0.3, curvature=40.0)))  # decides from 0.0075 on for A, 0.0019 for B
    assert shlex.split(commands(verdict)[-1])[3:] == ["--by", "harm", "--step", "0.002"]


@pytest.mark.parametrize(
    ("sgd", "said"), [(0.3, "the same direction"), (-0.3, "the opposite direction"), (0.1, "direction not known")]
)
def test_the_other_optimizer_stands_beside(sgd: float, said: str) -> None:
    detail = verdict_of(facts(total(0.3), total(sgd))).details[3]
    assert said in detail
    assert "1 of 4 heads have another sign" in detail


def test_a_heatmap_gives_its_own_numbers() -> None:
    heatmap = heatmap_with_effects()
    verdict = heatmap.verdict
    assert verdict is not None
    whole = heatmap.total_effect("adam")
    assert f"{whole.change:.3g}" in verdict.sentences[0]
    assert "[{:.3g}, {:.3g}]".format(*whole.interval) in verdict.sentences[0]
    changes = {
        f"{block} {heatmap.layers[layer]}.{heatmap.natives(block)[head]}": heatmap.effects[block]["adam"]["change"][at]
        for block in heatmap.blocks
        for at in zip(*np.nonzero(heatmap.present[block]), strict=True)
        for layer, head in [at]
    }
    harmful = sorted((value for value in changes.values() if value > 0), reverse=True)
    assert [changes[name] for name in verdict.carriers] == harmful[: len(verdict.carriers)]
    assert sum(harmful[: len(verdict.carriers)]) >= sum(harmful) / 2 > sum(harmful[: len(verdict.carriers) - 1])
    conflicts = sum(
        int(((arrays["adam"]["q_value"] <= 0.3) & (arrays["adam"]["change"] > 0)).sum())
        for arrays in heatmap.effects.values()
    )
    assert re.search(rf"Of 44 heads {conflicts} (is|are) in conflict", verdict.sentences[1])
    overtakes = heatmap.harm(1.0).total["overtakes"]
    assert f"{overtakes:.3g} (learning rate" in verdict.details[1]


@pytest.mark.parametrize(
    ("config", "folder"),
    [({"output": {"dir": "runs/one"}}, "runs/one"), ("{}", "DIR"), ({}, "DIR")],
)
def test_commands_name_the_folder_of_the_run(config: object, folder: str) -> None:
    heatmap = heatmap_with_effects(attributes={"score": "interference", "config": config})
    named = [shlex.split(command)[2] for command in commands(heatmap.verdict) if command.startswith("qkov heads")]
    assert set(named) == {folder}
