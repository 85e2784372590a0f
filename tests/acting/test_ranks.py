"""Heads are held on real ranks, however the model is cut, and what cannot be held is refused on all of them."""

from __future__ import annotations

import warnings

import prepared
import pytest
import torch
from training import adamw, moved_slices, selection_of, slices, train, whole_parameters
from zoo import TINY

from qkov_dist import QkovError, freeze_heads

HEADS = (("Q", 0, 1), ("Q", 1, 2), ("K", 1, 0), ("V", 0, 1), ("O", 1, 1), ("O", 0, 3))
OWN_DATA = ("distributed_data_parallel", "fully_sharded", "adapted_and_fully_sharded")


def moved_on_ranks(prepare: str, folder: str) -> tuple[set[str], int, set[str]]:
    """Which slices 20 steps move while they are held, how many parameters move besides, and which without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = TINY["llama"].build()
        selection, model = selection_of(plain, HEADS), getattr(prepared, prepare)(plain, folder).train()
        seed, how = 0, {}
        if prepare in OWN_DATA:
            seed, how = torch.distributed.get_rank(), {"clip": 1.0}  # torch clips no mix of DTensors and others
        with freeze_heads(model, selection):
            held, free = moved_slices(model, selection, lambda: train(model, adamw(model), 20, seed, **how))
        loose, _ = moved_slices(model, selection, lambda: train(model, adamw(model), 2, seed))
        return held, len(free), loose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    TINY["llama"].build().save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize(
    ("prepare", "world_size"),
    [
        ("distributed_data_parallel", 2),
        ("fully_sharded", 2),
        ("fully_sharded", 3),  # whose cuts lie inside heads
        ("tensor_parallel", 2),
        ("torch_parallel_fully_sharded", 4),
    ],
)
def test_slices_stay_on_every_rank_and_all_else_trains(prepare, world_size, ranks, folder):
    for held, num_free, loose in ranks(world_size).run(moved_on_ranks, prepare, folder):
        assert held == set()
        assert num_free == len(dict(TINY["llama"].build().named_parameters()))
        assert len(loose) == len(HEADS)


def adapters_on_ranks(folder: str) -> tuple[list[bool], int]:
    """Whether each slice's change B A is exactly zero after training, and how many factors have moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = TINY["llama"].build()
        selection = selection_of(plain, HEADS)
        model = prepared.adapted_and_fully_sharded(plain, folder)
        before = whole_parameters(model)
        with freeze_heads(model, selection):
            train(model, adamw(model), 20, torch.distributed.get_rank())
        after = whole_parameters(model)
    changes = {
        f"{name}.weight": after[f"{name}.lora_B.default.weight"] @ after[f"{name}.lora_A.default.weight"]
        for name in {parameter.rpartition(".lora_")[0] for parameter in after if "lora_A" in parameter}
    }
    unmoved = [not change.any() for change in slices(changes, selection).values()]
    return unmoved, sum(not torch.equal(before[name], after[name]) for name in before if "lora_" in name)


@pytest.mark.long
def test_adapters_that_are_sharded_are_held(ranks, folder):
    pytest.importorskip("peft")
    for unmoved, num_moved in ranks(2).run(adapters_on_ranks, folder):
        assert unmoved == [True] * len(HEADS)
        assert num_moved == 16  # A and B of four projections of two layers


def whole_weights_in_place() -> set[str]:
    """A pass without backward leaves the whole weights of the root in place of its shards."""
    from torch.distributed.fsdp import fully_shard

    plain = TINY["llama"].build()
    selection, model = selection_of(plain, HEADS), fully_shard(plain)
    model(input_ids=torch.arange(4, 12)[None])
    with freeze_heads(model, selection):
        return moved_slices(model, selection, lambda: train(model, adamw(model), 2))[0]


@pytest.mark.long
def test_a_pass_before_the_block_changes_nothing(ranks):
    assert ranks(2).run(whole_weights_in_place) == [set(), set()]


def refusal_of(prepare: str, folder: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = TINY["llama"].build()
        selection = selection_of(plain, HEADS)
        model = getattr(prepared, prepare)(plain, folder)
        for at_hand in (model, model.module):  # the engine, and what a Trainer's callback is given
            try:
                freeze_heads(at_hand, selection).__enter__()
            except QkovError as error:
                told = str(error)
            else:
                return "no refusal"
    return told


@pytest.mark.long
@pytest.mark.parametrize("prepare", ["zero1", "zero2", "zero3"])
def test_zero_is_refused_with_the_reason(prepare, ranks, folder):
    pytest.importorskip("deepspeed")
    for told in ranks(2).run(refusal_of, prepare, folder):
        assert "DeepSpeed ZeRO, which steps flat float32 copies" in told
        assert "FSDP2" in told
