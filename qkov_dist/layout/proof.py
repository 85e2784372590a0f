"""Proof of a layout by perturbation: nudge the slice that the layout calls (block, head) and see who responds.

Every slice of every layer is put to the tests of ``signatures``; one that responds as it should not is an error.
Nothing here knows an architecture: a model that nobody described is proved in the same way, its candidates one after
the other until one is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.modes import ModelError, bare

from .heads import AttentionLayer, HeadSlice, Layout, Projection
from .modules import text_config
from .probe import Call, Probe, make_probe, probe_tokens, quiet_eval, randomized, record_calls
from .resolve import candidates, known_family, resolve, unresolved
from .signatures import SilentError, SliceCheck
from .weights import is_plain, is_sharded


@dataclass(frozen=True)
class ProofRow:
    """What was seen for one head: the query heads that responded, and how."""

    layer: int
    block: str
    head: int
    responded: tuple[int, ...]
    evidence: str


def prove(model: nn.Module, layout: Layout, *, layers: Iterable[int] | None = None, seed: int = 0) -> list[ProofRow]:
    """Check every slice of a layout on the model itself.

    Args:
        model: With weights; its state is restored exactly.
        layout: What to prove.
        layers: Layer numbers to check, by default all with attention.
        seed: Of the tokens and nudges; the global generators are left alone.

    Raises:
        QkovError: at the first slice whose response is not what the layout says.
    """
    chosen = layout.layers if layers is None else [layout.layer(index) for index in sorted(set(layers))]
    rows: list[ProofRow] = []
    with quiet_eval(model):
        tokens = probe_tokens(model, seed)
        calls = record_calls(model, chosen, tokens)
        for layer in chosen:
            call = calls.pop(layer.index)
            with _prepared(model, layer, call, tokens) as probe:
                silent = _prove_layer(probe, rows, seed)
            if silent:
                rows += _prove_revived(model, layer, call, tokens, silent, seed)
    return rows


@contextmanager
def _prepared(model: nn.Module, layer: AttentionLayer, call: Call, tokens: torch.Tensor) -> Iterator[Probe]:
    """One layer, ready to be nudged: without the user's hooks, unless its parts have to be gathered by hooks."""
    attention = model.get_submodule(layer.module)
    sharded = any(is_sharded(parameter) for parameter in attention.parameters())
    with nullcontext() if sharded else bare(attention):
        probe = make_probe(model, layer, call, tokens)
        _check_columns(probe)
        yield probe


def _prove_layer(probe: Probe, rows: list[ProofRow], seed: int) -> dict[HeadSlice, SilentError]:
    """Check a layer's slices; returns those to which too little responded."""
    generator, silent = torch.Generator().manual_seed(seed), {}
    for projection in probe.layer.projections:
        for piece in projection.slices:
            try:
                rows.append(_prove_slice(probe, projection, piece, generator))
            except SilentError as error:
                silent[piece] = error
    return silent


def _prove_revived(
    model: nn.Module,
    layer: AttentionLayer,
    call: Call,
    tokens: torch.Tensor,
    silent: Mapping[HeadSlice, SilentError],
    seed: int,
) -> Iterator[ProofRow]:
    """Check the slices to which too little responded with random weights in the attention: the layout is the same.

    Raises:
        QkovError: where too little responds again, or weights cannot be replaced.
    """
    attention, generator = model.get_submodule(layer.module), torch.Generator().manual_seed(seed)
    if not all(map(is_plain, attention.parameters())):
        raise _cannot_revive(next(iter(silent.values())))
    with randomized(attention, seed), _prepared(model, layer, call, tokens) as probe:
        for projection in layer.projections:
            for piece in projection.slices:
                if piece in silent:
                    row = _prove_slice(probe, projection, piece, generator)
                    yield replace(row, evidence=f"silent on these weights; on random ones: {row.evidence}")


def _cannot_revive(error: SilentError) -> QkovError:
    return QkovError(
        error.where,
        expected=error.expected,
        got=f"{error.got}: on these weights the head is silent",
        remedy="Was it zeroed or pruned? Its layout is proved with random weights in place of dense ones that lie "
        "whole in this process; these are quantized or offloaded. Load the model so that they are not.",
    )


def prove_candidates(model: nn.Module, layouts: Sequence[Layout]) -> Layout:
    """The one layout that the model does not refute, marked proved.

    Raises:
        QkovError: where none or more than one is left; the message lists the attention parameters found.
    """
    probe_tokens(model, seed=0)  # a model that cannot run at all refutes nothing: its error is raised here
    standing, refusals = [], []
    for layout in layouts:
        try:
            prove(model, layout, layers=[layout.layers[0].index])  # most wrong guesses fail on one layer
            prove(model, layout)
        except ModelError:  # it says nothing of a layout
            raise
        except QkovError as refusal:
            refusals.append(f"{refusal.where}: {refusal.got}")
        else:
            standing.append(layout)
    most = max((len(layout.layers) for layout in standing), default=0)
    standing = [layout for layout in standing if len(layout.layers) == most]  # one that overlooks layers is no rival
    if len(standing) == 1:
        return replace(standing[0], proved=True)
    if standing:
        orders = "; ".join(" | ".join(p.order for p in layout.layers[0].projections) for layout in standing)
        raise unresolved(model, f"its structure allows several layouts that the proof cannot tell apart ({orders})")
    tried = (
        f"{len(refusals)} layouts were tried and refuted, the first by {refusals[0]}" if refusals else "none is known"
    )
    raise unresolved(model, f"of the layouts that its module names allow, {tried}")


def resolve_proved(model: nn.Module) -> Layout:
    """Find the layout of any model and prove it: known families by their data, others from structure.

    Proved is the first layer of each kind, or all of them where the architecture is unknown.

    Args:
        model: With weights; its state is restored exactly.

    Raises:
        QkovError: as ``resolve``, ``prove`` and ``prove_candidates`` do.
    """
    if known_family(text_config(model)) is None:
        return prove_candidates(model, candidates(model))
    layout = resolve(model)
    prove(model, layout, layers=layout.distinct_layers())
    return replace(layout, proved=True)


def _prove_slice(probe: Probe, projection: Projection, piece: HeadSlice, generator: torch.Generator) -> ProofRow:
    check = SliceCheck(probe, projection, piece, generator)
    if piece.block == "O":
        evidence = check.output_columns()
    else:
        test = {"Q": check.query, "K": check.key, "V": check.value}[piece.block]
        step = 4 if piece.block == "Q" else 1  # a gate would answer only in the rows that are nudged
        evidence = test(range(piece.rect.row, piece.rect.row_end, step)) + check.weight_rows()
        for row in check.edge_rows():
            test((row,), may_be_silent=True)
    heads = tuple(probe.layer.query_heads(piece.block, piece.head))
    return ProofRow(probe.layer.index, piece.block, piece.head, heads, evidence)


def _check_columns(probe: Probe) -> None:
    layer = probe.layer
    if probe.baseline.shape[1] != layer.output.shape[1]:
        raise QkovError(
            layer.output.module,
            expected=f"an input of {layer.output.shape[1]} features",
            got=f"{probe.baseline.shape[1]}",
            remedy="Prove the layout on an unsharded model of the same type, before tensor parallelism.",
        )
