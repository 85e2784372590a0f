"""Heads are held bit for bit by any optimizer of one process, and everything else trains."""

from __future__ import annotations

import json

import pytest
import torch
from training import (
    SOME_HEADS,
    adamw,
    moved,
    moved_slices,
    others,
    selection_of,
    slices,
    train,
    trained,
    whole_parameters,
)
from zoo import TINY

from qkov_dist import QkovError, freeze_heads, scale_heads
from qkov_dist.results.selection import SelectedHead, Selection


def sgd(model):
    return torch.optim.SGD(trained(model), lr=1e-2, momentum=0.9, weight_decay=0.1)


def lbfgs_steps(model):
    optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3)
    ids = torch.arange(4, 20).view(2, 8)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def scaled_steps(model):
    """As in mixed precision; the first step overflows and is skipped."""
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    ids = torch.arange(4, 20).view(2, 8)
    for _ in range(12):
        scaler.scale(4 * model(input_ids=ids, labels=ids).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert 1 < scaler.get_scale() < 2.0**127


WAYS = {
    "AdamW": lambda model: train(model, adamw(model)),
    "AdamW, foreach": lambda model: train(model, adamw(model, foreach=True)),
    "AdamW, fused": lambda model: train(model, adamw(model, fused=True)),
    "SGD with momentum": lambda model: train(model, sgd(model)),
    "accumulated and clipped": lambda model: train(model, adamw(model), 4, accumulate=2, clip=0.1),
    "gradient scaler": scaled_steps,
    "LBFGS": lbfgs_steps,
}


@pytest.mark.parametrize("way", WAYS)
def test_slices_stay_bit_for_bit_and_all_else_trains(way):
    model = TINY["llama"].build()
    selection = selection_of(model)
    with freeze_heads(model, selection):
        held, free = moved_slices(model, selection, lambda: WAYS[way](model))
    assert held == set()
    assert len(free) == len(whole_parameters(model))
    held, _ = moved_slices(model, selection, lambda: WAYS[way](model))  # and afterwards they train again
    assert len(held) == len(SOME_HEADS)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_fused_and_transposed_weights_and_their_biases_are_held(name):
    model = TINY[name].build()
    selection = selection_of(model, [("Q", 0, 1), ("K", 0, 2), ("V", 1, 0), ("O", 1, 3)], include_bias=True)
    assert len(slices(whole_parameters(model), selection)) == 7  # O has no bias of its own
    with freeze_heads(model, selection):
        held, free = moved_slices(model, selection, lambda: train(model, adamw(model), 5))
    assert held == set()
    assert {name for name in free if "attn" in name or "attention" in name}
    assert len(moved_slices(model, selection, lambda: train(model, adamw(model), 5))[0]) == 7


def test_a_tied_weight_is_held_for_all_its_users():
    model = TINY["llama"].build()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    selection = selection_of(model, [("Q", 1, 2), ("Q", 0, 2)])
    with scale_heads(model, selection, 0.5):  # a rectangle that comes twice is scaled once
        twice = _after_one_sgd_step(model)
    model = TINY["llama"].build()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with scale_heads(model, selection_of(model, [("Q", 0, 2)]), 0.5):
        once = _after_one_sgd_step(model)
    assert moved(once, twice) == set()


def _after_one_sgd_step(model):
    train(model, torch.optim.SGD(trained(model), lr=0.1), 1)
    return whole_parameters(model)


def test_momentum_from_before_does_not_move_what_is_held():
    model = TINY["llama"].build()
    selection, optimizer = selection_of(model), adamw(model)
    train(model, optimizer, 3)
    with freeze_heads(model, selection):
        assert moved_slices(model, selection, lambda: train(model, optimizer, 3))[0] == set()


def test_elements_that_are_free_train_as_if_the_others_had_no_gradient():
    """Adam works element by element: with one step, free elements end where plain training takes them."""
    frozen, plain = TINY["llama"].build(), TINY["llama"].build()
    selection = selection_of(plain)
    train(plain, adamw(plain), 1)
    with freeze_heads(frozen, selection):
        train(frozen, adamw(frozen), 1)
    left, right = others(whole_parameters(frozen), selection), others(whole_parameters(plain), selection)
    assert moved(left, right) == set()


def test_gradients_of_what_is_held_do_not_count_for_clipping():
    model = TINY["llama"].build()
    ids = torch.arange(4, 20).view(2, 8)
    selection = selection_of(model)
    with freeze_heads(model, selection):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(not part.any() for part in slices(gradients, selection).values())
        norm = torch.nn.utils.clip_grad_norm_(trained(model), 1e9)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert norm < torch.nn.utils.clip_grad_norm_(trained(model), 1e9)


def test_a_parameter_that_begins_to_train_inside_is_held_too():
    model = TINY["llama"].build()
    selection = selection_of(model, [("Q", 0, 1)])
    projection = model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    with freeze_heads(model, selection):
        projection.requires_grad_(True)
        held, free = moved_slices(model, selection, lambda: train(model, adamw(model), 3))
    assert held == set()
    assert "model.layers.0.self_attn.q_proj.weight" in free


def test_an_error_inside_leaves_slices_as_they_were_and_no_hook_behind():
    from torch.optim import optimizer as hooks

    counts = len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)
    model = TINY["llama"].build()
    selection, before = selection_of(model), whole_parameters(model)
    with pytest.raises(RuntimeError, match="broken off"), freeze_heads(model, selection):
        _break_off(model)
    assert moved(slices(before, selection), slices(whole_parameters(model), selection)) == set()
    assert (len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)) == counts
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def _break_off(model):
    """As an optimizer that fails in the middle of a step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    raise RuntimeError("broken off")


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_updates_are_multiplied_by_the_factor(factor):
    start, plain, scaled = (TINY["llama"].build() for _ in range(3))
    selection = selection_of(start)
    before, after = whole_parameters(start), _after_one_sgd_step(plain)
    with scale_heads(scaled, selection, factor):
        found = _after_one_sgd_step(scaled)
    assert moved(others(found, selection), others(after, selection)) == set()
    parts = slices(before, selection), slices(after, selection), slices(found, selection)
    for name in parts[0]:
        was, plainly, now = (part[name] for part in parts)
        torch.testing.assert_close(now - was, factor * (plainly - was), rtol=1e-3, atol=1e-7)
        assert not torch.equal(plainly, was)


def test_half_precision_is_scaled_in_float32():
    model = TINY["llama"].build().bfloat16()
    selection = selection_of(model, [("Q", 0, 1)])
    before = slices(whole_parameters(model), selection)
    with scale_heads(model, selection, 1.0):
        held, _ = moved_slices(model, selection, lambda: train(model, torch.optim.SGD(trained(model), lr=1.0), 1))
    plain = TINY["llama"].build().bfloat16()
    train(plain, torch.optim.SGD(trained(plain), lr=1.0), 1)
    assert held
    assert moved(slices(whole_parameters(plain), selection), slices(whole_parameters(model), selection)) == set()
    assert before


def test_a_path_of_json_is_a_selection(tmp_path):
    model = TINY["llama"].build()
    selection = selection_of(model)
    selection.to_json(tmp_path / "heads.json")
    with freeze_heads(model, tmp_path / "heads.json"):
        assert moved_slices(model, selection, lambda: train(model, adamw(model), 2))[0] == set()
    least = {"by": "mine", "heads": [json.loads((tmp_path / "heads.json").read_text())["heads"][0]]}
    (tmp_path / "least.json").write_text(json.dumps(least))
    with freeze_heads(model, str(tmp_path / "least.json")):
        assert len(moved_slices(model, selection, lambda: train(model, adamw(model), 2))[0]) == len(SOME_HEADS) - 1


def test_a_compiled_or_checkpointed_model_is_found_by_plain_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = TINY["llama"].build()
    selection = selection_of(model)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    compiled = torch.compile(model, backend="eager")
    with freeze_heads(compiled, selection):
        held, free = moved_slices(model, selection, lambda: train(model, adamw(model), 2))
    assert held == set()
    assert len(free) > len(SOME_HEADS)


def test_what_cannot_be_held_is_refused():
    model = TINY["llama"].build()
    selection = selection_of(model)
    with pytest.raises(QkovError, match="factor: expected a finite number of at least 0, got -1"):
        freeze_heads(model, selection, -1).__enter__()
    with pytest.raises(QkovError, match=r"lacks.*nearest parameter is|lacks"):
        freeze_heads(TINY["gpt2"].build(), selection).__enter__()
    with pytest.raises(QkovError, match=r"columns up to .* got shape"):
        freeze_heads(TINY["llama"].build(num_attention_heads=2), selection).__enter__()
    unknown = Selection("change_adam", (SelectedHead("Q", 0, 1, 1.0, None, ()),))
    with pytest.raises(QkovError, match="where each head lies"):
        freeze_heads(model, unknown).__enter__()
    marked = next(model.parameters())
    marked._hp_mapping = object()  # as DeepSpeed does
    with pytest.raises(QkovError, match=r"ZeRO, which steps flat float32 copies.*FSDP2"):
        freeze_heads(model, selection).__enter__()
