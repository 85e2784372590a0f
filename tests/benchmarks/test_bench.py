"""The benchmark in small, so that it cannot rot: every case on a tiny model, in this process. No time is judged."""

from __future__ import annotations

import dataclasses
import json
import sys

import agreement
import bench
import machine
import pytest
import torch
from cases import PEERS, Setup, check_agreement, main_table, prepare, samples_table, spill_table
from contestants import perform
from growth import exponent, growth_table
from orders import Order, Report
from rounds import Entry, in_a_process, in_this_process, play, ratio
from stopwatch import PHASES, REST, Stopwatch, timed_phases

LIBRARIES = ("opacus", "kronfluence", "bergson", "dattri_llm")


@pytest.fixture
def setup(tmp_path, monkeypatch) -> Setup:
    monkeypatch.setattr(machine, "SQUARE", 32)
    monkeypatch.setattr(machine, "COPY_BYTES", 2**12)
    monkeypatch.setattr(machine, "LEAST_SECONDS", 0.001)
    for peer in LIBRARIES:
        monkeypatch.setitem(sys.modules, peer, None)  # as if it were not installed
    base = Order("", str(tmp_path), model="tiny", samples=4, tokens=12, threads=1, permutations=19)
    return Setup(base, 1, in_this_process, lambda line: None)


@pytest.mark.long
def test_the_main_table_has_every_contestant_or_says_why_not(setup, tmp_path):
    result = main_table(setup)
    (reports,) = result.data["rounds"]
    assert set(reports) == {*("bare", "bare_masked", "product", "product_masked"), *(
        "autograd_loop", "vmap", "vmap_scores", "pair_loop", "machine")}  # fmt: skip
    assert result.page.count("did not run: ") == len(PEERS)
    assert set(result.data["deviations"]) == {"autograd_loop", "vmap", "dense_scores", "pair_loop"}
    found = reports["product"]["found"]
    assert min(found[name] for name in PHASES) > 0
    assert sum(found[name] for name in (*PHASES, REST) if name != "loading") == pytest.approx(
        reports["product"]["seconds"],
        rel=0.3,  # a machine may be at work on much else between two looks at a clock
    )
    assert all(rate > 0 for rate in reports["machine"]["found"].values())
    bench.write(result, tmp_path / "results")
    written = json.loads((tmp_path / "results" / "main.json").read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert (tmp_path / "results" / "main.md").read_text() == result.page


@pytest.mark.long
def test_other_cases_run(setup):
    assert "the loop / scoring" in samples_table(setup).page
    assert "| quarter" in spill_table(setup).page


@pytest.mark.long
def test_exponents_are_of_the_size_that_varies(setup):
    sizes = {"samples": (2, 4), "layers": (1, 2)}
    result = growth_table(setup, sizes, {"samples": 2, "tokens": 8, "layers": 1, "ranks": 1})
    assert set(result.data["exponents"]) == set(sizes)
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.mark.long
def test_a_contestant_that_computes_something_else_is_seen(setup, monkeypatch):
    prepare(setup)
    right = agreement.METHODS["vmap"]

    def wrong(subject):
        for numbers, found in right(subject):
            yield numbers, {name: 1.01 * g for name, g in found.items()}

    monkeypatch.setitem(agreement.METHODS, "vmap", wrong)
    with pytest.raises(AssertionError, match="vmap is off"):
        check_agreement(setup)


@pytest.mark.long
def test_ranks_report_through_their_launcher(setup):
    prepare(setup)
    order = dataclasses.replace(setup.base, contestant="product", ranks=2)
    report = in_a_process(order)
    assert report.error == ""
    assert report.found["scoring"] > 0
    assert report.seconds > report.found["scoring"]


def test_the_masked_files_mask_half_of_the_same_tokens(setup):
    prepare(setup)
    plain = setup.base.subject()
    masked = dataclasses.replace(plain, masked=True)
    for a, b in zip(plain.tasks[0], masked.tasks[0], strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert (b.labels[:6] == -100).all()
        assert (b.labels[6:] == a.labels[6:]).all()


def test_a_ratio_is_taken_within_a_round():
    rounds = [{"x": Report(2.0), "y": Report(1.0)}, {"x": Report(30.0), "y": Report(10.0)}]
    assert ratio(rounds, "x", "y") == (2.5, 2.0, 3.0)


def test_who_failed_is_not_asked_again_and_only_peers_may():
    asked = []

    def fails(order):
        asked.append(order.contestant)
        return Report(error="no")

    entry = Entry("peer", "", Order("peer", ""), optional=True)
    assert [r["peer"].error for r in play([entry], 3, fails, lambda line: None)] == ["no"] * 3
    assert asked == ["peer"]
    with pytest.raises(RuntimeError, match="peer: no"):
        play([dataclasses.replace(entry, optional=False)], 1, fails, lambda line: None)


def test_flops_are_those_of_pairs_and_gradients():
    pairs = 2 * 6 * 6 * (10 + 20)
    gradients = 2 * 100 * (10 + 20)
    assert machine.scoring_flops([10, 20], 6, 100) == pairs + gradients


def test_an_inner_phase_stops_the_outer_clock(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.phase("capture"), watch.phase("writing"):
        pass
    assert (watch.wall["capture"], watch.wall["writing"]) == (1.0 + 4.0, 2.0)


def test_a_function_is_timed_wherever_it_is_called_from_and_then_left_alone():
    from qkov_dist.scoring import engine as scoring

    function = scoring.score_rounds

    def holders():
        package = [m for name, m in sys.modules.items() if name.startswith("qkov_dist.")]
        return [m.__name__ for m in package if function in [v for v in vars(m).values() if callable(v)]]

    before = holders()
    with timed_phases():
        assert holders() == []
    assert holders() == before
    assert len(before) > 1


def test_an_unknown_contestant_is_an_error(setup):
    with pytest.raises(KeyError):
        perform(dataclasses.replace(setup.base, contestant="nobody"))
