"""Through LoRA the slice of the whole weight W_0 + s B A is held, or it is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from training import SOME_HEADS, adamw, moved, selection_of, slices, train, trained, whole_parameters
from zoo import TINY

from qkov_dist import QkovError, freeze_heads, scale_heads

peft = pytest.importorskip("peft")

HEADS = {"llama": SOME_HEADS, "gpt2": (("Q", 0, 1), ("K", 0, 2), ("V", 1, 0), ("O", 1, 3))}
NAMES = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "attn.c_proj"]}


def adapted(name: str = "llama", config=None, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": NAMES[name], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on Conv1D, and uses what transformers gives up
        return peft.get_peft_model(TINY[name].build(), config or peft.LoraConfig(**settings))


def effective(model, selection):
    """Slices of W_0 + s B A, as PEFT itself merges them."""
    merged = copy.deepcopy(model).merge_and_unload()
    return slices(whole_parameters(merged), selection)


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_the_whole_weight_stay_bit_for_bit(name):
    model, plain = adapted(name), TINY[name].build()
    selection = selection_of(plain, HEADS[name])
    before = slices(whole_parameters(plain), selection)
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with freeze_heads(model, selection):
        train(model, adamw(model))
        assert moved(before, effective(model, selection)) == set()
    assert moved(before, effective(model, selection)) == set()  # and when the block has ended
    assert moved(factors, dict(model.named_parameters())) == factors.keys()  # all else of each factor trains
    loose = adapted(name)
    train(loose, adamw(loose))
    assert moved(before, effective(loose, selection)) == before.keys()


def test_a_block_without_a_step_leaves_the_adapter_as_it_was():
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with freeze_heads(model, selection_of(TINY["llama"].build())):
        held = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert {name.split(".")[-3] for name in held} == {"lora_A"}  # the columns of O, while it lasts
    assert moved(before, dict(model.named_parameters())) == set()


def test_an_adapter_over_a_packed_weight_is_held():
    """As of a quantized model, whose weights have another shape and no gradient."""
    model = adapted()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    base = model.get_submodule(f"{path}.base_layer")
    del base.weight
    base.weight = torch.nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    factor = model.get_parameter(f"{path}.lora_B.default.weight")
    optimizer = torch.optim.SGD([factor], lr=1.0)
    with freeze_heads(model, selection_of(TINY["llama"].build(), [("Q", 0, 1)])):
        factor.grad = torch.ones_like(factor)
        optimizer.step()
    assert (factor == 0).all(1).nonzero().flatten().tolist() == list(range(16, 32))


def test_a_weight_that_trains_whole_in_an_adapted_model_is_held():
    """PEFT trains a copy of what is in modules_to_save, and leaves the original."""
    model = adapted(target_modules=["k_proj"], modules_to_save=["q_proj"])
    selection = selection_of(TINY["llama"].build(), [("Q", 0, 1)])
    (name,) = (n for n, _ in model.named_parameters() if "layers.0" in n and "q_proj.modules_to_save" in n)
    before = model.get_parameter(name).detach().clone()
    with freeze_heads(model, selection):
        train(model, adamw(model), 3)
    after = model.get_parameter(name).detach()
    assert torch.equal(before[16:32], after[16:32])
    assert (before != after).any(1).sum() == len(before) - 16


def test_biases_of_adapters_are_held_with_those_of_a_head():
    model = adapted("gpt2", lora_bias=True)
    selection = selection_of(TINY["gpt2"].build(), [("K", 0, 2)], include_bias=True)
    bias = model.get_parameter("base_model.model.transformer.h.0.attn.c_attn.lora_B.default.bias")
    with freeze_heads(model, selection):
        train(model, adamw(model), 3)
    assert (bias == 0).nonzero().flatten().tolist() == list(range(48, 56))


def test_updates_of_rows_are_scaled():
    plain, scaled = adapted(), adapted()
    selection = selection_of(TINY["llama"].build(), [("Q", 0, 1)])
    train(plain, torch.optim.SGD(trained(plain), lr=0.1), 1)
    with scale_heads(scaled, selection, 0.5):
        train(scaled, torch.optim.SGD(trained(scaled), lr=0.1), 1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    left, right = (model.get_parameter(name).detach() for model in (plain, scaled))
    torch.testing.assert_close(right[16:32], 0.5 * left[16:32])
    assert torch.equal(right[:16], left[:16])
    assert left[16:32].any()


@pytest.mark.parametrize("head", [("V", 0, 1), ("O", 0, 3)])
def test_an_adapter_that_was_trained_is_refused(head):
    model = adapted()
    train(model, adamw(model), 1)
    with pytest.raises(QkovError, match=r"default'.*that are zero.*merge_and_unload"):
        freeze_heads(model, selection_of(TINY["llama"].build(), [head])).__enter__()
    with freeze_heads(model.merge_and_unload(), selection_of(TINY["llama"].build(), [head])):
        pass


def test_what_couples_heads_is_refused():
    selection = selection_of(TINY["llama"].build(), [("Q", 0, 1)])
    with pytest.raises(QkovError, match=r"q_proj.*plain LoRA.*Dora"):
        freeze_heads(adapted(use_dora=True), selection).__enter__()
    other = adapted(config=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(QkovError, match=r"q_proj.*plain LoRA.*ia3"):
        freeze_heads(other, selection).__enter__()
    with freeze_heads(other, selection_of(TINY["llama"].build(), [("K", 0, 1)])):  # which has no adapter
        pass
