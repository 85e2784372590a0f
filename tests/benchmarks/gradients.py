"""Passes through the model that other methods start from: bare ones, and those that leave per-sample gradients.

Every method yields (pooled numbers of the samples, {projection: gradients [n, out, in]}) and keeps nothing of what it
has yielded. Batches are those of the product's own configuration; a sample's loss is the mean over its labelled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from device import device, on_gpu
from material import Subject
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import Batch, default_batch_tokens, make_batches
from qkov_dist.data.samples import IGNORED
from qkov_dist.scoring.tiles import Selection, make_tile_plan

BATCH_TOKENS = default_batch_tokens(on_cpu=not on_gpu(), moves=False, num_parameters=135 * 10**6)  # of everybody
Gradients = Iterator[tuple[tuple[int, ...], Mapping[str, Tensor]]]


def projections(subject: Subject, layer: int | None = None) -> tuple[str, ...]:
    """Module paths of the scored projections, of one layer or of all."""
    layers = subject.layout.layers if layer is None else [subject.layout.layers[layer]]
    return tuple(projection.module for found in layers for projection in found.projections)


def batches(subject: Subject, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """The batches that a run makes: A's, then B's; all samples are equally long, so that nothing is padded."""
    found, first = [], 0
    for samples in subject.tasks:
        numbers = range(first, first + len(samples))
        names = [sample.id for sample in samples]
        found += make_batches(samples, names=names, numbers=numbers, batch_tokens=batch_tokens, objective="causal")
        first += len(samples)
    assert all(bool(batch.attention_mask.all()) for batch in found)
    return [batch.to(device()) for batch in found]


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Each sample's mean cross-entropy over its labelled positions, from the logits of all positions: [N]."""
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view_as(targets).sum(dim=1) / (targets != IGNORED).sum(dim=1)


def bare_passes(subject: Subject) -> Tensor:
    """One forward pass with all logits and one backward pass through activations alone; returns the losses."""
    model, found = subject.loaded.model, []
    with trainable(model, ()):
        for batch in batches(subject):
            embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
            of_samples = losses(model(inputs_embeds=embedded, use_cache=False).logits, batch.targets)
            of_samples.sum().backward()
            found.append(of_samples.detach())
    return torch.cat(found)


def autograd_loop(subject: Subject) -> Gradients:
    """One backward pass a sample."""
    model, names = subject.loaded.model, projections(subject)
    with trainable(model, names) as weights:
        for batch in batches(subject, batch_tokens=1):
            loss = losses(model(input_ids=batch.input_ids, use_cache=False).logits, batch.targets).sum()
            found = torch.autograd.grad(loss, weights)
            yield batch.samples, {name: g.unsqueeze(0) for name, g in zip(names, found, strict=True)}


def vmap_of_grad(subject: Subject) -> Gradients:
    """``torch.func.vmap(grad(loss))`` over each batch; the math kernel is the one whose attention it can batch."""
    model, names = subject.loaded.model, projections(subject)

    def loss(weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        inputs = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        logits = torch.func.functional_call(model, weights, (), inputs).logits
        return losses(logits, targets.unsqueeze(0)).sum()

    with trainable(model, ()), sdpa_kernel(SDPBackend.MATH):
        weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        for batch in batches(subject):
            found = per_sample(weights, batch.input_ids, batch.targets)
            yield batch.samples, {name: found[f"{name}.weight"] for name in names}


def from_factors(subject: Subject, layer: int) -> dict[str, Tensor]:
    """This product's gradients D^T X of one layer, {projection: [N, out, in]}."""
    tile_plan = make_tile_plan(subject.layout, Selection((layer,)), include_bias=False, num_samples=2 * subject.samples)
    found = {}
    with closing(FactorStore(2**40)) as store:
        collection = Collection(store, tile_plan.sites)
        for number, samples in enumerate(subject.tasks):
            collection.run(subject.loaded.model, str(number), samples)
        for site in tile_plan.sites:
            x, d = store.x(site).values, store.d(site).values
            spans = [store.spans[number] for number in range(2 * subject.samples)]
            found[site.module] = torch.stack([d[start:stop].t() @ x[start:stop] for start, stop in spans]).cpu()
    return found


def exhaust(gradients: Gradients) -> None:
    """Take all gradients and keep none."""
    for _ in gradients:
        pass


def gathered(gradients: Gradients, names: tuple[str, ...]) -> dict[str, Tensor]:
    """All gradients of some projections, in pooled order: {projection: [N, out, in]}."""
    parts: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    for numbers, found in gradients:
        for name in names:
            parts[name].update({n: g.clone().cpu() for n, g in zip(numbers, found[name], strict=True)})
    return {name: torch.stack([by_number[n] for n in sorted(by_number)]) for name, by_number in parts.items()}


@contextmanager
def trainable(model: Any, names: tuple[str, ...]) -> Iterator[list[nn.Parameter]]:
    """Only the weights of these modules require a gradient inside the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [model.get_submodule(name).weight for name in names]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None
