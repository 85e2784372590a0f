"""The engine's effects against whole weight gradients, uncut, and against real steps."""

from __future__ import annotations

import copy

import numpy as np
import oracle
import pytest
import torch
from comparing import TOLERANCE
from influences import records_of
from jobs import Job, job_for
from torch.nn.functional import cross_entropy
from zoo import TINY, Tiny

from qkov_dist.layout.resolve import resolve
from qkov_dist.results.effects import untested_effects
from qkov_dist.results.influences import Samples, changes
from qkov_dist.scoring.influence_records import OPTIMIZERS, of_samples
from qkov_dist.scoring.settings import ScoreSettings

RIDGE = 1e-5  # absolute, so that R is the same rule over a whole weight as over a head
IN_FLOAT64 = ScoreSettings(dtype=torch.float64, ridge_absolute=RIDGE, ridge_relative=0.0)
STEPS = (0.08, 0.04, 0.02)


def job_of(entry: Tiny) -> Job:
    return job_for(entry, estimator="mean", settings=IN_FLOAT64)


def whole_gradients(model, job: Job) -> dict[str, np.ndarray]:
    """By parameter, of every sample [N, ...], by autograd."""
    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    gradients, _ = oracle.per_sample_gradients(model, samples)
    names = [f"{p.module}.weight" for layer in resolve(model).layers for p in layer.projections]
    return {name: np.stack([g[name].numpy() for g in gradients]) for name in names}


def regularised(gradients: np.ndarray) -> np.ndarray:
    return (gradients**2).mean(0) + RIDGE


def samples_of(job: Job) -> Samples:
    is_a = np.arange(len(job.a) + len(job.b)) < len(job.a)
    return Samples(is_a, ~is_a)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "falcon_new"])
def test_heads_add_up_to_the_product_of_whole_weights(name):
    """No weight of these belongs to no head, so that sums over heads and blocks are those over whole projections."""
    entry = TINY[name]
    model, job = entry.build().double(), job_of(entry)
    found, gradients, samples = job.run(model), whole_gradients(model, job), samples_of(job)
    for layer in resolve(model).layers:
        of_heads = np.concatenate([part.influences for part in found[layer.index].values()])
        expected = np.zeros_like(of_heads[0])
        for projection in layer.projections:
            of_weight = gradients[f"{projection.module}.weight"].reshape(len(samples.a), -1)
            expected += records_of(of_weight, regularised(of_weight), samples, len(job.a))
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        assert (np.abs(of_heads.sum(0) - expected) <= 1e-4 * largest).all()  # the norms of llama are in float32
        effects, whole = (untested_effects(r[None], samples) for r in (of_heads, expected[None]))
        for optimizer in OPTIMIZERS:
            for key in ("curvature_a", "curvature_b", "own_a", "own_b"):
                assert effects[optimizer][key].sum() == pytest.approx(whole[optimizer][key].item(), rel=1e-4), key
        twice = of_heads.sum(0) + of_heads[0]
        assert (np.abs(twice - expected) > TOLERANCE * largest).any(), "a head counted twice"


def loss_of(model, samples) -> float:
    """The mean of the samples' own losses, one at a time."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            logits = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
            losses.append(cross_entropy(logits, torch.from_numpy(sample.labels[1:])))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["gpt2", "falcon_new"])  # in float64 throughout
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_real_step_in_one_head_changes_the_loss_by_as_much_as_predicted(name, optimizer):
    """Of either task; what is left over falls with the square of the step."""
    entry = TINY[name]
    model, job = entry.build().double(), job_of(entry)
    found, gradients, samples = job.run(model), whole_gradients(model, job), samples_of(job)
    scale = {n: regularised(g) ** (-0.5 if optimizer == "adam" else 0.0) for n, g in gradients.items()}
    # a step of Adam is as large in a weight of little gradient: in units in which both optimizers' are alike
    unit = np.mean([s.mean() for s in scale.values()])
    for layer, block, head in ((0, "Q", 1), (1, "K", 0), (0, "V", 0), (1, "O", 1)):
        influences = of_samples(found[layer][block].influences[head])[OPTIMIZERS.index(optimizer)]
        predicted = float(changes(influences, samples).value) / unit
        for stepped_on, harmed in ((samples.b, job.a), (samples.a, job.b)):
            before = loss_of(model, harmed)
            measured = []
            for step in STEPS:
                after = moved(model, layer, block, head, gradients, scale, stepped_on, step / unit)
                measured.append((loss_of(after, harmed) - before) / step)
            off = np.abs(np.array(measured) - predicted)
            np.testing.assert_allclose(off[:-1] / off[1:], 2.0, rtol=0.1)
            assert 2 * measured[2] - measured[1] == pytest.approx(predicted, rel=1e-2, abs=0.1 * off[2])


def moved(model, layer, block, head, gradients, scale, stepped_on, step: float):
    """A copy of the model after W <- W - step P gbar in one head."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for projection in resolve(model).layer(layer).projections:
            mask = torch.zeros(projection.shape, dtype=torch.bool)
            for piece in projection.slices:
                if (piece.block, piece.head) == (block, head):
                    mask[piece.rect.rows, piece.rect.cols] = True
            name = f"{projection.module}.weight"
            weight, mean = twin.get_parameter(name), gradients[name][stepped_on].mean(0)
            weight -= step * torch.from_numpy(scale[name] * mean) * (mask.T if projection.transposed else mask)
    return twin
