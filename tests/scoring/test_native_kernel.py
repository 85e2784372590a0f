"""The compiled kernel: against the oracle, against torch's products, for other processors, and how it is had."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from expected import expected_of
from jobs import job_for
from rounding import passes
from running import qkov, settings, write_inputs
from test_engine import IN_FLOAT64, assert_equals_the_oracle, assert_influences
from zoo import TINY

from qkov_dist.capture.factors import FeatureSlice, SampleIndex
from qkov_dist.errors import QkovError
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring import native_kernel as native
from qkov_dist.scoring import packed_factors, score
from qkov_dist.scoring.gram_norms import gram
from qkov_dist.scoring.influence_sums import InfluenceSums
from qkov_dist.scoring.kernel import Rule, add_tile
from qkov_dist.scoring.own_shares import OwnShares, chosen
from qkov_dist.scoring.packed_factors import PackedSite
from qkov_dist.scoring.padded_groups import order_samples
from qkov_dist.scoring.score import fisher_sums
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.site_inputs import Members
from qkov_dist.scoring.tile_gradients import Buffers, Padded, tile_gradients

pytestmark = pytest.mark.skipif(not native.has_native_kernel(torch.float32), reason="no C compiler")
WORKLOAD = [9, 4, 17, 6, 30, 12, 12, 5, 8, 3, 21, 10, 14, 2, 7, 11, 19, 1, 13]  # tokens of each sample


@pytest.fixture
def few_samples(monkeypatch):
    """Tiny jobs, too, have their lanes filled well enough."""
    monkeypatch.setattr(packed_factors, "LEAST_FILLED", 0.0)


def heads_of(monkeypatch) -> list[int]:
    """How many heads the kernel is asked for in each call."""
    seen: list[int] = []
    add = PackedSite.add_heads
    monkeypatch.setattr(PackedSite, "add_heads", lambda site, *of: seen.append(len(of[1])) or add(site, *of))
    return seen


@pytest.mark.parametrize("score", list(KINDS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_new"])
def test_it_equals_the_oracle(name, score, few_samples, monkeypatch):
    """Heads that are bands, columns, and lie between one another; biases beside them by torch's products."""
    entry, seen = TINY[name], heads_of(monkeypatch)
    model = entry.build().double()
    of_score = ScoreSettings(score=score, dtype=torch.float64, compile=True)
    job = job_for(entry, settings=of_score, include_bias=name == "gpt2")
    found = job.run(model)
    assert max(seen) > 1
    scores, influences = expected_of(entry, model, job)
    for layer, blocks in scores.items():
        for block, expected in blocks.items():
            torch.testing.assert_close(found[layer][block].scores, expected, rtol=0, atol=1e-11 * expected.abs().max())
    assert_influences(found, influences, IN_FLOAT64)


@pytest.mark.parametrize("changes", [{"sample_scale": "unit"}, {"gradients_above": 5}, {"tile_bytes": 2**12}], ids=str)
def test_it_equals_the_oracle_in_float32_however_factors_are_kept(changes, few_samples, monkeypatch):
    entry, seen = TINY["llama"], heads_of(monkeypatch)
    model, job = entry.build(), job_for(entry, settings=ScoreSettings(compile=True), **changes)
    assert_equals_the_oracle(job.run(model), entry, model, job)
    assert bool(seen) == ("gradients_above" not in changes)  # of samples that are gradients there is nothing to form


def test_without_any_ridge_heads_go_by_torchs_products_one_by_one(few_samples, monkeypatch):
    entry, seen = TINY["llama"], heads_of(monkeypatch)
    of_score = ScoreSettings(compile=True, dtype=torch.float64, ridge_relative=0.0)
    model, job = entry.build().double(), job_for(entry, settings=of_score)
    assert_equals_the_oracle(job.run(model), entry, model, job)
    assert not seen


FLAGS = {
    "native": (),
    "half registers": ("-mno-avx512f",),
    "no vectors to speak of": ("-mno-avx512f", "-mno-avx2", "-mno-fma"),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[tuple[str, torch.dtype], native.NativeKernel]:
    """By flags and type, each compiled once, as for a processor of another kind."""
    on_x86 = os.uname().machine == "x86_64"
    found = {}
    for name, flags in FLAGS.items():
        for dtype in (torch.float32, torch.float64) if name == "native" else (torch.float32,):
            library = tmp_path_factory.mktemp("kernel") / "kernel.so"
            command = [*native._compiler(), *native.FLAGS, *native.OF_DTYPE[dtype], *(flags if on_x86 else ())]
            native._compile([*command, "-Wall", "-Wextra", "-Werror"], library)
            found[name, dtype] = native.NativeKernel(native.ctypes.CDLL(str(library)), dtype)
    return found


class Site:
    """Random factors of samples of unequal lengths, three of them in the Fisher alone, at 22 x 27 features."""

    def __init__(self, kernel: native.NativeKernel, sizes: tuple[int, ...]) -> None:
        rng = torch.Generator().manual_seed(len(sizes))
        index, num = SampleIndex(), sum(sizes)
        for number, length in enumerate(WORKLOAD):
            index.add(number, length, as_gradient=False)
        members = len(WORKLOAD)
        weights = torch.zeros(len(sizes), members, dtype=torch.float64)
        tasks = np.repeat(np.arange(len(sizes)), sizes)
        weights[tasks, range(num)] = torch.rand(num, generator=rng, dtype=torch.float64)
        weights[-1, num:] = 0.5
        means = np.concatenate([np.full(size, 1 / size) for size in sizes])
        self.roles = Roles(
            tuple(range(members)), weights.numpy(), slice(0, num), slice(0, num), means, sizes, None, True
        )
        ordering = order_samples(range(members), index, (num, *np.cumsum(sizes).tolist()))
        self.members = Members(ordering, self.roles, "cpu", kernel.dtype, kernel)
        x, d = (
            torch.randn(sum(WORKLOAD), width, generator=rng, dtype=torch.float64).to(kernel.dtype) for width in (27, 22)
        )
        self.padded = [
            Padded(group, FeatureSlice(group.inputs(x), 5), FeatureSlice(group.outputs(d), 3))
            for group in ordering.groups
        ]
        blocks = self.members.blocks
        assert blocks is not None
        packed = [blocks.pack(values) for values in (x, d)]
        self.packed = PackedSite(blocks, *packed, 5, 3, self.members.in_lanes)

    def by_kernel(self, rects: Sequence[Rect], rule: Rule) -> dict[str, torch.Tensor]:
        """Scores, records of I, of effects and of own shares of heads, in one call."""
        scores, effects, own = self._sums(len(rects), rule)
        looked_at = (own, lambda rect: chosen([rect], [3], "cpu"))
        fisher = self.packed.add_heads(scores, [[rect] for rect in rects], rule, Buffers(), effects, looked_at)
        return {"scores": scores, "fisher": fisher, "effects": effects.records(), "own": own.records()}

    def by_torch(self, rects: Sequence[Rect], rule: Rule) -> dict[str, torch.Tensor]:
        """The same by torch's products, head by head."""
        found: dict[str, list[torch.Tensor]] = {"scores": [], "fisher": [], "effects": [], "own": []}
        for rect in rects:
            (scores, effects, own), buffers = self._sums(1, rule), Buffers()
            gradients = tile_gradients(self.padded, [rect], bias=False, dtype=scores.dtype, buffers=buffers)
            looked_at = (own, chosen([rect], [3], "cpu"))
            by_task = add_tile(scores, gradients, self.members.weights, rule, buffers, effects, looked_at)
            of_head = scores, fisher_sums(by_task, rule.least), effects.records(), own.records()
            for name, values in zip(found, of_head, strict=True):
                found[name].append(values)
        return {name: torch.cat(values) for name, values in found.items()}

    def _sums(self, heads: int, rule: Rule) -> tuple[torch.Tensor, InfluenceSums, OwnShares]:
        shape = (heads, rule.left.stop - rule.left.start, rule.right.stop - rule.right.start)
        own = OwnShares(self.members.shares, heads, rule.score, rule.epsilon, rule.ridges)
        return torch.ones(shape, dtype=self.members.dtype), InfluenceSums(self.members.means, heads), own


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "dtype"), [("native", torch.float64), *((name, torch.float32) for name in FLAGS)], ids=str
)
@pytest.mark.parametrize("sizes", [(9, 7), (4, 3, 9)], ids=str)
def test_it_does_what_torchs_products_do_whatever_the_processor(flags, dtype, sizes, kernels, few_samples):
    """Heads in one call, tiles and roles that begin and end within panels and blocks, samples of the Fisher alone."""
    site, num = Site(kernels[flags, dtype], sizes), sum(sizes)
    every, a, b = slice(0, num), slice(0, sizes[0]), slice(sizes[0], num)
    roles = [(every, every), (a, b)] if len(sizes) == 2 else [(every, every)]
    bound = 1e-12 if dtype == torch.float64 else 20 * passes(layers=1)
    rects = Rect(3, 25, 5, 32), Rect(4, 9, 6, 31), Rect(3, 25, 9, 10), Rect(10, 11, 14, 17)
    for kind in KINDS:
        for left, right in roles:
            rule = Rule(kind, 0.3, (0.05,), left, right)
            by_kernel = site.by_kernel(rects, rule)
            for name, expected in site.by_torch(rects, rule).items():
                got, largest = by_kernel[name], expected.abs().flatten(1).amax(1)
                assert got.shape == expected.shape, name
                off = (got - expected).abs().flatten(1).amax(1)
                assert (off <= bound * largest).all(), (name, kind, off / largest)


@pytest.mark.long
@pytest.mark.parametrize("width", [37, 64])
@pytest.mark.parametrize("has_scales", [False, True])
def test_factors_are_packed_by_blocks_panels_and_tokens(has_scales, width, kernels, few_samples):
    """A full block and one with lanes to spare, of samples of unequal lengths that lie anywhere among all rows."""
    for kernel in kernels.values():
        lanes, panel = kernel.lanes, kernel.panel
        lengths, index = [7, *(max(7 - n, 1) for n in range(1, lanes)), 5, 3], SampleIndex()
        for number, length in reversed([*enumerate(lengths)]):
            index.add(number, length, as_gradient=False)
        ordering = order_samples(range(len(lengths)), index, (lanes,))
        blocks = packed_factors.Blocks.of(kernel, ordering.groups)
        values = torch.randn(index.num_rows, width + 4, dtype=kernel.dtype)[:, 3:-1]
        scales = torch.randn(blocks.num_lanes, dtype=kernel.dtype) if has_scales else None
        packed = blocks.pack(values, scales)
        panels = -(-width // panel)
        expected = [torch.zeros(panels, length, panel, lanes, dtype=kernel.dtype) for length in (7, 5)]
        for lane, member in enumerate(ordering.order):
            features = torch.zeros(lengths[member], panels * panel, dtype=kernel.dtype)
            features[:, :width] = values[slice(*index.spans[member])] * (1 if scales is None else scales[lane])
            of_panels = features.view(len(features), panels, panel).movedim(1, 0)
            expected[lane // lanes][:, : len(features), :, lane % lanes] = of_panels
        assert blocks.tokens.tolist() == [7, 5]
        assert packed.starts.tolist() == [0, expected[0].numel()]
        assert torch.equal(packed.values, torch.cat([of.flatten() for of in expected]))


@pytest.mark.parametrize("shape", [(2, 9, 37), (1, 1, 3), (3, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_matrices_are_those_of_torch(shape, dtype):
    values = torch.randn(*shape[:2], shape[2] + 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kernel, part = native.native_kernel(dtype), values.to(dtype)[..., 3:-1]  # lies between others
    torch.testing.assert_close(gram(part, kernel), part @ part.mT, rtol=1e-6, atol=1e-6 * shape[2])
    turned = part.transpose(1, 2)
    torch.testing.assert_close(gram(turned, kernel), turned @ turned.mT, rtol=1e-6, atol=1e-6 * shape[2])


def test_lanes_that_would_be_empty_leave_a_site_to_torchs_products():
    entry = TINY["llama"]
    job = job_for(entry, settings=ScoreSettings(compile=True))
    kernel = native.native_kernel(torch.float32)
    lengths = job.lengths[:3]
    index = SampleIndex()
    for number, length in enumerate(lengths):
        index.add(number, length, as_gradient=False)
    groups = order_samples(range(3), index, ()).groups
    filled = sum(lengths) / (kernel.lanes * max(lengths))
    assert (packed_factors.Blocks.of(kernel, groups) is not None) == (filled >= packed_factors.LEAST_FILLED)


def test_products_of_less_than_float32_are_torchs():
    assert ScoreSettings(compile=True).kernel is native.native_kernel(torch.float32)
    for left_alone in ({"matmul_precision": "medium"}, {"compile": False}, {"device": "meta"}):
        assert replace(ScoreSettings(compile=True), **left_alone).kernel is None


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A cache of its own, in which nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.native_kernel.cache_clear()
    yield tmp_path / "qkov_dist"
    native.native_kernel.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A stand-in for a C compiler."""
    path = folder / "some-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_it_is_compiled_once_and_again_where_somebody_else_could_have_put_it(elsewhere, monkeypatch):
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *of, **how: calls.append(of) or run(*of, **how))
    for expected in (1, 1):
        native.native_kernel(torch.float32)
        native.native_kernel.cache_clear()
        assert len(calls) == expected
    (library,) = elsewhere.iterdir()
    library.chmod(0o777)
    assert native.native_kernel(torch.float32).lanes >= 4
    assert len(calls) == 2
    assert library.stat().st_mode & 0o777 == 0o700


def test_where_the_cache_cannot_be_written_it_is_compiled_into_a_folder_of_its_own(elsewhere):
    elsewhere.write_text("a file, where a folder should be")
    assert native.native_kernel(torch.float32).panel == 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-compiler -O2", "none of no-such-compiler"),
        ("echo 'tile_kernel.c:1: error: something odd' >&2; exit 1", "tile_kernel.c:1: error: something odd"),
        ("exit 3", "exit code 3"),
    ],
)
def test_without_a_compiler_it_is_said_what_is_missing(command, said, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", command if "no-such" in command else compiler(tmp_path, command))
    with pytest.raises(QkovError, match=r"compute\.compile: expected a C compiler") as refused:
        native.native_kernel(torch.float32)
    assert said in str(refused.value)
    assert not native.has_native_kernel(torch.float32)


def test_a_run_that_must_compile_and_cannot_ends_before_its_first_batch(elsewhere, monkeypatch, tmp_path, capsys):
    """One that may goes on by torch's products, and says so."""
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(score, "NATIVE_FROM", 1)
    folder = tmp_path / "here"
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings(write_inputs(folder, "llama"), "llama", "out", {})))
    assert qkov("run", config, "compute.compile=true") == 2
    said = capsys.readouterr().err
    assert "compute.compile: expected a C compiler (CC, cc, gcc or clang), got none of no-such-compiler" in said
    assert not [*(folder / "out" / "out").glob("*.h5")]
    assert qkov("run", config) == 0
    assert "scores are formed by torch's products: compute.compile" in capsys.readouterr().err
