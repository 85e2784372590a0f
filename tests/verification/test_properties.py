"""The six checks hold on right models, and each is broken by the mistake that it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from samples import mixed_samples
from zoo import TINY, VOCAB

import qkov_dist.data.batches
import qkov_dist.verification.changed_model
import qkov_dist.verification.examined_model
from qkov_dist.data.batches import Batch
from qkov_dist.data.samples import IGNORED
from qkov_dist.layout.heads import HeadSlice, Layout
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.verification.examined_model import ExaminedModel
from qkov_dist.verification.properties import run_checks
from qkov_dist.verification.property_result import PropertyResult

SIX = {"layout", "additivity", "symmetry", "batch invariance", "scale", "ablation"}


def examined_of(name: str, change=lambda layout: layout) -> ExaminedModel:
    entry = TINY[name]
    model = entry.build()
    layout = change(resolve(model))
    layers = tuple(layer.index for layer in layout.layers)
    a, b = mixed_samples(4, VOCAB, seed=1, lengths=(6, 12)), mixed_samples(3, VOCAB, seed=2, lengths=(6, 12))
    return ExaminedModel(model, layout, a, b, layers, "masked" if entry.masked_lm else "causal")


def broken(results: list[PropertyResult]) -> set[str]:
    return {result.check for result in results if result.holds is False}


NAMES = ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "olmo2", "gemma4", "gemma4_k_eq_v", "gemma4_kv_shared"]
MORE = [
    "falcon_new",
    "codegen",
    "qwen3_next",
    "gpt_oss",
    "mimo_v2_flash",
    "deepseek_v3",
    "afmoe",
    "jamba",
    "bert_masked",
]


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_all_six_properties_hold(name):
    examined = examined_of(name)
    before = {n: p.detach().clone() for n, p in examined.model.named_parameters()}
    results = list(run_checks(examined))
    assert broken(results) == set(), [f for f in results if f.holds is False]
    assert {result.check for result in results} == SIX
    judged = {result.check for result in results if result.holds}
    assert judged >= SIX - ({"ablation"} if name in ("gemma4_kv_shared", "gemma4_k_eq_v") else set())
    assert all(torch.equal(p, before[n]) for n, p in examined.model.named_parameters())


def reslice(layout: Layout, block: str, change) -> Layout:
    """Replace the slices of one block in every layer."""

    def of_projection(projection):
        kept = [s for s in projection.slices if s.block != block]
        mine = [s for s in projection.slices if s.block == block]
        return replace(projection, slices=(*kept, *change(mine, projection))) if mine else projection

    layers = tuple(replace(layer, projections=tuple(map(of_projection, layer.projections))) for layer in layout.layers)
    return replace(layout, layers=layers)


def swapped_kv(layout: Layout) -> Layout:
    return reslice(layout, "K", lambda s, _p: [replace(s[0], rect=s[1].rect), replace(s[1], rect=s[0].rect)])


def rows_for_o(layout: Layout) -> Layout:
    def rows(slices, projection):
        size = projection.shape[0] // len(slices)
        return [HeadSlice("O", n, Rect(n * size, (n + 1) * size, 0, projection.shape[1])) for n in range(len(slices))]

    return reslice(layout, "O", rows)


def q_and_v_exchanged(layout: Layout) -> Layout:
    names = {"Q": "V", "V": "Q"}

    def renamed(projection):
        return replace(
            projection, slices=tuple(replace(s, block=names.get(s.block, s.block)) for s in projection.slices)
        )

    layers = tuple(replace(layer, projections=tuple(map(renamed, layer.projections))) for layer in layout.layers)
    return replace(layout, layers=layers)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mistake", "checks"),
    [
        ("llama", swapped_kv, {"layout", "ablation"}),
        ("llama", rows_for_o, {"layout", "ablation", "scale"}),
        ("gpt2", q_and_v_exchanged, {"layout", "ablation", "scale"}),
    ],
)
def test_wrong_layouts_break_the_checks_for_them(name, mistake, checks):
    assert broken(list(run_checks(examined_of(name, mistake)))) == checks


@pytest.mark.long
def test_a_head_counted_twice_breaks_additivity(monkeypatch):
    def doubled(*args, **kwargs):
        tile_plan = make_tile_plan(*args, **kwargs)
        return replace(tile_plan, layers=tuple(replace(x, tiles=(*x.tiles, x.tiles[0])) for x in tile_plan.layers))

    make_tile_plan = qkov_dist.verification.examined_model.make_tile_plan
    monkeypatch.setattr(qkov_dist.verification.examined_model, "make_tile_plan", doubled)
    assert broken(list(run_checks(examined_of("llama")))) == {"additivity"}


@pytest.mark.long
def test_a_leaking_pad_breaks_batch_invariance(monkeypatch):
    def padded_on_the_left_and_seen(samples, numbers, names):
        width = max(len(s.input_ids) for s in samples)
        ids, targets = torch.zeros(len(samples), width, dtype=torch.int64), torch.full((len(samples), width), IGNORED)
        for n, s in enumerate(samples):
            ids[n, width - len(s.input_ids) :] = torch.from_numpy(s.input_ids)
            targets[n, width - len(s.input_ids) :] = torch.from_numpy(s.targets)
        return Batch(tuple(numbers), tuple(names), ids, torch.ones_like(ids), targets, torch.ones_like(ids))

    monkeypatch.setattr(qkov_dist.data.batches, "make_batch", padded_on_the_left_and_seen)
    assert "batch invariance" in broken(list(run_checks(examined_of("llama"))))


@pytest.mark.long
def test_a_fixed_ridge_breaks_scale(monkeypatch):
    monkeypatch.setattr(qkov_dist.verification.changed_model, "EXACT", ScoreSettings(ridge_absolute=1.0))
    assert broken(list(run_checks(examined_of("llama")))) == {"scale"}


@pytest.mark.long
def test_another_fisher_for_each_direction_breaks_symmetry(monkeypatch):
    roles = ExaminedModel.roles

    def one_sided(self, *, swapped=False):
        usual = roles(self, swapped=swapped)
        return replace(usual, weights=usual.weights[:, ::-1].copy()) if swapped else usual

    monkeypatch.setattr(ExaminedModel, "roles", one_sided)
    assert "symmetry" in broken(list(run_checks(examined_of("llama"))))
