"""Capture on models in every state that users bring: checkpointed, wrapped, quantized, half trained, broken."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from comparing import assert_close, closeness
from expected import expected_scores
from jobs import Job, job_for
from samples import mixed_samples
from sites import NanBackward, sites_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from zoo import TINY, VOCAB

from qkov_dist.capture.hooks import capture
from qkov_dist.capture.sinks import Factors
from qkov_dist.data.batches import make_batches
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve
from qkov_dist.modes import evaluating


class Kept(dict[Site, Factors]):
    """A sink that keeps one batch."""

    def add(self, factors: Factors) -> None:
        self[factors.site] = factors


def one_batch(samples, tokens: int = 10**6):
    names = [f"task 'a', sample {s.id!r}" for s in samples]
    (batch,) = make_batches(samples, names=names, batch_tokens=tokens, objective="causal")
    return batch


@contextmanager
def deltas(model: nn.Module, sites: list[Site]):
    """Add to each projection a dense zero weight that learns: its gradient is D^T X, whatever the linear is."""
    handles, added = [], {}
    for site in sites:
        module = model.get_submodule(site.module)
        added[site] = torch.zeros(module.out_features, module.in_features, requires_grad=True)

        def hook(_module, args, output, delta=added[site]):
            return output + (args[0].float() @ delta.t()).to(output.dtype)

        handles.append(module.register_forward_hook(hook))
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def dense_gradients(model: nn.Module, sites: list[Site], samples) -> list[dict[Site, torch.Tensor]]:
    """Each sample alone, by autograd through the model's own kernels."""
    out = []
    for sample in samples:
        with deltas(model, sites) as added, evaluating(model):
            ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100).backward()
            out.append({site: delta.grad for site, delta in added.items()})
    return out


def assert_captures_autograd(model: nn.Module, tolerance: float = 1e-4, tokens: int = 10**6) -> None:
    samples, sites = mixed_samples(4, VOCAB, seed=3, lengths=(5, 12)), sites_of(model)
    expected = dense_gradients(model, sites, samples)
    names = [sample.id for sample in samples]
    with capture(model, sites) as session:
        for batch in make_batches(samples, names=names, batch_tokens=tokens, objective="causal"):
            kept = Kept()
            session.run(batch, kept)
            assert kept.keys() == set(sites)
            for site, factors in kept.items():
                wanted = torch.stack([expected[number][site] for number in batch.samples])
                assert closeness(per_sample(factors, batch.lengths), wanted.double()) < tolerance, site


def per_sample(factors: Factors, lengths: tuple[int, ...]) -> torch.Tensor:
    pairs = zip(factors.d.double().split(lengths), factors.x.double().split(lengths), strict=True)
    return torch.stack([d.t() @ x for d, x in pairs])


def test_reference_by_added_weights():
    assert_captures_autograd(TINY["llama"].build())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_wrapped_linears_are_captured_through_their_wrapper():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(TINY["llama"].build(), config)
    assert sum("base_layer" in site.module for site in sites_of(model)) == 6
    entry = TINY["llama"]
    job = job_for(entry)
    assert_close(job.run(model), expected_scores(entry, model, job))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_quantized_linears_are_captured(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = TINY["llama"].build(hidden_size=64, intermediate_size=64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "self_attn" in name:
            parent, _, child = name.rpartition(".")
            new = (
                bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
                if bits == 4
                else bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            )
            new.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.requires_grad_(False).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None])  # quantizes, and on some CPUs repacks for inference
    assert model.model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    # quantized kernels round activations, batch by batch: a sample is compared alone
    assert_captures_autograd(model, 1e-2 if bits == 8 else 1e-4, tokens=1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_the_model_changes_nothing(reentrant):
    entry = TINY["llama"]
    model = entry.build()
    job = job_for(entry)
    expected = expected_scores(entry, model, job)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_close(job.run(model), expected)
    assert model.training
    assert model.is_activation_checkpointing


@pytest.mark.parametrize("implementation", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_run_again_in_the_backward_pass_equal_the_oracle(name, implementation):
    entry = TINY[name]
    model = entry.build()
    job = job_for(entry)
    expected = expected_scores(entry, model, job)
    layout = resolve(model)
    stack = model.model.layers if name == "llama" else model.transformer.h
    for n, layer in enumerate(stack):
        stack[n] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
    for layer in layout.layers:
        assert "_checkpoint_wrapped_module" not in layer.module
    wrapped = resolve(model)
    assert_close(job.run(model, layout=wrapped), expected)


def state(model: nn.Module) -> list[object]:
    parameters = [(n, p.requires_grad, p.grad, p.data_ptr()) for n, p in model.named_parameters()]
    modules = [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    ]
    return [parameters, modules]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails):
    model = TINY["llama"].build()
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, weights = state(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    samples = mixed_samples(3, VOCAB, seed=3)
    try:
        Job(samples, samples, batch_tokens=10).run(model)
        if fails:
            with pytest.raises(RuntimeError, match="stop"), capture(model, sites_of(model)):
                raise RuntimeError("stop")
    finally:
        after = state(model)
    assert str(after) == str(before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_no_weight_gradient_is_formed_and_the_backward_pass_stops_at_the_lowest_layer():
    model = TINY["llama"].build(num_hidden_layers=3)
    sites = [site for site in sites_of(model) if site.layer == 2]
    in_graph = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, n=n: in_graph.update({n: out.requires_grad}))
        for n, layer in enumerate(model.model.layers)
    ]
    with capture(model, sites) as session:
        session.run(one_batch(mixed_samples(2, VOCAB, seed=3)), Kept())
    for handle in handles:
        handle.remove()
    assert in_graph == {0: False, 1: False, 2: True}
    assert all(p.grad is None for p in model.parameters())


def test_q_k_and_v_share_one_input():
    model = TINY["llama"].build()
    kept = Kept()
    with capture(model, sites_of(model)) as session:
        session.run(one_batch(mixed_samples(2, VOCAB, seed=3)), kept)
    shared = {site.module.split(".")[-1]: factors.x_site.module.split(".")[-1] for site, factors in kept.items()}
    assert shared == {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}


def test_a_padded_batch_gives_each_sample_its_own_tokens_only():
    model = TINY["llama"].build()
    samples = mixed_samples(3, VOCAB, seed=3)
    batch, kept = one_batch(samples), Kept()
    assert len(set(batch.lengths)) > 1
    with capture(model, sites_of(model)) as session:
        session.run(batch, kept)
    assert {len(factors.x) for factors in kept.values()} == {sum(batch.lengths)}


@pytest.mark.parametrize("check_at_end", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_names_task_sample_and_layer(where, check_at_end):
    model = TINY["llama"].build()
    samples = mixed_samples(3, VOCAB, seed=3, mask=False)
    samples[1].input_ids[1] = 2  # no other sample has this token
    batch = one_batch(samples)
    marked = (batch.input_ids == 2).any(dim=1)
    if where == "loss":
        with torch.no_grad():
            model.model.embed_tokens.weight[2] = float("nan")
    else:
        attention = model.model.layers[1].self_attn
        attention.register_forward_hook(lambda _m, _a, out: (NanBackward.apply(out[0], marked), *out[1:]))
    expected = {
        "loss": r"sample '3-1': expected a finite loss",
        "gradient": r"sample '3-1', layer 1 .* finite gradient",
    }
    with (
        capture(model, sites_of(model), check_at_end=check_at_end) as session,
        pytest.raises(QkovError, match=expected[where]) as caught,
    ):
        session.run(batch, Kept())
    assert "task 'a'" in str(caught.value)


def test_a_projection_called_twice_is_refused():
    model = TINY["llama"].build()
    attention = model.model.layers[0].self_attn

    def call_once_more(_module, _args, kwargs) -> None:
        attention.q_proj(kwargs["hidden_states"])

    handle = attention.register_forward_pre_hook(call_once_more, with_kwargs=True)
    with capture(model, sites_of(model)) as session, pytest.raises(QkovError, match="one call of the projection"):
        session.run(one_batch(mixed_samples(2, VOCAB, seed=3)), Kept())
    handle.remove()


def test_a_projection_that_the_loss_does_not_reach_is_named():
    model = TINY["llama"].build()
    unused = nn.Linear(4, 4)
    model.unused = unused
    with capture(model, [Site(0, "unused")]) as session, pytest.raises(QkovError, match="unused"):
        session.run(one_batch(mixed_samples(2, VOCAB, seed=3)), Kept())


def test_an_input_changed_in_place_is_refused():
    model = TINY["llama"].build()
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_hook(lambda _m, args, kwargs, _o: _spoil(kwargs), with_kwargs=True)
    sites = [site for site in sites_of(model) if site.layer == 0]
    with capture(model, sites) as session, pytest.raises(QkovError, match="changed in place"):
        session.run(one_batch(mixed_samples(2, VOCAB, seed=3)), Kept())
    handle.remove()


def _spoil(kwargs) -> None:
    with torch.no_grad():
        kwargs["hidden_states"].add_(1.0)
