"""Sharded models on real ranks: every way to cut a model gives the heatmap of one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparing import deviation, deviations
from rounding import PASSES, assert_same_fisher, reordered
from running import from_files, run_quietly, settings, write_inputs
from zoo import TINY

from qkov_dist.errors import QkovError
from qkov_dist.planning.measured import Measured
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.partials import list_partials

STORED = ("llama", "gpt2", "gpt_neox", "phi3")  # q, k, v apart; [in, out]; fused by head, with biases; fused by block
NORMED = ("olmo2", "qwen3")  # norms of q and k: over all heads, over each head; weights lie as llama's
MIXTURES = ("dbrx", "mixtral", "deepseek_v3")
GATHERED = ("phi3", "olmo2")  # attention runs whole on every tensor-parallel rank: any tp size will do
PLANS_THAT_FAIL = ("cohere", "llama4_text")  # inside transformers, in their own forward
# Each way to cut weights meets each way to store them, once on three ranks, which divide nothing here evenly. What cuts
# no weight (ddp, ZeRO-1 and 2) does not see how they are stored.
CASES = [
    *[("llama", 2, {"shard": shard}) for shard in ("ddp", "fsdp", "zero1", "zero2", "zero3")],
    *[(name, 3, {"shard": shard}) for name in STORED for shard in ("fsdp", "zero3")],
    ("gpt2", 3, {"shard": "ddp"}),
    ("llama", 7, {"shard": "fsdp"}),  # more than samples, heads and kv heads
    *[(name, 2, {"tp": 2}) for name in (*STORED, *NORMED) if name != "gpt2"],  # which has no tensor-parallel plan
    *[(name, 3, {"tp": 3}) for name in GATHERED],
    *[(name, 4, {"tp": 2, "shard": "fsdp"}) for name in STORED if name != "gpt2"],
    ("llama", 4, {"tp": 2, "shard": "ddp"}),
    ("falcon_h1", 2, {"shard": "fsdp"}),  # its configuration has lists that are as long as the model is deep
    ("dbrx", 2, {"shard": "zero3"}),  # an expert is called as often as tokens are sent to it
    ("llama", 4, {"shard": "fsdp", "replicate": 2}),  # hybrid sharding
    ("llama", 8, {"tp": 2, "shard": "fsdp", "replicate": 2}),  # and with tensor parallelism: three axes
    ("mixtral", 2, {"tp": 2}),  # gates and values of experts packed into one weight
    ("deepseek_v3", 4, {"ep": 2}),  # attention runs whole on each of two ranks, which share their samples
    ("mixtral", 2, {"tp": 2, "ep": 2}),
    ("mixtral", 4, {"tp": 2, "ep": 4, "shard": "fsdp"}),
    ("gpt2", 2, {"cp": 2, "shard": "ddp"}),  # learned positions
    ("llama", 4, {"cp": 2, "shard": "fsdp"}),  # two groups, which make as many passes
]


def name_of(case) -> str:
    model, world_size, cut = case
    return f"{model}-{world_size}-" + "-".join(f"{key}{value}" for key, value in cut.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models and two tasks on disk; 5 + 4 samples divide by no world size here but 3."""
    models = (*STORED, *NORMED, *MIXTURES, "falcon_h1", *PLANS_THAT_FAIL)
    return write_inputs(tmp_path_factory.mktemp("parallelism"), *models)


SCOPES = {
    "pooled": {
        "fisher": {"batch_size": 2, "scope": "pooled"},
        "metric": {"include_bias": True},
        "ridge": {"relative": 0.05, "absolute": 0.0},
    },
    "a": {"fisher": {"batch_size": 2, "scope": "a"}},
}
PLAINEST = "llama"  # which every cut meets: whose Fisher it is, and a run without a ridge, are the cut's business alone


@pytest.fixture(scope="module")
def one_process(folder):
    """The results of one process, by model and Fisher scope."""
    made = {}

    def result(model: str, scope: str):
        if (model, scope) not in made:
            out = f"{model}-one-{scope}"
            run_quietly(settings(folder, model, out, {}, **SCOPES[scope]))
            made[model, scope] = load_heatmap(folder / "out" / out / "heatmap.h5")
        return made[model, scope]

    return result


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_cut_equals_one_process(case, ranks, folder, one_process):
    model, world_size, cut = case
    outs = {scope: f"{name_of(case)}-{scope}" for scope in SCOPES if scope == "pooled" or model == PLAINEST}
    ranks(world_size).run(
        run_quietly, *(settings(folder, model, out, cut, **SCOPES[scope]) for scope, out in outs.items())
    )
    for scope, out in outs.items():
        expected, place = one_process(model, scope), folder / "out" / out
        merged = load_heatmap(place / "heatmap.h5")
        assert deviation(merged, expected) < PASSES
        assert merged.run_id == expected.run_id
        assert merged.samples_a.ids == expected.samples_a.ids
        np.testing.assert_allclose(merged.samples_b.losses, expected.samples_b.losses, rtol=PASSES)
        assert len(list_partials(place)) == world_size
        assert deviation(from_files(place), merged) < reordered(world_size)
        assert_same_fisher(merged.fisher["K"], expected.fisher["K"], PASSES)
        if "O_bias" in expected.shared:
            bias = expected.shared["O_bias"]["cross"]
            np.testing.assert_allclose(merged.shared["O_bias"]["cross"], bias, atol=PASSES * np.abs(bias).max())
        for rank in range(world_size):
            doubled = deviations(from_files(place, twice=rank), expected)
            assert min(doubled.values()) > 100 * PASSES, ("a replica counted twice", doubled)


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt_neox"])
def test_kv_heads_that_do_not_divide_are_refused_before_any_work(model, ranks, folder):
    out = folder / "out" / f"refused-{model}"
    refusals = ranks(3).run(refusal, settings(folder, model, out.name, {"tp": 3}))
    assert all("expected a divisor of the 4 query and" in message for message in refusals)
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "world_size", "cut", "expected"),
    [
        ("gpt2", 2, {"tp": 2}, "parallel.tp: expected a model whose transformers class has a tensor-parallel plan"),
        ("gpt2", 2, {"ep": 2}, "parallel.ep: expected a mixture of experts whose transformers class has a plan"),
        ("mixtral", 3, {"ep": 3}, "parallel.ep: expected a divisor of the 4 experts, got 3"),
        ("mixtral", 3, {"shard": "fsdp"}, "parallel.shard: expected ranks that each get one of the 4 experts"),
    ],
)
def test_what_no_plan_cuts_so_is_refused(model, world_size, cut, expected, ranks, folder):
    """The last in transformers, which stacks a rank's experts: of shares of 2, 2 and 0 the last fails as it loads."""
    refusals = ranks(world_size).run(refusal, settings(folder, model, "refused", cut))
    assert all(expected in message and "parallel.shard=" in message for message in refusals)


@pytest.mark.long
@pytest.mark.parametrize("model", PLANS_THAT_FAIL)
def test_a_plan_that_fails_is_named_with_its_model(model, ranks, folder):
    refusals = ranks(2).run(refusal, settings(folder, model, f"plan-{model}", {"tp": 2}))
    assert all(f"model type '{model}': expected a forward and a backward pass" in message for message in refusals)
    assert all("use fsdp" in message for message in refusals)


def refusal(raw: dict) -> str:
    """The message with which a run is refused."""
    try:
        run_quietly(raw)
    except QkovError as error:
        return str(error)
    return "no refusal"


@pytest.mark.long
def test_different_configurations_are_named(ranks, folder):
    messages = ranks(2).run(refusal_of_rank, settings(folder, "llama", "different", {"shard": "ddp"}))
    assert all("rank 1: configuration: fisher.decay: expected what rank 0 has" in message for message in messages)


def refusal_of_rank(raw: dict) -> str:
    import torch

    rank = torch.distributed.get_rank()
    return refusal({**raw, "fisher": {**raw["fisher"], "decay": 0.5 + 0.1 * rank}})


@pytest.mark.long
def test_a_sample_that_fails_on_one_rank_is_named_on_all(ranks, folder):
    import torch

    model = TINY["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = float("nan")
    model.save_pretrained(folder / "nan")
    rows = (folder / "a.jsonl").read_text() + json.dumps({"id": "bad", "input_ids": [4, 2, 5]}) + "\n"
    (folder / "bad.jsonl").write_text(rows)
    raw = settings(folder, "nan", "nan", {"shard": "ddp"})
    raw["tasks"][0]["path"] = str(folder / "bad.jsonl")
    messages = ranks(3).run(refusal, raw)
    assert all("sample 'bad': expected a finite loss" in message for message in messages)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank ")


@pytest.mark.long
def test_memory_of_a_rank_falls_with_the_number_of_ranks(ranks, folder, capsys):
    """Weights with FSDP2, factors with any cut; both are printed."""
    sizes = {}
    for world_size in (1, 2, 4):
        raw = settings(folder, "llama", f"memory-{world_size}", {"shard": "fsdp"} if world_size > 1 else {})
        found = ranks(world_size).run(memory_after, raw) if world_size > 1 else [memory_after(raw)]
        sizes[world_size] = {key: max(rank[key] for rank in found) for key in found[0]}
    with capsys.disabled():
        print("\nlargest rank, bytes:", json.dumps(sizes))
    for more, fewer in ((2, 1), (4, 2)):
        assert sizes[more]["weights"] < 0.7 * sizes[fewer]["weights"]
        assert sizes[more]["factors"] < 0.8 * sizes[fewer]["factors"]


def memory_after(raw: dict) -> dict[str, int]:
    """What this rank held after capture."""
    import qkov_dist.run

    kept: list[Measured] = []

    class Kept(Measured):
        def __init__(self, **found) -> None:
            super().__init__(**found)
            kept.append(self)

    qkov_dist.run.Measured = Kept
    try:
        run_quietly(raw)
    finally:
        qkov_dist.run.Measured = Measured
    mine = kept[0]
    return {"weights": mine.weights, "factors": mine.factors_memory, "scores": mine.scores, "sent": mine.sent_factors}
