"""Evaluating and frozen: what holds inside, and that all is left exactly as it was found."""

from __future__ import annotations

import pytest
import torch
from checkpoints import llama
from torch import nn

from qkov_dist import QkovError
from qkov_dist.modes import evaluating, explained_pass, frozen


def test_both_modes_are_restored_exactly() -> None:
    model = llama().train()
    model.model.layers[0].mlp.eval()
    model.lm_head.requires_grad_(True)
    model.model.norm.requires_grad_(False)
    gradient = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight.grad = gradient
    training = {name: module.training for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(set(training.values())) == len(set(required.values())) == 2
    with evaluating(model), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert model.model.layers[0].mlp.up_proj.weight.grad is gradient


def test_both_modes_are_restored_after_an_error() -> None:
    model = llama().train()
    with pytest.raises(KeyError), evaluating(model), frozen(model):
        raise KeyError
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_integer_parameters_can_be_frozen() -> None:
    module = nn.Module()
    module.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with evaluating(module), frozen(module):
        assert not module.packed.requires_grad


def test_weights_for_which_there_is_no_room_on_their_way_from_nvme_are_told_what_to_set():
    said = "Linear: expected a forward .*Not enough buffers 0.*stage3_prefetch_bucket_size to 0"
    with pytest.raises(QkovError, match=said), explained_pass(nn.Linear(1, 1)):
        raise AssertionError("Not enough buffers 0 for swapping 1")
