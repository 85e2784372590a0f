"""Layers one behind another: the next one's factors come while heads are scored, and nothing that was begun is lost."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch
from jobs import job_for
from processes import PATIENCE_S
from zoo import TINY

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring import head_scorer
from qkov_dist.scoring.block_totals import block_totals
from qkov_dist.scoring.engine import score_layer, score_layers
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tiles import LayerTiles, Selection, in_order_of_work, make_tile_plan

LAYERS = 4


class Case:
    """Captured factors of a model of some layers."""

    def __init__(self, **settings) -> None:
        entry = TINY["llama"]
        model, job = entry.build(num_hidden_layers=LAYERS), job_for(entry, settings=ScoreSettings(**settings))
        self.tile_plan = make_tile_plan(resolve(model), Selection(), include_bias=False, num_samples=8, tile_bytes=1000)
        self.store, self.roles, self.settings = FactorStore(2**30), job.roles(), job.settings
        collection = Collection(self.store, self.tile_plan.sites)
        for task, samples in (("a", job.a), ("b", job.b)):
            collection.run(model, task, samples)

    def scored(self, layers):
        totals = {
            layer.layer: block_totals(layer, self.store, self.roles, self.settings) for layer in self.tile_plan.layers
        }
        return score_layers(layers, self.roles, self.settings, totals)

    def sources(self, said: list[str] | None = None):
        for layer in self.tile_plan.layers:
            if said is not None:
                said.append(f"asked for {layer.layer}")
            yield layer, self.store


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def keep(items, found: list) -> None:
    """Take items one by one, so that those before an error are there."""
    for item in items:
        found.append(item)


def assert_same(got, expected) -> None:
    assert got.keys() == expected.keys()
    for block, part in expected.items():
        assert torch.equal(got[block].scores, part.scores)
        assert (got[block].heads, got[block].flops) == (part.heads, part.flops)
        assert got[block].fisher.tolist() == part.fisher.tolist()


def test_layers_behind_one_another_are_those_scored_one_by_one_bit_for_bit(case):
    found = [(layer.layer, blocks) for layer, blocks in case.scored(case.sources())]
    assert [layer for layer, _ in found] == list(range(LAYERS))
    for layer, (_, blocks) in zip(case.tile_plan.layers, found, strict=True):
        assert_same(blocks, score_layer(layer, case.store, case.roles, case.settings))


def test_sums_of_whole_blocks_make_the_ridge():
    case = Case(ridge_relative=0.5)
    totals = {
        layer.layer: block_totals(layer, case.store, case.roles, case.settings) for layer in case.tile_plan.layers
    }
    assert all(total > 0 for of_layer in totals.values() for total in of_layer.values())
    for layer, blocks in case.scored(case.sources()):
        assert_same(blocks, score_layer(layer, case.store, case.roles, case.settings))
        assert_same(blocks, score_layer(layer, case.store, case.roles, case.settings, totals[layer.layer]))


def test_the_next_layer_is_asked_for_before_one_is_given_back_and_none_beyond_it(case):
    said: list[str] = []
    for layer, _ in case.scored(case.sources(said)):
        said.append(f"got {layer.layer}")
    first, *between, last = said
    assert (first, last) == ("asked for 0", "got 3")
    assert between == [line for n in range(LAYERS - 1) for line in (f"asked for {n + 1}", f"got {n}")]


def test_workers_compute_while_the_next_layers_factors_come(case, monkeypatch, two_threads):
    """A worker that waits, in layer 0's last projection, until layer 1 is asked for, does not wait in vain."""
    work = {site: (case.store.x_site(site), work_of(case, site)) for site in case.tile_plan.layers[0].sites}
    last = in_order_of_work(work)[-1]
    asked, waited, gradients = threading.Event(), [], head_scorer._gradients

    def waiting(band, site, buffers):
        if band[0].site == last:
            waited.append(asked.wait(PATIENCE_S))
        return gradients(band, site, buffers)

    monkeypatch.setattr(head_scorer, "_gradients", waiting)

    def sources():
        for layer in case.tile_plan.layers[:2]:
            if layer.layer == 1:
                asked.set()
            yield layer, case.store

    assert len(list(case.scored(sources()))) == 2
    assert waited
    assert all(waited)


def work_of(case: Case, site: Site) -> int:
    return sum(tile.rect.area for tile in case.tile_plan.layers[0].tiles if tile.site == site)


def test_a_layer_is_given_back_before_anything_is_asked_for_where_there_is_none_now(case):
    said: list[str] = []

    def with_gaps():
        yield None
        for source in case.sources(said):
            yield source
            said.append("waits")
            yield None
            said.append("goes on")

    for layer, _ in case.scored(with_gaps()):
        said.append(f"got {layer.layer}")
    assert said == [line for n in range(LAYERS) for line in (f"asked for {n}", "waits", f"got {n}", "goes on")]


@pytest.mark.parametrize(
    "error", [QkovError("a layer", expected="factors", got="none", remedy="none"), RuntimeError("a layer")]
)
@pytest.mark.parametrize("failing", range(LAYERS))
def test_what_was_begun_is_given_back_before_the_error_of_the_next(case, failing, error):
    def until():
        for layer in case.tile_plan.layers:
            if layer.layer == failing:
                raise error
            yield layer, case.store

    found = []
    with pytest.raises(type(error), match="a layer"):
        keep(case.scored(until()), found)
    assert [layer.layer for layer, _ in found] == list(range(failing))
    for layer, blocks in found:
        assert_same(blocks, score_layer(layer, case.store, case.roles, case.settings))


def test_an_error_of_the_work_itself_ends_it_and_its_layer_is_not_given_back(case, monkeypatch):
    gradients = head_scorer._gradients

    def broken(band, site, buffers):
        if band[0].site.layer == 2:
            raise ValueError("broken")
        return gradients(band, site, buffers)

    monkeypatch.setattr(head_scorer, "_gradients", broken)
    found = []
    with pytest.raises(ValueError, match="broken"):
        keep(case.scored(case.sources()), found)
    assert [layer.layer for layer, _ in found] == [0, 1]


def test_the_caller_has_one_thread_while_workers_compute_and_its_own_again_however_it_ends(case, two_threads):
    with closing(case.scored(case.sources())) as layers:
        next(layers)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert [thread for thread in threading.enumerate() if thread.name.startswith("qkov-worker")] == []
    list(case.scored(case.sources()))
    assert torch.get_num_threads() == 2


def test_a_layer_of_which_nothing_is_owned_has_no_scores(case):
    layer = case.tile_plan.layers[1]
    nothing = LayerTiles(layer.layer, layer.sites, layer.query_heads, layer.heads, (), layer.slices, layer.block_sizes)
    blocks = score_layer(nothing, case.store, case.roles, case.settings)
    assert {block: part.flops for block, part in blocks.items()} == dict.fromkeys(layer.heads, 0)
    assert all(not part.scores.any() for part in blocks.values())


def test_projections_of_one_input_are_together_and_most_work_is_last():
    grouped = {"q": ("q", 9), "k": ("q", 3), "v": ("q", 3), "o": ("o", 9)}
    numbers = {name: place for place, name in enumerate(grouped)}
    order = in_order_of_work({numbers[name]: (numbers[shared], work) for name, (shared, work) in grouped.items()})
    assert [list(grouped)[place] for place in order] == ["o", "k", "v", "q"]
