"""`qkov validate`, steps in one head: predictions and changes are those of independent steps; weights come back."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from examined import examined_of, loss_of
from rounding import reordered
from samples import mixed_samples, write_task
from scipy.stats import spearmanr
from zoo import LAYERS, TINY, VOCAB

from qkov_dist.cli import main
from qkov_dist.errors import QkovError
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.verification.agreement import agreements
from qkov_dist.verification.effects import HELD_OUT, SAME, HeadEffect, Parts, measure, parts_of
from qkov_dist.verification.examined_model import ExaminedModel
from qkov_dist.verification.head_targets import Target, every_target, halves, sample_targets, stepped

STEP = 0.3
IN_FLOAT32 = 5 * reordered(2 * (2 * LAYERS + 1))  # the norms' part of a loss of about 5
TARGETS = tuple(
    Target(layer, block, head) for layer, block, head in ((0, "Q", 3), (1, "K", 1), (0, "V", 0), (1, "O", 2))
)


def masks_of(examined: ExaminedModel, layer: int, block: str, head: int | None = None) -> dict[str, torch.Tensor]:
    """Where a head is, or all heads of its block: module -> mask of the weight as it is stored."""
    masks = {}
    for projection in examined.layout.layer(layer).projections:
        mask = torch.zeros(projection.shape, dtype=torch.bool)
        for piece in projection.slices:
            if piece.block == block and head in (None, piece.head):
                mask[piece.rect.row : piece.rect.row_end, piece.rect.col : piece.rect.col_end] = True
        if mask.any():
            masks[projection.module] = mask.T if projection.transposed else mask
    return masks


def gradients_by_autograd(examined: ExaminedModel, samples, masks: dict[str, torch.Tensor]) -> np.ndarray:
    """Per-sample gradients [N, P] of what the masks show, by autograd, one sample at a time."""
    rows = []
    for sample in samples:
        examined.model.zero_grad()
        loss_of(examined.model, [sample]).backward()
        parts = [examined.model.get_submodule(name).weight.grad[mask] for name, mask in masks.items()]
        rows.append(torch.cat(parts).double().numpy())
    examined.model.zero_grad()
    return np.stack(rows)


def by_autograd(examined: ExaminedModel, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of all samples [N, P], and R, of a head."""
    samples = [*examined.a, *examined.b]
    gradients = gradients_by_autograd(examined, samples, masks_of(examined, target.layer, target.block, target.head))
    of_block = gradients_by_autograd(examined, samples, masks_of(examined, target.layer, target.block))
    return gradients, (gradients**2).mean(0) + 1e-3 * (of_block**2).mean()


def independent_losses(examined: ExaminedModel, target: Target, step: np.ndarray, samples) -> float:
    """The loss after a step [P] on a copy of the model."""
    model, start = copy.deepcopy(examined.model), 0
    with torch.no_grad():
        for name, mask in masks_of(examined, target.layer, target.block, target.head).items():
            count = int(mask.sum())
            weight = model.get_submodule(name).weight
            weight[mask] -= torch.from_numpy(step[start : start + count]).to(weight)
            start += count
        return float(loss_of(model, samples))


def weights_of(examined: ExaminedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in examined.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("name", "noise"), [("gpt2", 1e-12), ("falcon_new", 1e-12), ("llama", IN_FLOAT32)])
def test_measured_parts_are_those_of_independent_steps(name, noise, optimizer):
    """Llama's norms are float32 whatever the weights are. Predictors come from one half of A, steps go both ways."""
    examined = examined_of(name)
    targets = [target for target in TARGETS if target in every_target(examined)]
    effects = measure(examined, targets, [STEP, 2 * STEP], optimizer=optimizer, seed=3)
    first, second = halves(len(examined.a), 3, "A")
    predicting = ExaminedModel(
        examined.model, examined.layout, [examined.a[n] for n in first], examined.b, (0, 1), estimator="mean"
    )
    measured_on = {SAME: predicting.a, HELD_OUT: [examined.a[n] for n in second]}
    for target, effect in zip(targets, effects, strict=True):
        gradients, regularised = by_autograd(predicting, target)
        scale = np.ones_like(regularised) if optimizer == "sgd" else regularised**-0.5
        step = scale * gradients[len(first) :].mean(0)
        for half, samples in measured_on.items():
            before = float(loss_of(examined.model, samples).detach())
            for place, size in enumerate((STEP, 2 * STEP)):
                ahead, back = (independent_losses(examined, target, s * step, samples) for s in (size, -size))
                got = effect.measured[half]
                assert got.odd[place] == pytest.approx((ahead - back) / 2, rel=1e-6, abs=noise)
                assert got.even[place] == pytest.approx((ahead + back) / 2 - before, rel=1e-6, abs=noise)
        of_a, expected = gradients[: len(first)], effect.predicted
        assert expected["change"] == pytest.approx(-of_a.mean(0) @ step, rel=1e-4)
        assert expected["curvature"] == pytest.approx(0.5 * (of_a**2).mean(0) @ step**2, rel=1e-4)
        assert expected["curvature_along"] == pytest.approx(0.5 * np.mean((of_a @ step) ** 2), rel=1e-4)
    assert [effect.target for effect in effects] == targets


def test_odd_and_even_parts_of_a_quadratic_are_its_two_orders():
    rng = np.random.default_rng(0)
    slope, curve, step = rng.normal(size=3), rng.normal(size=(3, 3)), rng.normal(size=3)

    def change(size: float) -> float:
        return float(-size * slope @ step + 0.5 * size**2 * step @ curve @ step)

    forward, backward = (np.array([[change(s * size)] for size in (1.0, 2.0)]) for s in (1, -1))
    parts = parts_of(forward, backward)
    np.testing.assert_allclose(parts.odd, [-slope @ step, -2 * slope @ step], rtol=1e-12)
    np.testing.assert_allclose(parts.even, [0.5 * step @ curve @ step, 2 * step @ curve @ step], rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_slopes_tend_to_one_as_steps_shrink(optimizer):
    """Of the odd part, on the samples that it is predicted on; of the even part to a number, as the Fisher is none."""
    examined, sizes = examined_of("gpt2"), [1.0, 0.1, 0.01]
    targets = sample_targets(examined, 16, seed=0)
    scale = 1.0 if optimizer == "sgd" else 0.02
    sizes = [scale * size for size in sizes]
    effects = measure(examined, targets, sizes, optimizer=optimizer, seed=0)
    _, slopes = agreements(effects, sizes, resamples=20, seed=0)
    found = {(slope.samples, slope.measured, slope.size): slope for slope in slopes if slope.predictor != "curvature"}
    off = [abs(found[SAME, "odd", size].slope - 1) for size in sizes]
    assert off[2] < 1e-3
    assert off[0] > 10 * off[1] > 100 * off[2]
    even = [found[SAME, "even", size].slope for size in sizes]
    assert abs(even[2] / even[1] - 1) < 0.02
    held_out = found[HELD_OUT, "odd", sizes[2]]
    assert abs(held_out.slope - 1) > 0.05
    assert held_out.interval[0] < held_out.slope < held_out.interval[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_bit_for_bit(dtype):
    examined = examined_of("gpt2", dtype)
    before = weights_of(examined)
    modes = [module.training for module in examined.model.train().modules()]
    measure(examined, TARGETS, [STEP], optimizer="adam", seed=0)
    for name, value in examined.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [module.training for module in examined.model.modules()] == modes


def test_a_step_that_fails_is_taken_back():
    examined = examined_of("llama")
    before = weights_of(examined)
    area = next(p for p in examined.layout.layer(0).projections if "Q" in p.blocks).slices[0].rect.area
    changed = []
    with pytest.raises(ZeroDivisionError), stepped(examined, Target(0, "Q", 0), torch.ones(area)):
        changed += [n for n, value in examined.model.state_dict().items() if not torch.equal(value, before[n])] + [
            1 / 0
        ]
    assert all(torch.equal(value, before[name]) for name, value in examined.model.state_dict().items())


def test_scores_are_those_of_the_engine():
    examined = examined_of("llama", torch.float32, num=6)
    effects = measure(examined, TARGETS, [STEP], optimizer="sgd", seed=1)
    first, _ = halves(6, 1, "A")
    predicting = ExaminedModel(
        examined.model, examined.layout, [examined.a[n] for n in first], examined.b, (0, 1), estimator="mean"
    )
    for score, name, sign in (("interference", "interference", 1), ("signed", "-signed", -1)):
        scores = predicting.scores(ScoreSettings(score=score))
        for effect in effects:
            of_block = scores[effect.target.layer][effect.target.block]
            assert effect.predicted[name] == pytest.approx(sign * float(of_block[effect.target.head].mean()), rel=1e-4)


def test_heads_are_spread_over_blocks_and_layers():
    examined = examined_of("llama")
    targets = sample_targets(examined, 16, seed=0)
    assert len(set(targets)) == len(targets) == 16
    for block in "QKVO":
        assert sorted(target.layer for target in targets if target.block == block) == [0, 0, 1, 1]
    assert sample_targets(examined, 16, seed=0) == targets
    assert sample_targets(examined, 16, seed=1) != targets
    assert set(sample_targets(examined, 1000, seed=0)) == set(every_target(examined))
    assert len(every_target(examined)) == 2 * (4 + 2 + 2 + 4)


def test_halves_share_no_sample_and_depend_on_the_seed():
    one, other = halves(9, 0, "A")
    assert (len(one), len(other)) == (5, 4)
    assert sorted([*one, *other]) == list(range(9))
    assert halves(9, 0, "A") == (one, other) != halves(9, 1, "A")


def test_agreement_is_spearmans_and_its_gain_is_over_the_first_predictor():
    rng = np.random.default_rng(0)
    names = ("change", "curvature", "curvature_along", "-signed", "interference", "overlap", "||gA|| ||gB||")
    effects = []
    for place in range(24):
        predicted = {name: float(rng.normal()) for name in names}
        odd, even = 0.5 * predicted["change"] + 0.1 * float(rng.normal()), predicted["curvature"] ** 3
        parts = {HELD_OUT: Parts((odd,), (even,)), SAME: Parts((2 * odd,), (even,))}
        effects.append(HeadEffect(Target(0, "QKVO"[place % 4], place), predicted, parts))
    ranks, slopes = agreements(effects, [2.0], resamples=200, seed=0)
    rows = {(row.samples, row.measured, row.predictor): row for row in ranks}
    perfect = rows[HELD_OUT, "even", "curvature"]
    assert perfect.rho == perfect.within == pytest.approx(1)
    assert rows[HELD_OUT, "change", "change"].gain == 0
    worse = rows[HELD_OUT, "even", "overlap"]
    assert worse.gain == pytest.approx(worse.within - 1)
    assert worse.gain_interval[1] < 0
    change = np.array([e.predicted["change"] for e in effects])
    odd = np.array([e.measured[HELD_OUT].odd[0] for e in effects])
    overlap = [e.predicted["overlap"] for e in effects]
    row = rows[HELD_OUT, "odd", "overlap"]
    assert row.rho == pytest.approx(spearmanr(overlap, odd).statistic)
    assert row.interval[0] < row.rho < row.interval[1]
    found = {(slope.samples, slope.measured): slope for slope in slopes}
    line = np.linalg.lstsq(2.0 * change[:, None], odd)[0][0]
    assert found[HELD_OUT, "odd"].slope == pytest.approx(line)
    assert found[SAME, "odd"].slope == pytest.approx(2 * line)
    assert found[HELD_OUT, "odd"].interval[0] < line < found[HELD_OUT, "odd"].interval[1]


def test_what_cannot_be_measured_is_refused(monkeypatch):
    examined = examined_of("llama")
    twice = ExaminedModel(examined.model, examined.layout, examined.a, [*examined.b, examined.a[0]], (0, 1))
    few = ExaminedModel(examined.model, examined.layout, examined.a[:3], examined.b, (0, 1))
    for wrong, words in ((twice, "without common samples"), (few, "at least 4 samples")):
        with pytest.raises(QkovError, match=words):
            measure(wrong, TARGETS, [STEP], optimizer="sgd", seed=0)
    monkeypatch.setattr(ExaminedModel, "all_plain", lambda self: False)
    with pytest.raises(QkovError, match="quantized or sharded"):
        measure(examined, TARGETS, [STEP], optimizer="sgd", seed=0)


def test_the_command_prints_tables_and_writes_all_numbers(tmp_path, capsys):
    TINY["llama"].build().save_pretrained(tmp_path / "model")
    for task, seed in (("a", 1), ("b", 2)):
        write_task(tmp_path / f"{task}.jsonl", mixed_samples(4, VOCAB, seed=seed))
    renamed = (tmp_path / "b.jsonl").read_text().replace('"input_ids"', '"ids"')
    (tmp_path / "b.jsonl").write_text(renamed)
    tasks = ["--task-a", str(tmp_path / "a.jsonl"), "--task-b", str(tmp_path / "b.jsonl")]
    tasks += ["--columns-b", "input_ids=ids", "labels=labels"]
    few = ["--heads", "16", "--samples", "4", "--bootstrap", "20", "--quiet"]
    output = tmp_path / "numbers.json"
    command = ["validate", str(tmp_path / "model"), *tasks, *few]
    assert main([*command, "--optimizer", "sgd", "--sizes", "0.1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "16 heads" in printed
    assert "size 0.1" in printed
    assert "better than the predicted change within blocks:" in printed
    written = json.loads(output.read_text())
    assert len(written["heads"]) == 16
    assert {row["predictor"] for row in written["agreements"]} >= {"change", "harm", "curvature", "interference"}
    assert {row["samples"] for row in written["slopes"]} == {"held out", "same"}
    assert main([*command, "--output", str(tmp_path / "no" / "such.json")]) == 2
    assert "--output" in capsys.readouterr().err
    for wrong in (["--sizes", "-1"], ["--optimizer", "lion"], ["--columns-a", "ids"]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
