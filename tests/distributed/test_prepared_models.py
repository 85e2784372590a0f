"""The Python API takes models as their users prepared them, on real ranks."""

from __future__ import annotations

import types
import warnings

import numpy as np
import prepared
import pytest
import torch
from collecting import collected
from jobs import job_for
from rounding import PASSES
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QkovError, QKOVInterferenceMetric, QKOVStatistics

WAYS = {
    "DistributedDataParallel": ("distributed_data_parallel", (2, 3)),
    "accelerate": ("accelerated", (2,)),
    "fully_shard by hand": ("fully_sharded", (2, 3)),
    "transformers tensor parallel": ("tensor_parallel", (2,)),
    "torch tensor parallel, axis tp": ("torch_parallel_tp", (2,)),
    "torch tensor parallel, axis model": ("torch_parallel_model", (2,)),
    "torch tensor parallel, no name": ("torch_parallel_nameless", (2,)),
    "torch tensor parallel and fully_shard": ("torch_parallel_fully_sharded", (4,)),
    "DeepSpeed ZeRO-1 with an optimizer": ("zero1", (2,)),
    "DeepSpeed ZeRO-2 with an optimizer": ("zero2", (2,)),
    "DeepSpeed ZeRO-3": ("zero3", (2,)),
    "DeepSpeed ZeRO-3 on the CPU, with an optimizer": ("zero3_offloaded", (2,)),
    "fully_shard over two axes, on the CPU": ("hybrid_offloaded", (4,)),
    "accelerate's ParallelismConfig, two axes": ("accelerated_hybrid", (4,)),
}


def heatmap_of(prepare: str, folder: str = "", group=None) -> dict[str, dict[str, np.ndarray]]:
    """Collect and score on this rank's part; returns the arrays of the heatmap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry = TINY["llama"]
        model = getattr(prepared, prepare)(entry.build(), folder)
        job = job_for(entry)
        collector = collected(model, job, group=group)
        metric = QKOVInterferenceMetric(QKOVConfig.from_model(model, group), collector, ridge_relative=0.01)
        heatmap = metric.compute_heatmap("math", "code", layers=[1])
        pair = metric.compute_sample_pair("math", 2, "code", 1, layer=1, head=3)
        results = QKOVStatistics(n_permutations=20).test_heatmap(heatmap)
    return {
        "scores": {block: np.array(scores) for block, scores in heatmap.cross.items()},
        "pair": {block: np.array(score) for block, score in pair.items()},
        "p": {block: results["cross_mean"][block]["p_value"] for block in heatmap.blocks},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    TINY["llama"].build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_process():
    return heatmap_of("plain")


CASES = [(way, world_size) for way, (_, sizes) in WAYS.items() for world_size in sizes]


@pytest.mark.long
@pytest.mark.parametrize(("way", "world_size"), CASES)
def test_a_prepared_model_is_taken_as_it_is(way, world_size, ranks, folder, one_process):
    for rank, found in enumerate(ranks(world_size).run(heatmap_of, WAYS[way][0], folder)):
        for block, expected in one_process["scores"].items():
            largest = np.abs(expected).max()
            np.testing.assert_allclose(found["scores"][block], expected, atol=PASSES * largest, rtol=0)
            np.testing.assert_allclose(found["pair"][block], one_process["pair"][block], rtol=0, atol=PASSES * largest)
            np.testing.assert_allclose(found["p"][block], one_process["p"][block], atol=0.1, err_msg=f"rank {rank}")


def on_a_part() -> list:
    """Of three ranks the last two have a model: their heatmap, and what is said where one fails, or one is left out."""
    from torch.distributed.device_mesh import DeviceMesh

    rank, group, mesh = torch.distributed.get_rank(), torch.distributed.new_group([1, 2]), DeviceMesh("cpu", [1, 2])
    if rank == 0:
        return [told(lambda: QKOVConfig.from_model(TINY["llama"].build(), group))]
    found = heatmap_of("sharded_over", mesh, group)["scores"]
    wrong = {"input_ids": [[5, 6, 700 if rank == 2 else 7]]}
    whole = prepared.fully_sharded(TINY["llama"].build(), "")
    collector, samples = FisherCollector(group=group), mixed_samples(2, VOCAB, seed=1)
    return [
        found,
        told(lambda: FisherCollector(group=group).collect_fisher(TINY["llama"].build(), wrong, "math")),
        told(lambda: collector.collect_fisher(whole, samples, "math")),
    ]


def told(call) -> str:
    try:
        call()
    except QkovError as error:
        return str(error)
    return "no refusal"


@pytest.mark.long
def test_a_group_of_ranks_makes_the_calls_alone(ranks, one_process):
    ((outside,), *inside) = ranks(3).run(on_a_part)
    assert outside.startswith("group: expected a process group that this rank is in, got one without rank 0")
    for scores, failed, left_out in inside:
        for block, expected in one_process["scores"].items():
            np.testing.assert_allclose(scores[block], expected, atol=PASSES * np.abs(expected).max(), rtol=0)
        assert failed.startswith("rank 2: batch of task 'math', sample 0: input_ids: expected token ids from 0 to 95")
        assert left_out.startswith("group: expected all ranks that share the model, got none of rank 0, which holds a")


def other_batches() -> str:
    samples = mixed_samples(2, 96, seed=torch.distributed.get_rank())
    return told(lambda: FisherCollector().collect_fisher(TINY["llama"].build(), samples, "math"))


def in_context_parallel(model, _folder):
    with prepared.context_parallel(model):
        collected(model, job_for(TINY["llama"]))


def in_ulysses(model, _folder):
    with prepared.ulysses(model):
        collected(model, job_for(TINY["llama"]))


def zero3_with_experts(_model, _folder):
    return prepared.engine(TINY["dbrx"].build(), 3, learns=False)


def refusal_of(prepare: str, folder: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way = globals().get(prepare) or getattr(prepared, prepare)
        return told(lambda: collected(way(TINY["llama"].build(), folder), job_for(TINY["llama"])))


REFUSED = {
    "staged": ("expected the modules that rank 0 has", "fsdp"),
    "schedule": ("ScheduleGPipe: expected a transformers language model", "fsdp"),
    "in_context_parallel": ("torch's context_parallel: expected all tokens of a sample", "FisherCollector(cp=N)"),
    "attention_in_context_parallel": (
        "torch's context parallelism of model.layers.0.self_attn: expected",
        "FisherCollector(cp=N)",
    ),
    "in_ulysses": ("DeepSpeed-Ulysses sequence parallelism: expected all tokens", "FisherCollector(cp=N)"),
    "zero3_with_experts": ("ZeRO-3: DbrxExperts: ", 'set_z3_leaf_modules(model, ["DbrxExperts"])'),
}


@pytest.mark.long
@pytest.mark.parametrize("prepare", REFUSED)
def test_what_would_hang_or_break_is_refused_on_all_ranks_before_any_pass(prepare, ranks, folder):
    one, other = ranks(2).run(refusal_of, prepare, folder)
    assert one == other
    assert all(text in one for text in REFUSED[prepare]), one


def fails_on_rank_1(how: str) -> list[str]:
    """What a rank is told; a collector that then goes on shows that no rank was left behind."""
    model, samples = TINY["llama"].build(), [mixed_samples(3, VOCAB, seed=seed) for seed in (1, 2)]
    collector, at_fault, layers = FisherCollector(batch_tokens=12), torch.distributed.get_rank() == 1, [0]
    batch = {"input_ids": [[5, 6, 7]]}
    if at_fault and how == "token":
        batch = {"input_ids": [[5, 6, 700]]}
    if at_fault and how == "hook":
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 // 0)
    if at_fault and how == "layer":
        layers = [7]
    told = ""
    try:
        if how == "model":
            QKOVConfig.from_model(model.model if at_fault else model)
        if how in ("token", "hook"):
            collector.collect_fisher(model, batch if how == "token" else samples[0], "math")
        for task, part in zip(("math", "code"), samples, strict=True):
            collector.collect_fisher(model, part, task)
        QKOVInterferenceMetric(QKOVConfig.from_model(model), collector).compute_heatmap("math", "code", layers=layers)
    except QkovError as error:
        told = f"{type(error).__name__}: {error}"
    if at_fault and how == "hook":
        hook.remove()
    collector = FisherCollector()
    return [told, str(collector.collect_fisher(model, samples[0], "math").shape)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("model", "SharedError: rank 1: model: expected the modules"),
        ("token", "SharedError: rank 1: batch of task 'math', sample 0: input_ids: expected token ids from 0 to 95"),
        ("hook", "SharedError: rank 1: LlamaForCausalLM: expected a forward and a backward pass of token ids"),
        ("layer", "SharedError: rank 1: metric.layers: expected"),
    ],
)
def test_an_error_on_one_rank_is_told_to_the_others(how, message, ranks):
    (first, after), (second, after_too) = ranks(2).run(fails_on_rank_1, how)
    assert first.startswith(message)
    assert second == first
    assert after == after_too == "(3,)"


def local_parts() -> list:
    """This rank's part of a tensor [2, 3, 4] that is spread over two ranks in each way."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    from qkov_dist.distributed.sharding import local_part

    mesh, whole = prepared.mesh_of(2), torch.arange(24.0).view(2, 3, 4)
    rank = torch.distributed.get_rank()
    parts = {"whole": (whole, Replicate()), "features": (whole[..., 2 * rank : 2 * rank + 2], Shard(2))}
    parts["sums"] = (whole * (0.25 + rank * 0.5), Partial())
    found = [local_part(DTensor.from_local(t, mesh, [p]), 6, "q").tolist() for t, p in parts.values()]
    refused = []
    for at_hand in (DTensor.from_local(whole[rank : rank + 1], mesh, [Shard(0)]), whole[:, : 2 - rank]):
        try:
            local_part(at_hand, 6, "layer.q_proj")
        except QkovError as error:
            refused.append(str(error))
    return [found, refused]


@pytest.mark.long
def test_the_local_part_of_a_tensor_has_all_tokens_or_is_refused(ranks):
    whole = torch.arange(24.0).view(2, 3, 4)
    for rank, (found, refused) in enumerate(ranks(2).run(local_parts)):
        assert found == [whole.tolist(), whole[..., 2 * rank : 2 * rank + 2].tolist(), whole.tolist()]
        assert [text.split(". ")[0] for text in refused] == [
            f"layer.q_proj: expected all 6 tokens of the batch on every rank, got {num}" for num in (3, 4 - 2 * rank)
        ]


@pytest.mark.long
def test_ranks_with_different_batches_are_named(ranks):
    messages = ranks(2).run(other_batches)
    assert all(message.startswith("rank 1: batch of task 'math'") for message in messages)


def test_a_model_with_a_layer_offloaded_to_disk(tmp_path, one_process):
    from transformers import AutoModelForCausalLM

    entry = TINY["llama"]
    entry.build().save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    job = job_for(entry)
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collected(model, job), ridge_relative=0.01)
    heatmap = metric.compute_heatmap("math", "code", layers=[1])
    for block, expected in one_process["scores"].items():
        np.testing.assert_allclose(heatmap.cross[block], expected, atol=PASSES * np.abs(expected).max(), rtol=0)


def test_weights_that_deepspeed_has_rounded_on_their_way_to_disk_are_refused():
    """DeepSpeed's own files: `test_cuts`, where what reads them is built."""
    rounded, small = (
        types.SimpleNamespace(dtype=torch.bfloat16, swappable_tensor=lambda parameter, swaps=swaps: swaps)
        for swaps in (True, False)
    )
    model, samples = TINY["llama"].build(), mixed_samples(2, VOCAB, seed=1)
    model.model.embed_tokens.weight.nvme_swapper = small  # it stayed in memory, as it was
    FisherCollector().collect_fisher(model, samples, "math")
    model.model.norm.weight.nvme_swapper = rounded
    said = told(lambda: FisherCollector().collect_fisher(model, samples, "math"))
    assert said.startswith("ZeRO-3 with weights on NVMe: expected files of torch.float32")
    assert "got files of torch.bfloat16" in said
