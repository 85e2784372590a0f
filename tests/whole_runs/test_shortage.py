"""Out of memory: smaller batches, then smaller tiles, the same results; and an end where one sample does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from comparing import closeness
from jobs import job_for
from places import SUPPORT
from processes import PATIENCE_S
from rounding import PASSES, SCORES
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist.capture import hooks
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.factors import FeatureSlice
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import make_batches
from qkov_dist.distributed.topology import Topology
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve
from qkov_dist.memory import is_shortage
from qkov_dist.scoring import head_scorer, packed_factors
from qkov_dist.scoring.native_kernel import has_native_kernel
from qkov_dist.scoring.packed_factors import PackedSite
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tiles import Selection, make_tile_plan


def shortage() -> RuntimeError:
    """The error of a real allocation that cannot succeed."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("there was room for an exabyte")


def test_what_running_out_of_memory_looks_like():
    assert is_shortage(shortage())
    assert is_shortage(MemoryError())
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_shortage(RuntimeError("shapes cannot be multiplied"))
    assert not is_shortage(ValueError("out of memory"))


class Small:
    """A pass that has room for so many padded tokens."""

    def __init__(self, tokens: int, run) -> None:
        self.tokens, self.run_whole, self.sizes = tokens, run, []

    def put_into(self, monkeypatch) -> None:
        def run(session, batch, sink):
            return self(session, batch, sink)

        monkeypatch.setattr(hooks.Capture, "run", run)

    def __call__(self, session, batch, sink):
        if "first tokens" in batch.names[0]:  # of the proof, before any batch
            return self.run_whole(session, batch, sink)
        self.sizes.append(len(batch.samples))
        if batch.input_ids.numel() > self.tokens:
            self.run_whole(session, batch, sink)  # the factors are there when it fails
            raise shortage()
        return self.run_whole(session, batch, sink)


@pytest.mark.parametrize("tokens", [12, 30])
def test_batches_are_halved_until_they_fit_with_the_same_results(tokens, monkeypatch):
    entry = TINY["llama"]
    model = entry.build()
    expected = job_for(entry, batch_tokens=10**6).run(model)
    room = Small(tokens, hooks.Capture.run)
    room.put_into(monkeypatch)
    got = job_for(entry, batch_tokens=10**6).run(model)
    assert room.sizes[0] == 5
    assert min(room.sizes) < 3
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            assert closeness(got[layer][block].scores, part.scores.double()) < PASSES


def test_one_sample_that_does_not_fit_is_named(monkeypatch):
    entry = TINY["llama"]
    room = Small(4, hooks.Capture.run)
    room.put_into(monkeypatch)
    with pytest.raises(QkovError, match=r"task 'a', sample '1-\d': expected memory for one sample of \d+ tokens"):
        job_for(entry).run(entry.build())


def test_where_all_ranks_pass_together_the_batch_size_is_named(monkeypatch):
    model = TINY["llama"].build()
    samples = mixed_samples(4, VOCAB, seed=1)
    tile_plan = make_tile_plan(resolve(model), Selection(), include_bias=False, num_samples=4)
    room = Small(4, hooks.Capture.run)
    room.put_into(monkeypatch)
    run = Collection(FactorStore(2**30), tile_plan.sites, topology=replace(Topology(), gathers_weights=True))
    with pytest.raises(QkovError, match=r"a batch of 4 samples.*compute\.batch_tokens"):
        run.run(model, "a", samples)


def test_halves_of_a_batch_are_its_samples_without_needless_padding():
    samples = mixed_samples(7, VOCAB, seed=3)
    (batch,) = make_batches(samples, names=[s.id for s in samples], batch_tokens=10**6, objective="causal")
    first, second = batch.halves()
    assert first.samples + second.samples == batch.samples
    assert first.lengths + second.lengths == batch.lengths
    assert second.input_ids.shape[1] == max(second.lengths) < batch.input_ids.shape[1]
    assert torch.equal(second.targets, batch.targets[3:, : second.targets.shape[1]])


@pytest.mark.parametrize("elements", [40, 200])
def test_tiles_are_halved_until_they_fit_with_the_same_results(elements, monkeypatch):
    entry = TINY["llama"]
    model = entry.build()
    expected = job_for(entry).run(model)
    add_tile, said = head_scorer.add_tile, []

    def small(scores, gradients, *args):
        by_task = add_tile(scores, gradients, *args)
        if gradients[0].numel() > elements:
            raise shortage()  # the scores have been added to: they must not count
        return by_task

    monkeypatch.setattr(head_scorer, "add_tile", small)
    job = job_for(entry)
    got = replace(job, settings=replace(job.settings, warn=said.append)).run(model)
    assert said
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            assert closeness(got[layer][block].scores, part.scores.double()) < SCORES


@pytest.mark.skipif(not has_native_kernel(torch.float32), reason="no C compiler")
def test_heads_of_the_kernel_are_halved_until_they_fit_with_the_same_results(monkeypatch):
    monkeypatch.setattr(packed_factors, "LEAST_FILLED", 0.0)
    entry, said = TINY["llama"], []
    model, settings = entry.build(), ScoreSettings(compile=True, kernel_heads=4)
    expected = job_for(entry, settings=settings).run(model)
    add_heads = PackedSite.add_heads

    def small(site, scores, rects, *args):
        found = add_heads(site, scores, rects, *args)
        if len(rects) > 1:
            raise shortage()
        return found

    monkeypatch.setattr(PackedSite, "add_heads", small)
    got = job_for(entry, settings=replace(settings, warn=said.append)).run(model)
    assert all("half of the heads" in line for line in said)
    assert said
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            assert torch.equal(got[layer][block].scores, part.scores)
            assert got[layer][block].flops == part.flops


def test_an_element_that_does_not_fit_is_named(monkeypatch):
    entry = TINY["llama"]

    def none(*args):
        raise shortage()

    monkeypatch.setattr(head_scorer, "add_tile", none)
    with pytest.raises(QkovError, match=r"layer 0, block \w, head \d: expected memory for one element"):
        job_for(entry).run(entry.build())


def test_factors_that_do_not_fit_beside_the_tiles_are_said_to(monkeypatch):
    entry = TINY["llama"]

    def none(*args):
        raise shortage()

    monkeypatch.setattr(FeatureSlice, "to", none)
    with pytest.raises(QkovError, match=r"layer 0: expected memory on cpu for the factors .*device='cpu'"):
        job_for(entry).run(entry.build())


REAL = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from samples import mixed_samples
from zoo import TINY
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.console import Console
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.tiles import Selection, make_tile_plan
model = TINY["llama"].build(vocab_size=60000)
samples = mixed_samples(24, 96, seed=1, lengths=(60, 64), mask=False)
plan = make_tile_plan(resolve(model), Selection(), include_bias=False, num_samples=24)
said = []
Collection(FactorStore(2**30), plan.sites).run(model, "warm", samples[:2])
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, resource.RLIM_INFINITY))
console = Console(warn=said.append)
run = Collection(FactorStore(2**30), plan.sites, batch_tokens=10**6, console=console)
run.run(model, "a", samples)
print(json.dumps({"losses": [r.loss for r in run.records], "said": said}))
"""


@pytest.mark.long
def test_memory_that_really_runs_out(tmp_path):
    """Logits of 24 x 62 tokens over 60000 words take 350 MB, and again for their gradient: there is room for less."""
    (tmp_path / "real.py").write_text(REAL)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "real.py"), str(SUPPORT)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert any("out of memory with 24 samples" in line for line in found["said"])
    assert len(found["losses"]) == 24
