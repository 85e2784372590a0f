"""The same code on CUDA devices: one GPU against the CPU, bfloat16, and nccl ranks where there are two GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jobs import Job, closeness, mixed_samples
from ranks import pools
from test_distributed import deviation, folder, run_quietly, settings  # noqa: F401  (folder is a fixture)
from zoo import TINY, VOCAB

from qkov_dist.store import load_heatmap

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_scores_what_the_cpu_scores(name, dtype):
    model = TINY[name].build().to(dtype)
    job = Job(mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2))
    expected = job.run(model)
    got = job.run(model.cuda())
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            # float32: kernels sum in another order; bfloat16 keeps 8 bits
            tolerance = 1e-3 if dtype == torch.float32 else 0.15
            assert closeness(got[layer][block].scores, part.scores.double()) < tolerance


def test_products_in_tf32_come_close():
    model = TINY["llama"].build().cuda()
    job = Job(mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2))
    exact = job.run(model)
    rounded = replace(job, settings=replace(job.settings, matmul_precision="high")).run(model)
    for layer, blocks in exact.items():
        for block, part in blocks.items():
            assert closeness(rounded[layer][block].scores, part.scores.double()) < 5e-3  # TF32 keeps 11 bits


def test_a_run_on_a_gpu_equals_itself_on_nccl_ranks(folder):  # noqa: F811
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed for nccl ranks")
    run_quietly(settings(folder, "llama", "gpu-one", {}))
    with pools() as pool_of:
        pool_of(2).run(run_quietly, settings(folder, "llama", "gpu-ranks", {"shard": "fsdp"}))
    one, ranks = (load_heatmap(folder / "out" / name / "heatmap.h5") for name in ("gpu-one", "gpu-ranks"))
    assert deviation(ranks, one) < 1e-4
