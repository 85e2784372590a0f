"""`qkov validate --freeze`: trainings are those of plain AdamW, compared at one gain; nothing is left changed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from examined import examined_of, loss_of
from samples import mixed_samples, write_task
from scipy.stats import ttest_1samp
from zoo import TINY, VOCAB

from qkov_dist.acting.freeze import freeze_heads
from qkov_dist.cli import main
from qkov_dist.errors import QkovError
from qkov_dist.results.selection import Selection
from qkov_dist.verification import freezing
from qkov_dist.verification.criteria import CRITERIA, heatmap_of
from qkov_dist.verification.freezing import FreezingPlan, Trial, Tried, run_trial
from qkov_dist.verification.freezing_results import interval, outcomes, spares
from qkov_dist.verification.head_targets import Target, every_target, halves
from qkov_dist.verification.trajectories import Training, Trajectory, attention_weights, kept, trained

HEADS = (Target(0, "Q", 3), Target(1, "K", 1), Target(1, "O", 2))
TRAINING = Training(steps=4, learning_rate=3e-3, batch_size=2, looks=2)


def weights_of(examined) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in examined.model.named_parameters()}


def changed_by(examined, before, target: Target) -> bool:
    """Whether any element of a head is not what it was."""
    return any(
        not torch.equal(
            *(
                weights[f"{projection.module}.weight"][stored.rows, stored.cols]
                for weights in (before, dict(examined.model.named_parameters()))
            )
        )
        for projection in examined.layout.layer(target.layer).projections
        for piece in projection.slices
        if (piece.block, piece.head) == (target.block, target.head)
        for stored in [projection.stored(piece.rect)]
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_is_that_of_adamw_on_attention_alone(name):
    """Batches of all samples, so that their order says nothing: the loop is written a second time, on a copy."""
    examined = examined_of(name, torch.float64)
    other = copy.deepcopy(examined.model)
    names = {id(p): n for n, p in examined.model.named_parameters()}
    trained_names = {names[id(p)] for p in attention_weights(examined)}
    training = Training(steps=3, learning_rate=1e-3, batch_size=4)
    trained(examined, examined.b, training, seed=0)
    optimizer = torch.optim.AdamW([p for n, p in other.named_parameters() if n in trained_names], lr=1e-3)
    for _ in range(3):
        other.zero_grad()
        loss_of(other, examined.b).backward()
        optimizer.step()
    for (n, got), expected in zip(examined.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=n)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in examined.model.parameters())


def selection_of(examined, heads) -> Selection:
    every = heatmap_of(examined).select(share=1.0)
    return Selection("made", tuple(h for h in every.heads if Target(h.layer, h.block, h.head) in heads))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_chosen_heads_stay_as_they_were_and_all_others_learn(name):
    examined = examined_of(name, torch.float32)
    heads = [target for target in HEADS if target in every_target(examined)]
    before = weights_of(examined)
    with kept(attention_weights(examined)):
        selection = selection_of(examined, heads)
        trained(examined, examined.b, TRAINING, seed=0, freezing=lambda: freeze_heads(examined.model, selection))
        changed = {target for target in every_target(examined) if changed_by(examined, before, target)}
    assert changed == set(every_target(examined)) - set(heads)
    assert all(torch.equal(value, before[n]) for n, value in examined.model.named_parameters())


def test_trajectories_are_compared_where_b_has_first_gained_as_much():
    a = np.array([[1.0, 2.0], [1.5, 2.0], [2.0, 1.0], [9.0, 9.0]])
    b = np.array([[3.0, 5.0], [2.0, 4.0], [0.0, 4.0], [0.0, 0.0]])
    trajectory = Trajectory(a, b)
    np.testing.assert_array_equal(trajectory.gains, [0.0, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(trajectory.change_at(0.5), [0.25, 0.0])
    np.testing.assert_allclose(trajectory.change_at(1.0), [0.5, 0.0])
    np.testing.assert_allclose(trajectory.change_at(1.25), [0.625, -0.25])
    np.testing.assert_allclose(trajectory.change_at(0.0), [0.0, 0.0])
    assert np.isnan(trajectory.change_at(4.1)).all()
    there_and_back = Trajectory(a, b[[0, 2, 1, 3]])
    np.testing.assert_allclose(there_and_back.change_at(1.0), [0.25, 0.0])


def test_looks_are_even_and_end_with_the_last_step():
    assert Training(steps=12, looks=4).looked_at == (3, 6, 9, 12)
    assert Training(steps=8, looks=3).looked_at == (3, 6, 8)
    assert Training(steps=2, looks=5).looked_at == (1, 2)
    assert Training(steps=12, learning_rate=0.5).step == 6


def made_trial(seed: int, changes: dict[str, list[float]], gain: float = 2.0) -> Trial:
    """Trainings that gain 2, 2 and so on of B, in one step each, with A's changes at the end by sample."""
    tried = []
    for criterion, change in changes.items():
        rise = np.array(change)
        end = gain if criterion == "none" else 2 * gain  # at the common gain, half of the others' change
        trajectory = Trajectory(np.stack([np.ones(3), 1 + rise]), np.array([[5.0], [5.0 - end]]))
        share = 0.0 if criterion == "none" else 0.25
        tried.append(Tried(criterion, share, HEADS if share else (), trajectory))
    return Trial(seed, ((0, 1, 2), (1, 2, 3))[seed % 2], tuple(tried))


def test_outcomes_are_paired_means_at_one_gain_with_students_intervals():
    rng = np.random.default_rng(0)
    none, random, harm = (rng.normal(size=(4, 3)) + shift for shift in (1.0, 2.0, -8.0))
    trials = [
        made_trial(s, {"none": none[s].tolist(), "random": random[s].tolist(), "harm": harm[s].tolist()})
        for s in range(4)
    ]
    found = {outcome.criterion: outcome for outcome in outcomes(trials, 5)}
    assert found["none"].gain == pytest.approx(2.0)
    assert found["harm"].change.value == pytest.approx(harm.mean() / 2)
    assert found["harm"].total_change == pytest.approx(harm.mean())
    assert found["harm"].total_gain == pytest.approx(4.0)
    less = (harm - random) / 2
    assert found["harm"].less_random.value == pytest.approx(less.mean())
    over_seeds = ttest_1samp(less.mean(axis=1), 0).confidence_interval(0.95)
    assert found["harm"].less_random.over_seeds == pytest.approx((over_seeds.low, over_seeds.high))
    by_sample = np.full((4, 4), np.nan)
    for seed in range(4):
        by_sample[seed, [0, 1, 2] if seed % 2 == 0 else [1, 2, 3]] = less[seed]
    over_samples = ttest_1samp(np.nanmean(by_sample, axis=0), 0).confidence_interval(0.95)
    assert found["harm"].less_random.over_samples == pytest.approx((over_samples.low, over_samples.high))
    words = spares(list(found.values()))
    assert "than with none frozen: harm. Than with heads frozen at random: harm." in words
    assert np.isnan(interval(np.ones(1))).all()


def test_where_b_gains_nothing_there_is_nothing_to_compare():
    with pytest.raises(QkovError, match="a gain on B's held-out samples"):
        outcomes([made_trial(0, {"none": [1.0] * 3, "random": [1.0] * 3}, gain=-1.0)], 5)


def test_a_trial_tries_every_choice_from_the_same_start_and_puts_weights_back(monkeypatch):
    examined = examined_of("llama", torch.float32, num=8)
    before, warm = weights_of(examined), []

    def spied(first):
        warm.append(any(not torch.equal(value, before[n]) for n, value in first.model.named_parameters()))
        assert [s.id for s in first.a] == [examined.a[n].id for n in halves(8, 5, "A")[0]]
        return heatmap_of(first)

    monkeypatch.setattr(freezing, "heatmap_of", spied)
    plan = FreezingPlan(TRAINING, warmup=2, shares=(0.1, 0.5), num_random=2)
    count = []
    trial = run_trial(examined, plan, 5, count.append)
    assert len(count) == len(trial.tried) == plan.num_trainings == 15
    assert warm == [True]
    assert [(one.criterion, one.share, len(one.heads)) for one in trial.tried] == [
        ("none", 0.0, 0),
        *((name, 0.1, 2) for name in (*CRITERIA, "random", "random")),
        *((name, 0.5, 12) for name in (*CRITERIA, "random", "random")),
    ]
    starts = {tuple(one.trajectory.a[0]) for one in trial.tried}
    assert len(starts) == 1
    assert len({tuple(one.trajectory.b[-1]) for one in trial.tried if one.criterion != "random"}) > 2
    assert all(torch.equal(value, before[n]) for n, value in examined.model.named_parameters())
    again = Trial.from_json(json.loads(json.dumps(trial.as_json())))
    assert again.as_json() == trial.as_json()
    assert run_trial(examined, plan, 5).as_json() == trial.as_json()


def test_the_command_compares_and_writes_all_numbers(tmp_path, capsys):
    TINY["llama"].build().save_pretrained(tmp_path / "model")
    for task, seed in (("a", 1), ("b", 2)):
        write_task(tmp_path / f"{task}.jsonl", mixed_samples(4, VOCAB, seed=seed))
    tasks = ["--task-a", str(tmp_path / "a.jsonl"), "--task-b", str(tmp_path / "b.jsonl"), "--quiet"]
    output = tmp_path / "numbers.json"
    command = ["validate", str(tmp_path / "model"), *tasks, "--output", str(output)]
    short = ["--steps", "2", "--batch", "2", "--random", "1", "--seeds", "2"]
    # what B gains on made-up samples is chance: at its own samples it falls
    assert main([*command, *short, "--freeze", "0.25", "--learning-rate", "1e-30"]) == 2
    assert "--learning-rate" in capsys.readouterr().err
    assert len(json.loads(output.read_text())["trials"]) == 2
    for wrong in (["--freeze", "1.5"], ["--freeze", "0.1", "--warmup", "-1"]):
        with pytest.raises(SystemExit) as end:
            main([*command, *wrong])
        assert end.value.code == 2
