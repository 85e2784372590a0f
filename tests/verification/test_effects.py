"""`qkov validate`: measured changes are those of an independent step, and weights come back bit for bit."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from rounding import reordered
from samples import mixed_samples, write_task
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy
from zoo import LAYERS, TINY, VOCAB

from qkov_dist.cli import main
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.verification.agreement import agreements
from qkov_dist.verification.effects import HeadEffect, Target, measure, sample_targets, stepped
from qkov_dist.verification.examined_model import ExaminedModel

STEP = 0.3
IN_FLOAT32 = 5 * reordered(2 * (2 * LAYERS + 1))  # the norms' share of a loss of about 5
TARGETS = tuple(
    Target(layer, block, head) for layer, block, head in ((0, "Q", 3), (1, "K", 1), (0, "V", 0), (1, "O", 2))
)


def examined_of(name: str, dtype=torch.float64) -> ExaminedModel:
    model = TINY[name].build().to(dtype)
    a, b = (mixed_samples(3, VOCAB, seed=seed) for seed in (1, 2))
    return ExaminedModel(model, resolve(model), a, b, (0, 1))


def loss_of(model, samples) -> torch.Tensor:
    """The mean of the samples' own losses, one sample at a time; transformers' own loss would be float32."""
    losses = []
    for sample in samples:
        logits = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.from_numpy(sample.labels[1:])))
    return torch.stack(losses).mean()


def independent_change(examined: ExaminedModel, target: Target, step: float) -> float:
    """A step on a copy of the model: a whole weight's gradient by autograd, masked to the head."""
    model = copy.deepcopy(examined.model)
    before = float(loss_of(model, examined.a).detach())
    loss_of(model, examined.b).backward()
    with torch.no_grad():
        for projection in examined.layout.layer(target.layer).projections:
            weight = model.get_submodule(projection.module).weight
            mask = torch.zeros(projection.shape, dtype=torch.bool)
            for piece in projection.slices:
                if (piece.block, piece.head) == (target.block, target.head):
                    mask[piece.rect.row : piece.rect.row_end, piece.rect.col : piece.rect.col_end] = True
            weight -= step * weight.grad * (mask.T if projection.transposed else mask)
        return float(loss_of(model, examined.a)) - before


def weights_of(examined: ExaminedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in examined.model.state_dict().items()}


@pytest.mark.parametrize(("name", "noise"), [("gpt2", 1e-12), ("falcon_new", 1e-12), ("llama", IN_FLOAT32)])
def test_a_measured_change_is_that_of_an_independent_step(name, noise):
    """Llama's norms are float32 whatever the weights are; its changes are about 1e-2."""
    examined = examined_of(name)
    targets = [target for target in TARGETS if target.head in examined.layout.layer(target.layer).heads(target.block)]
    assert len(targets) >= 3
    effects = measure(examined, targets, [STEP, 2 * STEP])
    changes = np.array([effect.changes for effect in effects])
    expected = np.array([[independent_change(examined, target, s) for s in (STEP, 2 * STEP)] for target in targets])
    np.testing.assert_allclose(changes, expected, rtol=1e-6, atol=noise)
    assert (np.abs(changes) > 1e-5).all()
    assert [effect.target for effect in effects] == targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_bit_for_bit(dtype):
    examined = examined_of("gpt2", dtype)
    before = weights_of(examined)
    modes = [module.training for module in examined.model.train().modules()]
    measure(examined, TARGETS, [STEP])
    for name, value in examined.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [module.training for module in examined.model.modules()] == modes


def test_a_step_that_fails_is_taken_back():
    examined = examined_of("llama")
    before = weights_of(examined)
    update = torch.ones(next(p for p in examined.layout.layer(0).projections if "Q" in p.blocks).slices[0].rect.shape)
    changed = []
    with pytest.raises(ZeroDivisionError), stepped(examined, Target(0, "Q", 0), [update]):
        changed += [n for n, value in examined.model.state_dict().items() if not torch.equal(value, before[n])] + [
            1 / 0
        ]
    assert all(torch.equal(value, before[name]) for name, value in examined.model.state_dict().items())


def test_for_a_small_step_the_change_is_the_inner_product():
    effects = measure(examined_of("gpt2"), TARGETS, [1e-6])
    for effect in effects:
        assert effect.changes[0] == pytest.approx(1e-6 * effect.predicted["-gA.gB"], rel=1e-3, abs=1e-13)
        assert effect.predicted["|gA.gB|"] <= effect.predicted["||gA|| ||gB||"]


def test_scores_are_those_of_the_engine():
    examined = examined_of("llama", torch.float32)
    effects = measure(examined, TARGETS, [STEP])
    for score in ("interference", "signed"):
        scores = examined.scores(ScoreSettings(score=score))
        for effect in effects:
            layer, block, head = effect.target.layer, effect.target.block, effect.target.head
            assert effect.predicted[score] == pytest.approx(float(scores[layer][block][head].mean()), rel=1e-4)


def test_heads_are_spread_over_blocks_and_layers():
    examined = examined_of("llama")
    targets = sample_targets(examined, 16, seed=0)
    assert len(set(targets)) == len(targets) == 16
    for block in "QKVO":
        assert sorted(target.layer for target in targets if target.block == block) == [0, 0, 1, 1]
    assert sample_targets(examined, 16, seed=0) == targets
    assert sample_targets(examined, 16, seed=1) != targets
    every = sample_targets(examined, 1000, seed=0)
    assert len(set(every)) == len(every) == 2 * (4 + 2 + 2 + 4)


def test_agreement_is_spearmans_and_its_gain_is_over_the_plain_gradients():
    rng = np.random.default_rng(0)
    effects = []
    for number in range(24):
        change = float(rng.normal())
        names = ("-signed", "|signed|", "interference", "overlap", "||gA|| ||gB||", "|gA.gB|")
        predicted = {name: float(rng.normal()) for name in names} | {"-gA.gB": change + float(rng.normal())}
        predicted["-signed"] = change**3
        effects.append(HeadEffect(Target(0, "QKVO"[number % 4], number), predicted, (change,)))
    rows = {(row.measured, row.predictor): row for row in agreements(effects, [1.0], resamples=200, seed=0)}
    perfect, plain = rows["change", "-signed"], rows["change", "-gA.gB"]
    assert perfect.rho == pytest.approx(1)
    assert perfect.within == pytest.approx(1)
    assert perfect.gain == pytest.approx(1 - plain.within)
    assert perfect.gain_interval[0] > 0
    assert plain.gain == 0
    for name in ("interference", "overlap"):
        column = [effect.predicted[name] for effect in effects]
        expected = spearmanr(column, [abs(effect.changes[0]) for effect in effects]).statistic
        row = rows["|change|", name]
        assert row.rho == pytest.approx(expected)
        assert row.interval[0] < row.rho < row.interval[1]


def test_weights_that_cannot_be_changed_are_refused(monkeypatch):
    monkeypatch.setattr(ExaminedModel, "all_plain", lambda self: False)
    with pytest.raises(QkovError, match="quantized or sharded"):
        measure(examined_of("llama"), TARGETS, [STEP])


def test_the_command_prints_a_table_and_writes_all_numbers(tmp_path, capsys):
    TINY["llama"].build().save_pretrained(tmp_path / "model")
    for task, seed in (("a", 1), ("b", 2)):
        write_task(tmp_path / f"{task}.jsonl", mixed_samples(4, VOCAB, seed=seed))
    tasks = ["--task-a", str(tmp_path / "a.jsonl"), "--task-b", str(tmp_path / "b.jsonl")]
    few = ["--heads", "16", "--samples", "4", "--bootstrap", "20", "--quiet"]
    output = tmp_path / "numbers.json"
    command = ["validate", str(tmp_path / "model"), *tasks, *few]
    assert main([*command, "--step", "0.1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "16 heads" in printed
    assert "better than plain gradients within blocks:" in printed
    written = json.loads(output.read_text())
    assert len(written["heads"]) == 16
    assert {row["predictor"] for row in written["agreements"]} >= {"-signed", "interference", "overlap", "-gA.gB"}
    assert main([*command, "--output", str(tmp_path / "no" / "such.json")]) == 2
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--step", "-1"])
