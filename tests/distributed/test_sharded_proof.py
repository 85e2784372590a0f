"""The small copy on which a sharded model's layout is proved, of every architecture."""

from __future__ import annotations

import pytest
import torch
from zoo import RELATIVES, TINY

from qkov_dist.distributed.sharded_proof import prove_stand_in, stand_in
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve

MODELS = {**TINY, **RELATIVES}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_a_small_copy_that_proves_its_layout(name):
    model = MODELS[name].build()
    prove_stand_in(model, resolve(model))


def test_lists_that_happen_to_be_as_long_as_the_model_is_deep_are_kept():
    model = RELATIVES["falcon_h1"].build()
    assert len(model.config.mlp_multipliers) == model.config.num_hidden_layers
    assert stand_in(model, num_layers=1).config.mlp_multipliers == model.config.mlp_multipliers


def test_an_architecture_that_cannot_be_built_small_is_named():
    model = TINY["llama"].build()
    model.config.hidden_act = "none of these"
    with pytest.raises(QkovError, match="model type 'llama': expected a small copy of its architecture"):
        prove_stand_in(model, resolve(model))


def test_the_global_generator_is_left_alone():
    """One rank makes the copy: its generator must not leave those of the others behind."""
    model = TINY["llama"].build()
    before = torch.get_rng_state()
    stand_in(model, num_layers=1)
    assert torch.equal(before, torch.get_rng_state())
