"""The two passes over a tile's gradients in Triton's language: run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from jobs import pooled
from rounding import reordered
from running import qkov, settings, write_inputs
from zoo import TINY

from qkov_dist import job, load_heatmap
from qkov_dist.scoring import pair_trial
from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS
from qkov_dist.scoring.kernel import Rule, add_tile
from qkov_dist.scoring.pair_kernel import SQUARED_COLUMNS, SQUARED_TASKS, PairKernel, can_use
from qkov_dist.scoring.pair_trial import PairTrials, timed_scores
from qkov_dist.scoring.score import diagonal_fisher, pair_scores
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tile_gradients import Buffers

pytest.importorskip("triton")
from qkov_dist.scoring import triton_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = PairKernel(block=16, step=16, warps=4)
FEW_BYTES = 16  # of a thread, that registers may have no room for
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
    [(1, 1050, ALL, ALL), (3, 77, ALL, ALL), (3, 77, B, A), (3, 77, B, B), (3, 77, slice(0, 17), B)],
    ids=["in parts", "all", "b a", "b b", "as many"],
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


def test_blocks_below_the_diagonal_of_symmetric_scores_are_left_out():
    products = torch.full((1, 1, 37, 37), torch.nan).to(DEVICE)
    gradients, factors = gradients_of(37, 1, 40)[:, 0].contiguous(), torch.ones(40).to(DEVICE)
    sizes = (0, 37, 0, 37, 40, 48, 40)
    triton_kernels.put_products[9, 1, 1](gradients, factors, products, *sizes, 0, 0, True, True, 16, 16, "ieee")
    block = torch.arange(37).to(DEVICE) // 16
    assert torch.equal(products[0, 0].isnan(), block[:, None] > block[None, :])


def test_gradients_may_lie_apart_and_tasks_may_be_many():
    """Tasks are squared for eight at a time; of a TF32 kernel the Fisher has float32's digits all the same."""
    apart = gradients_of(22, 3, 50)[:, :2]
    weights, rule = weights_of(*[2] * 11), Rule("curvature", 0.0, (0.125,), slice(0, 9), slice(3, 12))
    expected = torch.zeros(2, 9, 9).to(DEVICE)
    of_tasks = add_tile(expected, apart.clone(), weights, rule, Buffers())
    for pairs in (SMALL, replace(SMALL, precision="tf32")):
        scores = torch.zeros(2, 9, 9).to(DEVICE)
        by_task = pairs.put_squares, scores.new_full((11, 150), torch.nan)
        by_task[0](gradients_of(22, 3, 50).view(22, -1), weights, by_task[1])
        torch.testing.assert_close(by_task[1].view(11, 3, 50)[:, :2], of_tasks, rtol=reordered(22), atol=0)
        inverse = 1 / (of_tasks.sum(0) + 0.125)
        pairs.add_pairs(scores, apart.flatten(1), inverse.flatten(), KINDS["curvature"], slice(0, 9), slice(3, 12))
        off = (scores - expected) / expected
        assert (off.abs().max() > 2e-6) == (pairs is not SMALL)
        assert off.mean().abs() < 1e-4  # rounded both ways; of digits cut off the mean is 7e-4


class Known(PairTrials):
    """Has found what is fastest, and how often it was asked for."""

    def __init__(self) -> None:
        super().__init__("highest", print)
        self.asked = []

    def fastest(self, rule, heads, size, weights, buffers):
        self.asked.append((heads, size))
        return replace(rule, pairs=SMALL)


@pytest.mark.parametrize("estimator", ["ema", "mean"])  # effects need squares of their own, or none
@pytest.mark.parametrize("score", ["interference", "signed"])
def test_the_engine_finds_the_same_by_them(score, estimator, monkeypatch):
    """Scores, sums of I, effects and own shares of heads side by side; biases are left to torch's products."""
    entry, known, added = TINY["llama"], Known(), []
    model, add = entry.build(num_hidden_layers=1).to(DEVICE), PairKernel.add_pairs
    of_score = ScoreSettings(score, head_batch_bytes=2**20, device=DEVICE)
    expected = pooled(entry, settings=of_score, estimator=estimator, include_bias=True).run(model)
    monkeypatch.setattr(PairKernel, "add_pairs", lambda *of: added.append(len(of[1])) or add(*of))
    of_score = replace(of_score, trials=known)
    found = pooled(entry, settings=of_score, estimator=estimator, include_bias=True).run(model)
    size = expected[0]["Q"].fisher[0][list(FISHER_COLUMNS).index("count")]
    assert {*known.asked} == {(8, size), (4, size)}  # Q, K and V; O
    assert added == [heads for heads, _ in known.asked]
    for block, part in expected[0].items():
        assert found[0][block].flops == part.flops
        for name in ("scores", "fisher", "influences", "own_shares"):
            mine, theirs = (np.asarray(getattr(of, name)) for of in (found[0][block], part))
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max(), err_msg=name)


class Trial:
    """A trial of two heads of 100 elements, with kernels that take as long as is said."""

    def __init__(self, monkeypatch, *seconds) -> None:
        self.said, self.timed = [], []
        self.trials, self.weights = PairTrials("highest", self.said.append), weights_of(20, 17)
        named = {None: "products", **{kernel: str(kernel.block) for kernel in PairKernel.candidates("highest")}}
        self.seconds = dict(zip(named.values(), seconds, strict=True))

        def timed(rule, *of):
            found, _ = timed_scores(rule, *of)
            self.timed.append(named[rule.pairs])
            return found, self.seconds[named[rule.pairs]]

        monkeypatch.setattr(pair_trial, "timed_scores", timed)

    def fastest(self, ridge=0.1, size=100) -> str:
        rule = Rule("interference", 0.0, (ridge,), A, B)
        found = self.trials.fastest(rule, 2, size, self.weights, Buffers())
        assert replace(found, pairs=None) == rule
        return str(found.pairs.block) if found.pairs else "products"


@pytest.mark.parametrize(("seconds", "best"), [((4, 3, 1, 2), "64"), ((1, 3, 2, 4), "products")], ids=str)
def test_whatever_is_fastest_is_used_and_is_tried_once(seconds, best, monkeypatch):
    trial, state = Trial(monkeypatch, *seconds), torch.get_rng_state()
    assert [trial.fastest(), trial.fastest(), trial.fastest(0.5)] == [best] * 3
    assert trial.timed == ["products", "128", "64", "32"]
    assert trial.said == []
    assert torch.equal(torch.get_rng_state(), state)


def broken(how):
    """``add_pairs``, but that of the kernel of 64 samples: ``how`` is done to scores, or raised."""

    def add(kernel, scores, gradients, inverse, kind, left, right):
        if kernel.block != 64:
            return good(kernel, scores, gradients, inverse, kind, left, right)
        if isinstance(how, Exception):
            raise how
        return how(scores)

    good = PairKernel.add_pairs
    return add


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (lambda scores: scores.fill_(torch.nan), "off torch's products by nan"),
        (lambda scores: scores.fill_(0.0), "off torch's products by 1"),
        (ValueError("at 20:13:\n\nof this release"), "ValueError: at 20:13: of this release"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_a_kernel_that_is_wrong_here_or_cannot_be_had_is_said_once_and_not_used(how, word, monkeypatch):
    trial = Trial(monkeypatch, 4, 3, 1, 2)
    monkeypatch.setattr(PairKernel, "add_pairs", broken(how))
    assert [trial.fastest(), trial.fastest(size=101)] == ["32", "32"]
    (said,) = trial.said
    assert "block=64" in said
    assert word in said


def test_a_wrong_fisher_is_seen_too(monkeypatch):
    trial, put = Trial(monkeypatch, 4, 3, 1, 2), PairKernel.put_squares
    monkeypatch.setattr(PairKernel, "put_squares", lambda kernel, *of: (put(kernel, *of), of[2].mul_(1.001)))
    assert trial.fastest() == "products"
    assert len(trial.said) == 3


def test_where_there_is_no_room_to_try_or_r_may_vanish_products_are_used(monkeypatch):
    """In float32 1 / R may be infinite without a ridge: there kernels are not used, so nothing is known of them."""
    trial = Trial(monkeypatch, 4, 3, 1, 2)
    assert trial.fastest(ridge=0.0) == "products"
    assert trial.timed == []
    monkeypatch.setattr(PairKernel, "add_pairs", broken(torch.OutOfMemoryError("CUDA out of memory")))
    assert trial.fastest() == "products"
    assert trial.said == []


def test_a_run_that_compiles_tries_kernels_and_goes_on_with_what_is_fastest(monkeypatch, tmp_path):
    """With TF32 on a CPU: there the compiled kernel, which is exact, would score otherwise."""
    config, compiled = tmp_path / "run.yaml", ("compute.compile=true", "compute.matmul_precision=high")
    config.write_text(yaml.safe_dump(settings(write_inputs(tmp_path, "llama"), "llama", "out", {})))
    found, added, add = {}, [], PairKernel.add_pairs
    monkeypatch.setattr(PairKernel, "add_pairs", lambda *of: added.append(of[0]) or add(*of))
    monkeypatch.setattr(PairKernel, "candidates", lambda precision: [replace(SMALL, precision="tf32")])
    monkeypatch.setattr(pair_trial, "_seconds", lambda work, device: 1 / (1 + len(added)))  # the kernel is quick
    monkeypatch.setattr(job, "can_use", lambda dtype, device: dtype == torch.float32)
    for name, options in (("plain", ()), ("float64", (*compiled, "compute.score_dtype=float64")), ("pairs", compiled)):
        assert added == []
        assert qkov("run", config, *options, f"output.dir={tmp_path / name}") == 0
        found[name] = load_heatmap(tmp_path / name / "heatmap.h5")
    assert len(added) > found["pairs"].cross["Q"].shape[0] * found["pairs"].cross["Q"].shape[1]
    for block, scores in found["plain"].cross.items():
        np.testing.assert_allclose(found["pairs"].cross[block], scores, rtol=5e-3)


def test_kernels_are_for_float32_on_a_gpu():
    assert can_use(torch.float32, torch.device("cuda"))
    assert not can_use(torch.float64, torch.device("cuda"))
    assert not can_use(torch.float32, torch.device("cpu"))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("capability", [80, 90])  # of an A100, of an H100
def test_they_compile_for_gpus_and_spill_next_to_no_register(capability, monkeypatch, tmp_path):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    importlib.reload(triton_kernels)
    pointers = ("gradients", "factors", "products", "weights", "by_task")

    def spilled(kernel, constants, aligned, **options):
        """Bytes that a thread's registers have no room for; ``aligned``: numbers are multiples of 16."""
        names = [name for name in kernel.arg_names if not name.isupper()]
        types = {name: "*fp32" if name in pointers else "i32" for name in names}
        sixteens = [at for at, name in enumerate(names) if aligned or name in pointers]
        known = {(at,): [["tt.divisibility", 16]] for at in sixteens}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants, known)
        built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
        name = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stderr
        assert (tmp_path / "kernel.cubin").exists(), told
        return max(map(int, re.findall("([0-9]+) bytes spill stores", told)))

    for tasks in (2, SQUARED_TASKS):
        squared = {"TASKS": tasks, "COLS": SQUARED_COLUMNS}
        assert spilled(triton_kernels.put_squares, squared, aligned=False) == 0
    for precision, symmetric, aligned in product(("highest", "high"), (False, True), (False, True)):
        for pairs in PairKernel.candidates(precision):
            maps = {"LEFT": 2, "RIGHT": 2 if symmetric else 1, "SYMMETRIC": symmetric, "HALF": symmetric}
            sizes = {"BLOCK": pairs.block, "STEP": pairs.step, "PRECISION": pairs.precision}
            found = spilled(triton_kernels.put_products, {**maps, **sizes}, aligned, num_warps=pairs.warps)
            assert found <= FEW_BYTES, (pairs, symmetric, aligned)
