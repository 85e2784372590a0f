"""The answer in words: each case it may be in, and that its numbers are those of the heatmap."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex

import numpy as np
import pytest
from influences import heatmap_with_effects

from qkov_dist.results.effects import Total
from qkov_dist.results.heatmap_data import SampleTable
from qkov_dist.results.verdict import SCOPE, Verdict, verdict_of
from qkov_dist.results.verdict_facts import Facts, number


def total(change: float, error: float = 0.1, *, along: float = 0.1, own: float = -0.5) -> Total:
    interval = change - 2 * error, change + 2 * error
    curvatures = {"a": along / 1000, "b": along / 250}, {"a": along, "b": 4 * along}
    return Total(change, error, interval, *curvatures, {"a": 2 * own, "b": own})


def facts(
    adam: Total,
    sgd: Total | None = None,
    *,
    changes=(0.3, -0.2, 0.2, 0.1),
    q=(0.01, 0.02, 0.5, 0.6),
    losses=(3.0, 2.0),
) -> Facts:
    found = np.array(changes)
    return Facts(
        ("math", "code"),
        (8, 6),
        dict(zip("ab", losses, strict=True)),
        "nats per labelled token",
        0.05,
        {"adam": adam, "sgd": sgd or adam},
        ["Q 14.2", "K 3.1", "V 0.0", "O 7.5"],
        {"adam": found, "sgd": found * (1, 1, -1, 1)},
        {"adam": np.array(q), "sgd": np.array(q)},
        "runs/it's",
    )


def commands(verdict: Verdict) -> list[str]:
    return [action.command for action in verdict.actions]


def test_harm_is_said_at_the_step_that_lowers_the_other_tasks_loss_by_a_tenth() -> None:
    verdict = verdict_of(facts(total(0.3)))
    assert verdict.direction == "harm"
    whole, scope, _ = verdict.sentences
    assert whole == (
        "Training attention on code with adam until its own loss is 10% lower (0.20 nats per labelled token; a step of "
        "0.40: learning rate x number of steps) raises math's loss by 0.12 [0.040, 0.20] of 3.0, to first order."
    )
    assert scope == SCOPE
    assert "10% lower (0.30 nats per labelled token; a step of 0.30:" in verdict.details[2]
    assert "raises code's loss by 0.090 [0.030, 0.15] of 2.0" in verdict.details[2]
    assert (
        "All together: 0.30 [0.10, 0.50]; for every 1.00 that code's loss falls, math's rises by 0.60."
        in (verdict.details[4])
    )
    first, second, third = commands(verdict)
    assert shlex.split(first) == ["qkov", "heads", "runs/it's", "--by", "change_adam", "--significant"]
    assert 'load_heatmap("runs/it\'s")' in second
    assert shlex.split(third)[3:] == ["--by", "harm", "--step", "0.4"]
    assert verdict.step == 0.4


def test_synergy_is_said_and_the_advice_ends_at_the_step_of_the_answer() -> None:
    verdict = verdict_of(facts(total(-0.3)))
    assert verdict.direction == "help"
    assert "lowers math's loss by 0.12 [0.040, 0.20] of 3.0" in verdict.sentences[0]
    assert "the first order decides: the first is -0.12, the second +0.016, by the whole Fisher" in verdict.details[1]
    assert "from a step of 3.0 on" in verdict.details[1]
    assert "no step up to which training is safe" in verdict.details[1]
    assert verdict.actions[0].why == (
        "Train on code: to first order it helps math as a whole; this says nothing beyond a step of 0.40. Measure "
        "math's loss as you go."
    )


def test_where_the_second_order_outweighs_the_gain_the_advice_says_so() -> None:
    verdict = verdict_of(facts(total(-0.3, along=0.8)))  # 0.4 * 0.8 > 0.3
    assert "the second order decides" in verdict.details[1]
    assert "already at a step of 0.40 the second order outweighs that" in verdict.actions[0].why


def test_an_interval_that_holds_0_leaves_the_direction_open_and_asks_for_samples() -> None:
    verdict = verdict_of(facts(total(0.1, 0.1)))
    assert verdict.direction == "unknown"
    assert "is not known from 8 + 6 samples" in verdict.sentences[0]
    assert (
        "changes it by 0.040 [-0.040, 0.12] of 3.0, to first order, and this 95% interval contains 0."
        in (verdict.sentences[0])
    )
    assert "for every 1.00" not in verdict.details[4]
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
    assert "by 0.12 of 3.0, to first order; how sure that is cannot be said" in verdict.sentences[0]
    assert verdict.sentences[2].startswith("None of 4 heads is significantly in conflict or in synergy")
    assert not any("--significant" in command for command in commands(verdict))


@pytest.mark.parametrize(
    ("own", "losses", "why"),
    [
        (0.5, (3.0, 2.0), "by these samples a step on code does not lower its own loss"),
        (math.nan, (3.0, 2.0), "code has fewer than two samples of its own"),
        (-0.5, (math.nan, math.nan), "the file does not hold code's losses"),
    ],
)
def test_without_a_practical_step_a_unit_step_is_told_and_why(own: float, losses: tuple[float, float], why) -> None:
    verdict = verdict_of(facts(total(-0.3, own=own), losses=losses))
    of = "" if math.isnan(losses[0]) else " of 3.0"
    assert verdict.sentences[0].startswith(
        "A unit step of adam on code's attention weights (learning rate x number of steps = 1) lowers math's loss by "
        f"0.30 [0.10, 0.50] nats per labelled token{of}, to first order. Told for a unit step, since {why}"
    )
    assert "how far is not known" in verdict.actions[0].why
    assert "decides" not in verdict.details[1]
    assert shlex.split(commands(verdict)[-1])[3:] == ["--by", "harm", "--step", "0.003"]


# Heads


def test_heads_in_conflict_are_named_before_those_that_carry_the_harm() -> None:
    assert verdict_of(facts(total(0.3))).sentences[2] == (
        "Of 4 heads 1 is in conflict and 1 in synergy (q <= 0.05). In conflict: Q 14.2 (block Q, layer 14, head 2). "
        "In synergy: K 3.1. Half of the estimated harm, significant or not, is in one head: Q 14.2."
    )


def test_where_no_head_is_in_conflict_none_is_said_to_carry_harm() -> None:
    verdict = verdict_of(facts(total(0.3), q=(0.9, 0.02, 0.5, 0.6)))
    assert verdict.sentences[2] == (
        "Of 4 heads 0 are in conflict and 1 in synergy (q <= 0.05). In synergy: K 3.1 (block K, layer 3, kv head 1). "
        "No single head's harm can be told from 0 with 8 + 6 samples; largest estimates: Q 14.2, V 0.0, O 7.5."
    )
    assert verdict.carriers == ()


def test_where_no_head_is_harmful_none_is_named() -> None:
    verdict = verdict_of(facts(total(-0.3), changes=(-1.0, -2.0, 0.0, -1.0), q=(0.9,) * 4))
    assert verdict.carriers == ()
    assert verdict.sentences[2].endswith("No head's change is above 0.")


@pytest.mark.parametrize(
    ("sgd", "said"), [(0.3, "the same direction"), (-0.3, "the opposite direction"), (0.1, "direction not known")]
)
def test_the_other_optimizer_stands_beside_at_its_own_step(sgd: float, said: str) -> None:
    detail = verdict_of(facts(total(0.3), total(sgd, own=-0.25))).details[3]
    assert said in detail
    assert "with sgd until its own loss is 10% lower (0.20 nats per labelled token; a step of 0.80:" in detail
    assert "1 of 4 heads have another sign" in detail


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.10481, "0.10"), (33.4, "33"), (1.0, "1.0"), (12345.0, "12,300"), (4.2e-8, "4.2e-8"), (math.nan, "not known")],
)
def test_numbers_in_sentences_have_two_digits(value: float, text: str) -> None:
    assert number(value) == text


# A heatmap's own numbers


def test_a_heatmap_gives_its_own_numbers() -> None:
    heatmap = heatmap_with_effects(attributes={"config": {"metric": {"loss_reduction": "sum"}}})
    verdict = heatmap.verdict
    assert verdict is not None
    whole = heatmap.total_effect("adam")
    step = 0.1 * heatmap.samples_b.losses.mean() / -whole.own["b"]
    assert (
        f"({number(0.1 * heatmap.samples_b.losses.mean())} nats per sample; a step of {number(step)}:"
        in (verdict.sentences[0])
    )
    ends = ", ".join(number(step * end) for end in whole.interval)
    assert (
        f"by {number(step * whole.change)} [{ends}] of {number(heatmap.samples_a.losses.mean())}"
        in (verdict.sentences[0])
    )
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
    assert re.search(rf"Of 44 heads {conflicts} (is|are) in conflict", verdict.sentences[2])
    overtakes = heatmap.harm(1.0).total["overtakes"]
    assert f"from a step of {number(overtakes)} on" in verdict.details[1]


def test_losses_of_samples_that_both_tasks_have_do_not_count() -> None:
    def table(task: str, losses: list[float]) -> SampleTable:
        num = len(losses)
        contents = ("same", *(f"{task}{place}" for place in range(1, num)))
        return SampleTable(contents, np.ones(num, np.int64), np.array(losses), ("",) * num, contents)

    heatmap = heatmap_with_effects(samples_a=table("a", [9, 1, 2, 3]), samples_b=table("b", [9, 4, 4.4]))
    assert "(0.42 nats; a step of" in heatmap.verdict.sentences[0]


def test_numbers_of_scaled_gradients_are_no_changes_of_mean_losses() -> None:
    plain = heatmap_with_effects()
    scaled = dataclasses.replace(plain.samples_a, gradient_norms=np.ones(len(plain.samples_a)))
    verdict = dataclasses.replace(plain, samples_a=scaled).verdict
    assert "nats" in plain.verdict.sentences[0]
    assert "nats" not in verdict.sentences[0]
    assert "Told for a unit step, since gradients were divided by their norms" in verdict.sentences[0]
    assert set(verdict.practical["adam"].values()) == {None}


@pytest.mark.parametrize(
    ("config", "folder"),
    [({"output": {"dir": "runs/one"}}, "runs/one"), ("{}", "DIR"), ({}, "DIR")],
)
def test_commands_name_the_folder_of_the_run(config: object, folder: str) -> None:
    heatmap = heatmap_with_effects(attributes={"score": "interference", "config": config})
    named = [shlex.split(command)[2] for command in commands(heatmap.verdict) if command.startswith("qkov heads")]
    assert set(named) == {folder}
