"""The Python API takes models as their users prepared them, on real ranks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_api import collected
from test_engine import job_for
from zoo import TINY

from qkov_dist import QKOVConfig, QkovError, QKOVInterferenceMetric, QKOVStatistics

TOLERANCE = 1e-5
WAYS = {
    "DistributedDataParallel": ("distributed_data_parallel", (2, 3)),
    "accelerate": ("accelerated", (2,)),
    "fully_shard by hand": ("fully_sharded", (2, 3)),
    "transformers tensor parallel": ("tensor_parallel", (2,)),
    "DeepSpeed ZeRO-1 with an optimizer": ("zero1", (2,)),
    "DeepSpeed ZeRO-2 with an optimizer": ("zero2", (2,)),
    "DeepSpeed ZeRO-3": ("zero3", (2,)),
}


def plain(model, _folder):
    return model


def distributed_data_parallel(model, _folder):
    model.train()
    return torch.nn.parallel.DistributedDataParallel(model)


def accelerated(model, _folder):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


def fully_sharded(model, _folder):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def tensor_parallel(_model, folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(tp_size=torch.distributed.get_world_size(), tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def _engine(model, stage: int):
    import deepspeed

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if stage < 3 else None
    model.requires_grad_(stage < 3)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    settings["zero_allow_untested_optimizer"] = True
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def zero1(model, _folder):
    return _engine(model, 1)


def zero2(model, _folder):
    return _engine(model, 2)


def zero3(model, _folder):
    return _engine(model, 3)


def heatmap_of(prepare: str, folder: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Collect and score on this rank's part; returns the arrays of the heatmap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry = TINY["llama"]
        model = globals()[prepare](entry.build(), folder)
        job = job_for(entry)
        metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collected(model, job), ridge_relative=0.01)
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
            np.testing.assert_allclose(found["scores"][block], expected, atol=TOLERANCE * largest, rtol=0)
            np.testing.assert_allclose(found["pair"][block], one_process["pair"][block], rtol=1e-4)
            np.testing.assert_allclose(found["p"][block], one_process["p"][block], err_msg=f"rank {rank}")


def other_batches() -> str:
    from jobs import mixed_samples

    from qkov_dist import FisherCollector

    rank = torch.distributed.get_rank()
    try:
        FisherCollector().collect_fisher(TINY["llama"].build(), mixed_samples(2, 96, seed=rank), "math")
    except QkovError as error:
        return str(error)
    return "no refusal"


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
        np.testing.assert_allclose(heatmap.cross[block], expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)
