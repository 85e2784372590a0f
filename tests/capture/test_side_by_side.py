"""Batches side by side: the factors, losses and errors of one by one, in their order, and the model as it was."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import closing
from functools import partial

import pytest
import torch
from collecting import collected
from jobs import job_for
from samples import mixed_samples
from sites import sites_of
from torch import nn
from zoo import TINY, VOCAB

from qkov_dist.capture import collect, soundness
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.hooks import Capture
from qkov_dist.capture.side_by_side import (
    MOST,
    WORTH,
    batches_at_once,
    both,
    even_batch_tokens,
    running,
    sharing_weights,
)
from qkov_dist.capture.store import FactorStore
from qkov_dist.console import Console
from qkov_dist.errors import QkovError

SAMPLES = mixed_samples(11, VOCAB, seed=5, lengths=(4, 14))


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch):
    """The threads in which batches ran; those that run side by side are the batches of one by one."""
    monkeypatch.setattr(collect, "even_batch_tokens", lambda lengths, batch_tokens, at_once: batch_tokens)
    seen, run = set(), Capture.run

    def watched(session, batch, sink):
        seen.add(threading.current_thread().name)
        return run(session, batch, sink)

    monkeypatch.setattr(Capture, "run", watched)
    return seen


def run(model, objective="causal", samples=SAMPLES, **options):
    """A collection of one task, and every factor that it has left."""
    store = FactorStore(2**28, gradients_above=options.pop("gradients_above", None))
    options = {"batch_tokens": 24, "at_once": 3, **options}
    with closing(store):
        collection = Collection(store, tuple(sites_of(model)), objective, **options)
        collection.run(model, "a", samples)
        index = {site: (store.sample_index(site).spans, store.sample_index(site).whole) for site in collection.sites}
        found = {}
        for site in collection.sites:
            kept = store.g(site)
            found[site] = [store.x(site).values.clone(), store.d(site).values.clone()]
            found[site] += [] if kept is None else [kept.values.clone()]
        return collection, index, found


def assert_same(one, other):
    assert one[0].records == other[0].records
    assert one[1] == other[1]
    for site, tensors in one[2].items():
        assert all(map(torch.equal, tensors, other[2][site])), site


@pytest.mark.parametrize("name", TINY)
def test_they_leave_bit_for_bit_what_batches_leave_one_by_one(name, threads):
    """Of every architecture: one whose modules note something of a pass for all to see would show."""
    entry = TINY[name]
    model, objective = entry.build(), "masked" if entry.masked_lm else "causal"
    before = {path: {*vars(module)} for path, module in model.named_modules()}
    together = run(model, objective)
    assert any(thread.startswith("qkov-passes") for thread in threads)
    torch.set_num_threads(1)
    assert_same(run(model, objective, at_once=1), together)
    torch.set_num_threads(3)
    assert {path: {*vars(module)} for path, module in model.named_modules()} == before


@pytest.mark.parametrize("options", [{"gradients_above": 8}, {"loss_reduction": "sum", "loss_factor": 3.0}], ids=str)
def test_however_factors_are_kept(options, threads):
    model = TINY["llama"].build()
    if above := options.get("gradients_above"):
        options = {"gradients_above": dict.fromkeys(sites_of(model), above)}
    together = run(model, **options)
    assert threads != {"MainThread"}
    torch.set_num_threads(1)
    assert_same(run(model, at_once=1, **options), together)
    torch.set_num_threads(3)


def test_whichever_batch_is_done_first_they_are_kept_and_told_in_order(threads, monkeypatch):
    model, watched, batch_of = TINY["llama"].build(), Capture.run, FactorStore.batch
    finished, kept, told = [], [], []

    def late(session, batch, sink):
        time.sleep(0.3 if expected and batch.samples == expected[0] else 0.0)
        found = watched(session, batch, sink)
        finished.append(batch.samples)
        return found

    def seen(store, batch):
        kept.append(batch.samples)
        return batch_of(store, batch)

    monkeypatch.setattr(Collection, "_look_at", lambda *_: None)
    monkeypatch.setattr(Capture, "run", late)
    monkeypatch.setattr(FactorStore, "batch", seen)
    expected = []
    run(model, at_once=1)
    expected, kept[:], finished[:] = [*kept], [], []
    with closing(FactorStore(2**28)) as store:
        collection = Collection(store, tuple(sites_of(model)), batch_tokens=24, at_once=3)
        collection.run(model, "a", SAMPLES, told.append)
    assert finished[0] != expected[0]
    assert kept == expected
    assert told == [*map(len, expected)]


def test_a_batch_that_fails_is_named_as_one_by_one_and_nothing_is_kept(threads, monkeypatch):
    model, messages = TINY["llama"].build(), []
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.inf
    samples = mixed_samples(8, VOCAB, seed=7, lengths=(5, 9))
    for sample in samples:
        sample.input_ids[sample.input_ids == 3] = 4
    samples[6].input_ids[2] = 3
    monkeypatch.setattr(Collection, "_look_at", lambda *_: None)
    for at_once in (3, 1):
        store = FactorStore(2**28)
        with closing(store):
            collection = Collection(store, tuple(sites_of(model)), batch_tokens=16, at_once=at_once)
            with pytest.raises(QkovError) as raised:
                collection.run(model, "a", samples)
            messages.append(str(raised.value))
            assert collection.records == []
        assert (threads != {"MainThread"}) or at_once == 1
    assert messages[0] == messages[1]
    assert samples[6].id in messages[0]


def test_where_memory_is_short_batches_go_on_in_halves(threads, monkeypatch):
    model, watched = TINY["llama"].build(), Capture.run
    torch.set_num_threads(1)
    expected = run(model, at_once=1)
    torch.set_num_threads(3)

    def small(session, batch, sink):
        if batch.input_ids.numel() > 20:
            raise MemoryError
        return watched(session, batch, sink)

    monkeypatch.setattr(Capture, "run", small)
    monkeypatch.setattr(Collection, "_look_at", lambda *_: None)
    found = run(model)
    assert {sample.id: sample.loss for sample in found[0].records} == pytest.approx(
        {sample.id: sample.loss for sample in expected[0].records}, rel=1e-5
    )
    assert found[0].records[0].id == expected[0].records[0].id
    for site, tensors in expected[2].items():
        assert [one.shape for one in found[2][site]] == [one.shape for one in tensors]


def test_what_was_short_of_memory_holds_none_when_it_is_run_again(threads, monkeypatch):
    """Passes that failed have let go of their graphs before another one begins, one by one."""
    model, backward, graphs, alive = TINY["llama"].build(), Capture._backward, [], []

    def short(session, state, losses):
        if threading.current_thread().name != "MainThread" and len(losses) > 1:
            graphs.append(weakref.ref(losses))
            raise MemoryError
        alive.append(sum(graph() is not None for graph in graphs))
        return backward(session, state, losses)

    monkeypatch.setattr(Capture, "_backward", short)
    monkeypatch.setattr(Collection, "_look_at", lambda *_: None)
    said = []
    found = run(model, console=Console.of(said.append, show_progress=False))
    assert len(graphs) >= 2
    assert not any(alive)
    assert sum("going on one by one" in line for line in said) == 1
    assert len(found[0].records) == len(SAMPLES)


class OfMyOwn(nn.Linear):
    """A module of nobody's library."""


def patched(model):
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    return model


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return model


def own_module(model):
    model.lm_head.__class__ = OfMyOwn
    return model


def checkpointed(model):
    model.model.layers[0].gradient_checkpointing = True
    return model


def of_another_attention(model):
    model.config._attn_implementation = "flex_attention"
    return model


def normed(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


@pytest.mark.parametrize("change", [patched, hooked, own_module, checkpointed, of_another_attention, normed])
def test_a_model_that_is_not_as_its_library_made_it_is_not_copied(change):
    assert sharing_weights(change(TINY["llama"].build()), 1) == []


@pytest.mark.parametrize("name", ["half", "rope by length"])
def test_nor_one_whose_passes_are_not_alike(name):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = TINY["llama"].build() if name == "half" else TINY["llama"].build(rope_parameters=rope)
    assert sharing_weights(model.half() if name == "half" else model, 1) == []


def test_a_copy_shares_weights_and_nothing_else():
    model = TINY["gpt2"].build()
    first, second = sharing_weights(model, 2)
    for copied in (first, second):
        assert all(map(lambda a, b: a is b, model.parameters(), copied.parameters()))
        assert not {id(module) for module in model.modules()} & {id(module) for module in copied.modules()}
        assert copied.config is not model.config
    assert not {id(buffer) for buffer in first.buffers()} & {id(buffer) for buffer in second.buffers()}
    assert sharing_weights(model, 0) == []


def test_each_batch_has_its_part_of_the_threads():
    torch.set_num_threads(3)
    seen = []

    class Session:
        def run(self, batch, sink):
            seen.append((torch.get_num_threads(), threading.current_thread().name))
            return torch.zeros(1)

    with running([Session()]) as submit:
        assert torch.get_num_threads() == 1
        submit(None)()
    with running([Session(), Session()]) as submit:
        submit(None)()
    assert [number for number, _ in seen] == [3, 1]


@pytest.mark.parametrize(
    ("batches", "threads", "operations", "expected"),
    [
        (9, 2, WORTH, 2),
        (9, 2, WORTH - 1, 1),
        (9, 1, WORTH, 1),
        (1, 8, WORTH, 1),
        (9, 64, WORTH, MOST),
        (3, 64, WORTH, 3),
    ],
)
def test_as_many_as_there_are_threads_and_batches(batches, threads, operations, expected):
    assert batches_at_once(batches, threads, operations) == expected


def test_batches_are_cut_so_that_none_runs_alone_at_the_end(monkeypatch):
    """32 samples of 95 tokens: 8 batches of 4 take two at a time as long as 4; 7 of up to 5, as 3 of 5 and one of 2."""
    assert even_batch_tokens([[95] * 32], 512, 2) // 95 == 4
    assert even_batch_tokens([[95] * 12], 512, 2) // 95 == 3
    assert even_batch_tokens([[95] * 40], 512, 2) == 512
    assert even_batch_tokens([[95] * 15, [95] * 25], 512, 2) == 512  # 3 and 5 batches, one after another
    assert even_batch_tokens([[1000] * 4 + [3]], 512, 2) == 512  # each is a batch of its own
    sizes, batch_of = [], FactorStore.batch
    monkeypatch.setattr(
        FactorStore, "batch", lambda store, batch: sizes.append(len(batch.samples)) or batch_of(store, batch)
    )
    run(TINY["llama"].build(), samples=mixed_samples(6, VOCAB, seed=1, lengths=(12, 13)), batch_tokens=60)
    assert sizes == [3, 3]  # in place of 5 and 1


def test_the_python_api_runs_one_by_one(threads):
    """What its caller has set for its own thread, such as autocast, no other thread would know."""
    entry = TINY["llama"]
    collected(entry.build(), job_for(entry))
    assert threads == {"MainThread"}


def test_a_model_is_looked_at_by_two_threads_at_a_time(monkeypatch):
    """Its gradients in one, whether its outputs depend on length in another, through a copy."""
    model, seen = TINY["llama"].build(), {}

    def noted(name):
        ask = getattr(soundness, name)

        def noting(one, *of):
            seen[name] = (one is model, threading.current_thread().name, torch.get_num_threads())
            return ask(one, *of)

        return noting

    for name in ("check_gradients", "depends_on_length"):
        monkeypatch.setattr(soundness, name, noted(name))
    run(model)
    assert seen["check_gradients"] == (True, "MainThread", 1)
    assert seen["depends_on_length"] == (False, "qkov-passes_0", 1)
    run(model, at_once=1)
    assert seen["depends_on_length"] == (True, "MainThread", 3)


def test_of_two_things_at_a_time_the_first_one_that_fails_is_raised():
    done = []

    def fails(name):
        time.sleep(0.05)
        done.append(name)
        raise KeyError(name)

    for one, other, raised in ((fails, fails, "one"), (lambda name: None, fails, "other"), (fails, print, "one")):
        with pytest.raises(KeyError, match=raised):
            both(partial(one, "one"), partial(other, "other"))
        assert torch.get_num_threads() == 3
    assert sorted(done) == ["one", "one", "other", "other"]  # each is waited for
