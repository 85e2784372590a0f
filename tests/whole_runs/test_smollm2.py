"""SmolLM2-135M, as itself and as Phi-3 and Qwen2: equal to dense autograd, and to each other."""

from __future__ import annotations

import functools

import oracle
import pytest
import real
import torch
from comparing import closeness
from jobs import Job

from qkov_dist.layout.proof import prove
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.tiles import Selection

pytestmark = [pytest.mark.real, pytest.mark.long]
LAYERS = (0, 14, 29)


@pytest.fixture(scope="module")
def loaded():
    return real.smollm2()


@pytest.fixture(scope="module")
def job(loaded):
    a = real.arithmetic_samples(loaded.tokenizer, 3, 40)
    b = real.code_samples(loaded.tokenizer, 4, 64)
    return Job(a, b, selection=Selection(layers=LAYERS), batch_tokens=160)


@pytest.fixture(scope="module")
def expected(loaded, job):
    """Dense autograd in float64 on three layers, heads cut out by reshaping."""
    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    paths = {layer: f"model.layers.{layer}.self_attn" for layer in LAYERS}
    gradients, losses = oracle.per_sample_gradients(loaded.model, samples, keep=tuple(paths.values()))
    num_a = len(job.a)
    scores = {}
    for layer, path in paths.items():
        heads = [oracle.heads_of_layer(loaded.model, "llama", path, g) for g in gradients]
        scores[layer] = {
            block: oracle.block_scores(
                heads,
                block,
                lambda squares: oracle.ema_fisher(squares, job.steps, job.decay),
                left=list(range(num_a)),
                right=list(range(num_a, len(samples))),
            )
            for block in heads[0]
        }
    return scores, losses


@pytest.fixture(scope="module")
def scored(loaded, job):
    """The job's scores, the family and the number of proved slices, by architecture."""
    changes = {"llama": lambda model: model, "phi3": real.as_phi3, "qwen2": real.as_qwen2}

    @functools.cache
    def result(architecture: str):
        model = changes[architecture](loaded.model)
        layout = resolve(model)
        return job.run(model), layout.family, len(prove(model, layout, layers=LAYERS))

    return result


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2"])
def test_three_layers_equal_dense_autograd(scored, expected, architecture):
    scores, _ = expected
    got, family, num_proved = scored(architecture)
    assert family == {"llama": "llama", "phi3": "phi3", "qwen2": "llama"}[architecture]
    assert num_proved == 24 * len(LAYERS)
    worst = 0.0
    for layer, blocks in scores.items():
        for block, wanted in blocks.items():
            assert wanted.shape[0] == {"Q": 9, "K": 3, "V": 3, "O": 9}[block]
            worst = max(worst, closeness(got[layer][block].scores, wanted))
            if block in "KV":
                assert closeness(got[layer][block].scores, wanted.roll(1, dims=0)) > 0.05
    print(f"{architecture}: largest deviation {worst:.1e} of the block's largest score")
    assert worst < 1e-3


def test_the_same_weights_in_three_architectures_score_the_same(scored):
    one, *others = (scored(architecture)[0] for architecture in ("llama", "phi3", "qwen2"))
    for other in others:
        for layer, blocks in one.items():
            for block, part in blocks.items():
                # the same products in float32, in another order where they are fused
                assert closeness(other[layer][block].scores, part.scores.double()) < 1e-4


def test_losses_are_those_of_the_oracle(loaded, job, expected):
    from qkov_dist.capture.collect import Collection
    from qkov_dist.capture.store import FactorStore
    from qkov_dist.scoring.tiles import make_tile_plan

    tile_plan = make_tile_plan(resolve(loaded.model), Selection(layers=(29,)), include_bias=False, num_samples=7)
    collection = Collection(FactorStore(2**30), tile_plan.sites)
    collection.run(loaded.model, "a", job.a)
    collection.run(loaded.model, "b", job.b)
    got = torch.tensor([record.loss for record in collection.records])
    torch.testing.assert_close(got.double(), torch.tensor(expected[1]).double(), rtol=1e-4, atol=1e-4)
