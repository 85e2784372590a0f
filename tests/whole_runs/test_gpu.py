"""The same code on CUDA devices: one GPU against the CPU, bfloat16, and nccl ranks where there are two GPUs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparing import closeness, deviation
from jobs import Job
from ranks import pools
from rounding import SCORES
from running import run_quietly, settings, write_inputs
from samples import mixed_samples
from sites import NanBackward, sites_of
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.errors import QkovError
from qkov_dist.planning.measured import Measured
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.scoring.fisher_sums import column
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.stats.head_tests import head_tests
from qkov_dist.stats.pair_tests import PairTests
from qkov_dist.stats.statistics import QKOVStatistics

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("gpu"), "llama", "qwen3")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_scores_what_the_cpu_scores(name, dtype):
    model = TINY[name].build().to(dtype)
    job = Job(mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2))
    expected = job.run(model)
    got = replace(job, settings=ScoreSettings(device="cuda")).run(model.cuda())
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            # float32: kernels sum in another order; bfloat16 keeps 8 bits
            tolerance = 1e-3 if dtype == torch.float32 else 0.15
            assert closeness(got[layer][block].scores, part.scores.double()) < tolerance


@pytest.mark.parametrize("place", ["gpu", "some on the gpu", "pinned", "disk"])
def test_a_run_is_the_same_wherever_its_factors_wait(place, folder, monkeypatch):
    compute = {
        "gpu": {},
        "some on the gpu": {"factor_gpu_mb": 1},
        "pinned": {"factor_gpu_mb": 0},
        "disk": {"factor_gpu_mb": 0, "factor_memory_mb": 1},
    }[place]
    seen = []
    see = Measured.see_factors

    def looked_at(self, store):
        seen.append((store.bytes_on_gpu, store.bytes_in_memory, store.bytes_on_disk))
        see(self, store)

    monkeypatch.setattr(Measured, "see_factors", looked_at)
    rows = mixed_samples(40, VOCAB, seed=5, lengths=(50, 60))
    for task, part in (("a", rows[:20]), ("b", rows[20:])):
        lines = (json.dumps({"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()}) + "\n" for s in part)
        (folder / f"long-{task}.jsonl").write_text("".join(lines))
    tasks = {"tasks": [{"name": task, "path": str(folder / f"long-{task}.jsonl")} for task in ("a", "b")]}
    found = []
    for name, sections in (("first", {"compute": {}}), (place.replace(" ", "-"), {"compute": compute})):
        run_quietly(settings(folder, "llama", f"gpu-{name}", {}, **tasks, **sections))
        found.append(load_heatmap(folder / "out" / f"gpu-{name}" / "heatmap.h5"))
    on_gpu, in_memory, on_disk = seen[-1]
    assert on_gpu + in_memory + on_disk == sum(seen[0])
    assert (on_gpu > 0, in_memory > 0, on_disk > 0) == {
        "gpu": (True, False, False),
        "some on the gpu": (True, True, False),
        "pinned": (False, True, False),
        "disk": (False, True, True),
    }[place]
    assert deviation(found[1], found[0]) < SCORES


def test_a_run_on_a_gpu_is_that_on_the_cpu(folder, monkeypatch):
    run_quietly(settings(folder, "qwen3", "on-gpu", {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_quietly(settings(folder, "qwen3", "on-cpu", {}))
    on_gpu, on_cpu = (load_heatmap(folder / "out" / name / "heatmap.h5") for name in ("on-gpu", "on-cpu"))
    assert deviation(on_gpu, on_cpu) < 1e-4


def test_layers_are_tested_on_a_gpu_before_their_scores_leave_it(folder, monkeypatch):
    devices, take, found = [], PairTests.take, []

    def seen(self, layer, part, sizes, there=None):
        devices.append({scores.device.type for scores in there.values()} if there else None)
        take(self, layer, part, sizes, there)

    monkeypatch.setattr(PairTests, "take", seen)
    tested = {"statistics": {"permutations": 100}}
    for name in ("tested-on-gpu", "tested-on-cpu"):
        run_quietly(settings(folder, "llama", name, {}, **tested))
        found.append(load_heatmap(folder / "out" / name / "heatmap.h5"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num = len(found[0].layers)
    assert devices == [{"cuda"}] * num + [None] * num
    for block, tests in found[1].statistics["overlap"].items():
        for key in ("statistic", "null_mean", "ci_low", "ci_high"):
            np.testing.assert_allclose(found[0].statistics["overlap"][block][key], tests[key], rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("score", list(KINDS))
def test_every_score_is_that_of_the_cpu(score, compiled):
    model, settings = TINY["llama"].build(), ScoreSettings(score=score, ridge_relative=0.1)
    job = Job(mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2), settings=settings)
    expected = job.run(model)
    got = replace(job, settings=replace(settings, device="cuda", compile=compiled)).run(model.cuda())
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            assert closeness(got[layer][block].scores, part.scores.double()) < 1e-3
            for one, other in zip(got[layer][block].fisher, part.fisher, strict=True):
                for name in ("sum", "sum_of_a"):
                    assert column(one, name) == pytest.approx(column(other, name), rel=1e-3)


def test_what_is_not_finite_on_a_gpu_is_named():
    model = TINY["llama"].build().cuda()
    samples = mixed_samples(3, VOCAB, seed=3, mask=False)
    samples[1].input_ids[1] = 2  # no other sample has this token
    seen = []

    def spoil(_module, _args, output):
        return NanBackward.apply(output[0], (seen[-1] == 2).any(dim=1)), *output[1:]

    model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    model.model.layers[1].self_attn.register_forward_hook(spoil)
    collection = Collection(FactorStore(2**30), tuple(sites_of(model)))
    with pytest.raises(QkovError, match=r"task 'a', sample '3-1', layer 1 .* finite gradient"):
        collection.run(model, "a", samples)
    assert len(seen) == 2  # run again to see which
    assert collection.records == []


def test_the_api_scores_where_the_model_is():
    model = TINY["llama"].build()
    found = []
    for device in ("cpu", "cuda"):
        collector = FisherCollector()
        for task, seed in (("a", 1), ("b", 2)):
            collector.collect_fisher(model.to(device), mixed_samples(4, VOCAB, seed=seed), task=task)
        assert collector.device.type == device
        for chosen in (None, "cpu"):
            metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, device=chosen)
            found.append(metric.compute_heatmap("a", "b")["Q"]["scores"])
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < 1e-4 * np.abs(found[0]).max()


def test_products_in_tf32_come_close():
    model = TINY["llama"].build().cuda()
    job = Job(mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2))
    exact = replace(job, settings=ScoreSettings(device="cuda")).run(model)
    rounded = replace(job, settings=ScoreSettings(device="cuda", matmul_precision="high")).run(model)
    for layer, blocks in exact.items():
        for block, part in blocks.items():
            assert closeness(rounded[layer][block].scores, part.scores.double()) < 5e-3  # TF32 keeps 11 bits


def test_heads_are_tested_on_a_gpu_as_on_the_cpu():
    """The same labellings in the same type: numbers differ by rounding, and p-values by no count."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.lognormal(size=(7, 24, 24)).astype(np.float32))
    scores[3] = torch.nan  # an absent head
    found = []
    for device in ("cpu", "cuda"):
        design = QKOVStatistics(n_permutations=300).design(10, 14, device=torch.device(device))
        found.append(head_tests({"Q": scores}, design))
    (on_cpu, z_on_cpu), (on_gpu, z_on_gpu) = found
    for name, tests in on_cpu["Q"].items():
        for key, array in tests.arrays.items():
            np.testing.assert_allclose(on_gpu["Q"][name].arrays[key], array, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(z_on_gpu[name], z_on_cpu[name], rtol=1e-9)


def test_a_run_on_a_gpu_equals_itself_on_nccl_ranks(folder):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed for nccl ranks")
    run_quietly(settings(folder, "llama", "gpu-one", {}))
    with pools() as pool_of:
        pool_of(2).run(run_quietly, settings(folder, "llama", "gpu-ranks", {"shard": "fsdp"}))
    one, ranks = (load_heatmap(folder / "out" / name / "heatmap.h5") for name in ("gpu-one", "gpu-ranks"))
    assert deviation(ranks, one) < 1e-4
