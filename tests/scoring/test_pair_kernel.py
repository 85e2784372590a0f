"""The two passes over a tile's gradients in Triton's language: run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from jobs import pooled
from rounding import reordered
from zoo import TINY

from qkov_dist.scoring import pair_trial
from qkov_dist.scoring.kernel import Rule, add_tile
from qkov_dist.scoring.pair_kernel import SQUARED_COLUMNS, PairKernel, can_use
from qkov_dist.scoring.pair_trial import PairTrials
from qkov_dist.scoring.score import diagonal_fisher, pair_scores
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tile_gradients import Buffers

pytest.importorskip("triton")
from qkov_dist.scoring import triton_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = PairKernel(block=16, step=16, warps=4)
ALL, A, B = slice(0, 37), slice(0, 20), slice(20, 37)  # 37 samples: blocks of 16 that are full, and one that is not


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Have Triton's interpreter run the kernels; what a kernel is is decided where its module is read."""
    if ON_GPU:
        yield
        return
    with monkeypatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        importlib.reload(triton_kernels)
        yield
    importlib.reload(triton_kernels)


def gradients_of(num: int, heads: int, size: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    gradients = torch.randn(num, heads, size, generator=made)
    gradients *= torch.rand(num, 1, size, generator=made) > 0.2  # some elements without a gradient
    return gradients.to(DEVICE)


def weights_of(*sizes: int) -> torch.Tensor:
    weights = torch.zeros(len(sizes), sum(sizes))
    for task, part in enumerate(torch.arange(sum(sizes)).split(sizes)):
        weights[task, part] = torch.rand(len(part), generator=torch.Generator().manual_seed(task)) / sum(sizes)
    return weights.to(DEVICE)


@pytest.mark.parametrize("score", list(KINDS))
@pytest.mark.parametrize(
    ("heads", "size", "left", "right"),
    [(1, 1050, ALL, ALL), (3, 77, ALL, ALL), (3, 77, B, A), (3, 77, B, B)],
    ids=["in parts", "all", "b a", "b b"],
)
def test_scores_and_fisher_are_those_of_the_definition(score, heads, size, left, right):
    gradients, weights, ridges = gradients_of(37, heads, size), weights_of(20, 12, 5), (0.125, 0.25, 0.5)[:heads]
    before = torch.rand(heads, left.stop - left.start, right.stop - right.start).to(DEVICE)
    if left == right:
        before += before.mT.clone()
    scores, rule = before.clone(), Rule(score, 0.02, ridges, left, right, pairs=SMALL)
    by_task = add_tile(scores, gradients.clone(), weights, rule, Buffers())
    for head, ridge in enumerate(ridges):
        of_head = gradients[:, head].double()
        of_tasks = diagonal_fisher(of_head, weights.double())
        torch.testing.assert_close(by_task[:, head].double(), of_tasks, rtol=reordered(37), atol=0)
        sides = {"left": left, "right": right, "score": score, "epsilon": 0.02, "ridge": ridge}
        expected = pair_scores(of_head, of_tasks.sum(0), **sides)
        sizes = pair_scores(of_head.abs(), of_tasks.sum(0), **sides)
        deviation = (scores[head].double() - before[head].double() - expected).abs() / sizes
        assert deviation.max() < reordered(size + 37)


def test_more_columns_than_are_squared_at_a_time_and_one_task_alone():
    num, size = 11, SQUARED_COLUMNS + 5
    gradients, weights = gradients_of(num, 1, size)[:, 0].contiguous(), weights_of(num)
    by_task = gradients.new_full((1, size), torch.nan)
    SMALL.put_squares(gradients, weights, by_task)
    expected = diagonal_fisher(gradients.double(), weights.double())
    torch.testing.assert_close(by_task.double(), expected, rtol=reordered(num), atol=0)


@pytest.mark.parametrize("estimator", ["ema", "mean"])  # effects need squares of their own, or none
@pytest.mark.parametrize("score", ["interference", "signed"])
def test_the_engine_finds_the_same_by_them(score, estimator, monkeypatch):
    """Scores, sums of I, effects and own shares of heads side by side, biases among them."""
    entry = TINY["llama"]
    model, tried = entry.build(num_hidden_layers=1).to(DEVICE), []
    settings = ScoreSettings(score, head_batch_bytes=2**20, device=DEVICE)
    job = pooled(entry, settings=settings, estimator=estimator, include_bias=True)
    expected = job.run(model)

    class Known(PairTrials):
        def fastest(self, heads, size, rule, weights):
            tried.append((heads, size, tuple(weights.shape)))
            return SMALL

    monkeypatch.setattr(PairTrials, "of", Known)
    found = job.run(model)
    assert {(heads, shape) for heads, _, shape in tried} == {(8, (2, 8)), (4, (2, 8))}  # Q, K and V; O
    for block, part in expected[0].items():
        for name in ("scores", "fisher", "influences", "own_shares"):
            mine, theirs = (np.asarray(getattr(of, name)) for of in (found[0][block], part))
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max(), err_msg=name)


class Trial:
    """A trial of two heads of 100 elements, with kernels that take as long as is said."""

    def __init__(self, monkeypatch, seconds) -> None:
        self.said, self.timed = [], []
        self.trials = PairTrials(ScoreSettings(device=DEVICE, compile=True, warn=self.said.append))
        self.rule, self.weights = Rule("interference", 0.0, (0.1,), A, B), weights_of(20, 17)
        named = {None: "products", **{kernel: str(kernel.block) for kernel in PairKernel.candidates("highest")}}

        def timed(rule, gradients, weights):
            found, _ = scored(rule, gradients, weights)
            self.timed.append(named[rule.pairs])
            return found, seconds[named[rule.pairs]]

        scored = pair_trial.timed_scores
        monkeypatch.setattr(pair_trial, "timed_scores", timed)

    def fastest(self) -> PairKernel | None:
        return self.trials.fastest(2, 100, self.rule, self.weights)


@pytest.mark.parametrize(("seconds", "block"), [((4, 3, 1, 2), 64), ((1, 3, 2, 4), None)], ids=["64", "products"])
def test_whatever_is_fastest_is_used_and_is_tried_once(seconds, block, monkeypatch):
    trial = Trial(monkeypatch, dict(zip(("products", "128", "64", "32"), seconds, strict=True)))
    assert getattr(trial.fastest(), "block", None) == block
    assert trial.fastest() == trial.fastest()
    assert trial.timed == ["products", "128", "64", "32"]
    assert trial.said == []


SLOW_PRODUCTS = {"products": 4, "128": 1, "64": 2, "32": 3}


def test_a_kernel_that_is_wrong_here_or_cannot_be_had_is_not_used_and_said(monkeypatch):
    trial, add, put = Trial(monkeypatch, SLOW_PRODUCTS), PairKernel.add_pairs, PairKernel.put_squares

    def wrong(kernel, scores, gradients, inverse, kind, left, right):
        if kernel.block == 128:
            raise ValueError("of this release\nand more")
        add(kernel, scores, gradients, inverse * (1.001 if kernel.block == 64 else 1.0), kind, left, right)

    monkeypatch.setattr(PairKernel, "add_pairs", wrong)
    assert trial.fastest().block == 32
    raised, deviates = trial.said
    assert raised.endswith(": of this release")
    assert "block=64" in deviates
    assert "off torch's products by 0.001" in deviates
    monkeypatch.setattr(PairKernel, "put_squares", lambda kernel, *of: (put(kernel, *of), of[2].mul_(1.001)))
    trial.trials._found.clear()
    assert trial.fastest() is None


def test_where_there_is_no_room_to_try_products_are_used(monkeypatch):
    trial = Trial(monkeypatch, SLOW_PRODUCTS)

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PairKernel, "add_pairs", short)
    assert trial.fastest() is None
    assert trial.said == []


def test_kernels_are_for_float32_on_a_gpu_where_something_is_compiled():
    assert can_use(torch.float32, torch.device("cuda"))
    assert not can_use(torch.float64, torch.device("cuda"))
    assert not can_use(torch.float32, torch.device("cpu"))
    on_gpu = ScoreSettings(device="cuda")
    assert PairTrials.of(on_gpu) is None
    assert PairTrials.of(replace(on_gpu, compile=True)) is not None


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("capability", [80, 90])  # of an A100, of an H100
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_they_compile_for_gpus_and_spill_no_register(precision, capability, monkeypatch, tmp_path):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    importlib.reload(triton_kernels)
    pointers = ("gradients", "inverse", "products", "weights", "by_task")

    def spilled(kernel, constants, **options):
        names = [name for name in kernel.arg_names if not name.isupper()]
        types = {name: "*fp32" if name in pointers else "i32" for name in names}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
        built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
        name = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stderr
        assert (tmp_path / "kernel.cubin").exists(), told
        return [line for line in told.splitlines() if "spill" in line and "0 bytes spill stores" not in line]

    squared = {"TASKS": 2, "COLS": SQUARED_COLUMNS}
    assert spilled(triton_kernels.put_squares, squared) == []
    for pairs in PairKernel.candidates(precision):
        maps = {"LEFT": 2, "RIGHT": 1, "ROOT": False, "HALF": False}
        sizes = {"BLOCK": pairs.block, "STEP": pairs.step, "PRECISION": pairs.precision}
        assert spilled(triton_kernels.put_products, {**maps, **sizes}, num_warps=pairs.warps) == []
