"""Ranks that share the tokens of samples: each has the whole factors of its own samples, as one process has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import mixed_samples
from sites import sites_of
from zoo import RELATIVES, TINY, VOCAB

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.samples import IGNORED, Sample
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.topology import Topology
from qkov_dist.errors import QkovError

NEAR = 1e-6  # of a factor's largest number, in float64; some routers and norms are float32 all the same
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 8,
}
ZOO = TINY | RELATIVES
SINGLE = {name for name, entry in ZOO.items() if not entry.float64} | {"gemma2"}  # its padding is NaN in float64
NEAR_IN_SINGLE, NEAR_IN_HALF = 1e-4, 1e-2
RIGHT = ["llama", "gpt2", "gpt_oss", "gemma3_text", "deepseek_v3", "mixtral", "phi3", "gpt_bigcode_mqa", "llama4_text"]
REFUSED = ["falcon_mqa", "mpt", "qwen3_next", "bert_masked", "deepseek_v32"]


def few_samples() -> list[Sample]:
    """Some shorter than there are ranks, some whose labels begin late, one of which ends in the first span."""
    samples = mixed_samples(6, VOCAB, seed=5, lengths=(5, 20))
    rng = np.random.default_rng(0)
    for number, (length, first) in enumerate([(2, 1), (3, 1), (17, 12), (18, 1)]):
        ids = rng.integers(3, VOCAB, length)
        labels = np.where(np.arange(length) < first, IGNORED, ids)
        samples.append(Sample(f"s{number}", ids, labels, ""))
    samples[-1].labels[6:] = IGNORED
    return samples


def collection_of(model, objective, reduction: str, topology: Topology | None) -> Collection:
    store = FactorStore(2**30)
    options = {} if topology is None else {"topology": topology}
    return Collection(store, tuple(sites_of(model)), objective, reduction, batch_tokens=40, **options)


def deviation(name: str, overrides: dict, context: int, reduction: str, dtype: str = "float64") -> float | str:
    """How far this rank's factors and losses are off those of one process, of the largest; or why it is refused."""
    entry, world, samples = ZOO[name], current(), few_samples()
    model = entry.build(**overrides)
    model = model if name in SINGLE else model.to(getattr(torch, dtype))
    objective = "causal" if entry.causal else "masked"
    first = world.rank // context * context
    group = world.subgroup([range(n, n + context) for n in range(0, world.size, context)])
    topology = Topology(world=world, dp_group=world, dp_ranks=tuple(range(world.size)), cp_group=group)
    assert list(group.names) == list(range(first, first + context))
    shared, alone = (collection_of(model, objective, reduction, of_ranks) for of_ranks in (topology, None))
    before = model.config._attn_implementation
    try:
        shared.run(model, "task", samples)
    except QkovError as error:
        return str(error)
    finally:
        assert model.config._attn_implementation == before
    alone.run(model, "task", samples)
    losses = [[record.loss for record in run.records] for run in (shared, alone)]
    worst = [np.abs(np.subtract(*losses)).max()]
    for site in sites_of(model):
        for kind in ("x", "d"):
            mine, whole = (getattr(run.store, kind)(site).values for run in (shared, alone))
            spans = shared.store.spans
            assert spans, "a rank has samples of its own"
            for number, span in spans.items():
                of_one = whole[slice(*alone.store.spans[number])]
                worst.append(float((mine[slice(*span)] - of_one).abs().max() / whole.abs().max()))
    return max(worst)


@pytest.mark.parametrize("name", RIGHT)
def test_each_rank_has_the_whole_factors_of_its_samples(name, ranks):
    assert max(ranks(2).run(deviation, name, {}, 2, "mean")) < NEAR


@pytest.mark.parametrize(("size", "context"), [(4, 2), (3, 3)])
def test_losses_are_summed_over_spans(size, context, ranks):
    assert max(ranks(size).run(deviation, "llama", {}, context, "sum")) < NEAR


def test_factors_of_float16_come_free_of_the_loss_scale(ranks):
    """They wait for the end of the backward pass before they are sent."""
    assert max(ranks(2).run(deviation, "llama", {}, 2, "mean", "float16")) < NEAR_IN_HALF


def test_a_rope_sees_how_long_the_whole_sample_is(ranks):
    overrides = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}
    assert max(ranks(2).run(deviation, "phi3", overrides, 2, "mean")) < NEAR


@pytest.mark.parametrize("name", REFUSED)
def test_what_moves_tokens_in_another_way_is_refused_by_name_on_all_ranks(name, ranks):
    said = ranks(2).run(deviation, name, {}, 2, "mean")
    assert len(set(said)) == 1
    assert said[0].startswith(f"parallel.cp: model type {ZOO[name].model_type!r}")


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        (
            "llama4_text",
            {"attn_temperature_tuning": True, "no_rope_layers": [1, 0]},
            "counts its tokens from",
        ),
        ("deepseek_v32", {}, "chooses among a rank's own keys"),
    ],
)
def test_what_shows_only_in_longer_samples_is_refused_too(name, overrides, why, ranks):
    """Scales that begin at a number of tokens, keys that are chosen where there are many."""
    assert all(why in said for said in ranks(2).run(deviation, name, overrides, 2, "mean"))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in TINY if name not in (*RIGHT, *REFUSED)])
def test_every_other_architecture_is_right_or_refused_by_name(name, ranks):
    for said in ranks(2).run(deviation, name, {}, 2, "mean"):
        near = NEAR_IN_SINGLE if name in SINGLE else NEAR
        assert said.startswith("parallel.cp: model type") if isinstance(said, str) else said < near
