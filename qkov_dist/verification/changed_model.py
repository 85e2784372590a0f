"""What scores must do when the loss is scaled, or weights are rescaled, doubled or zeroed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from qkov_dist.errors import QkovError
from qkov_dist.layout.families import NORM_NOTE
from qkov_dist.scoring.settings import ScoreSettings

from .examined_model import Captured, ExaminedModel, Scores
from .property_result import PLAIN, PropertyResult, farthest, head_means, rank_correlation

EXACT = ScoreSettings(epsilon=1e-300, ridge_relative=0.0, dtype=torch.float64)

CLOSE = 1e-4

LOSS_FACTOR, WEIGHT_FACTOR = 3.0, 2.0  # a power of two changes weights without rounding


def check_scale(captured: Captured) -> Iterator[PropertyResult]:
    """The loss scaled; one kv group's V and O rescaled against each other; every weight doubled."""
    examined, base = captured.examined, captured.scores(EXACT)
    scaled = examined.scores(EXACT, loss_factor=LOSS_FACTOR)
    expected = {layer: {b: part * LOSS_FACTOR for b, part in blocks.items()} for layer, blocks in base.items()}
    yield PropertyResult("scale", f"M({LOSS_FACTOR:g} L) - {LOSS_FACTOR:g} M(L)", farthest(scaled, expected), CLOSE)
    if reason := _fixed_values(examined):
        yield PropertyResult("scale", "V and O of a kv group rescaled", None, CLOSE, f"not applicable: {reason}")
    else:
        deviation = _rescaled_group(examined, base)
        yield PropertyResult(
            "scale", "V <- 2V, O <- O/2: M^V / 2, 2 M^O, else same", deviation, CLOSE, "kv head 0 of each layer"
        )
    yield from _doubled(examined, captured)


def check_ablation(captured: Captured) -> Iterator[PropertyResult]:
    """Scores that must be exactly zero when a head's output, or a kv head's values, are."""
    examined = captured.examined
    if not examined.all_plain():
        yield PropertyResult("ablation", "zeroed heads", None, 0, "not applicable: weights are quantized or sharded")
        return
    coupled = any(NORM_NOTE in layer.notes for layer in examined.attention_layers)
    shares_kv = any("K" not in layer.blocks for layer in examined.layout.layers)
    base = captured.scores(PLAIN)
    if any(float(part.abs().max()) == 0 for blocks in base.values() for part in blocks.values()):
        yield PropertyResult(
            "ablation", "heads that score without ablation", 1, 0, "a block scores 0 before anything is zeroed"
        )
    yield from _cut_off(examined, coupled=coupled, shares_kv=shares_kv)
    if all("V" in layer.blocks for layer in examined.attention_layers):
        yield from _without_values(examined, coupled=coupled)
    if coupled:
        yield PropertyResult("ablation", "M^Q and M^K", None, 0, f"not applicable: {NORM_NOTE}")
    if shares_kv:
        yield PropertyResult(
            "ablation", "M^K and M^V of a group", None, 0, "not applicable: layers share keys and values"
        )


def _cut_off(examined: ExaminedModel, *, coupled: bool, shares_kv: bool) -> Iterator[PropertyResult]:
    """One head, then a kv head's whole group, whose output is cut off."""
    last = min(layer.num_heads for layer in examined.attention_layers) - 1
    with examined.heads_multiplied([("O", lambda head: head == last, 0.0)]):
        cut = examined.scores(PLAIN)
    if not coupled:
        yield _zero("M^Q of a head whose O columns are zero", cut, "Q", lambda layer: [last])
    largest = max(layer.group for layer in examined.attention_layers)
    with examined.heads_multiplied([("O", lambda head: head < largest, 0.0)]):
        cut = examined.scores(PLAIN)
    blocks = ("V",) if coupled else ("K", "V")
    for block in () if shares_kv else blocks:
        yield _zero(f"M^{block} of a kv head whose group's O columns are zero", cut, block, lambda layer: [0])


def _without_values(examined: ExaminedModel, *, coupled: bool) -> Iterator[PropertyResult]:
    """A kv head whose values are zero."""
    group = {layer.index: layer.group for layer in examined.attention_layers}
    with examined.heads_multiplied([("V", lambda head: head == 0, 0.0)]):
        cut = examined.scores(PLAIN)
    yield _zero("M^O of a group whose V rows are zero", cut, "O", lambda layer: range(group[layer]))
    if not coupled:
        yield _zero("M^Q of a group whose V rows are zero", cut, "Q", lambda layer: range(group[layer]))
        yield _zero("M^K of a kv head whose V rows are zero", cut, "K", lambda layer: [0])


def _zero(what: str, scores: Scores, block: str, heads: Callable[[int], object]) -> PropertyResult:
    """The largest score of the heads that must score exactly 0, over all layers."""
    found = [float(blocks[block][list(heads(n))].abs().max()) for n, blocks in scores.items() if block in blocks]  # type: ignore[call-overload]
    return PropertyResult("ablation", what, max(found, default=0.0), 0.0)


def _rescaled_group(examined: ExaminedModel, base: Scores) -> float:
    """V <- cV and O <- O/c of kv head 0 in every layer examined, against what theory says of it."""
    group = max(layer.group for layer in examined.attention_layers)
    changes = [
        ("V", lambda head: head == 0, WEIGHT_FACTOR),
        ("O", lambda head: head < group, 1 / WEIGHT_FACTOR),
    ]
    with examined.heads_multiplied(changes):
        found = examined.scores(EXACT)
    expected = {layer: {block: part.clone() for block, part in blocks.items()} for layer, blocks in base.items()}
    for blocks in expected.values():
        blocks["V"][0] /= WEIGHT_FACTOR
        blocks["O"][:group] *= WEIGHT_FACTOR
    return farthest(found, expected)


def _fixed_values(examined: ExaminedModel) -> str:
    """Why V and O cannot be rescaled against each other without changing the function, or ""."""
    if not examined.all_plain():
        return "weights are quantized or sharded"
    if any("V" not in layer.blocks for layer in examined.attention_layers):
        return "a layer has no V projection of its own"
    if any(hasattr(examined.model.get_submodule(layer.module), "v_norm") for layer in examined.attention_layers):
        return "values are normalised"
    if len({layer.group for layer in examined.attention_layers}) > 1:
        return "layers have groups of different sizes"
    return ""


def _doubled(examined: ExaminedModel, captured: Captured) -> Iterator[PropertyResult]:
    """Every weight doubled does not preserve a transformer's function: its rank correlation is a report."""
    before = head_means(captured.scores(PLAIN))
    try:
        with examined.all_weights_doubled():
            after = head_means(examined.scores(PLAIN))
    except QkovError as error:
        yield PropertyResult(
            "scale", "rank correlation, every weight doubled", None, None, f"reported only: {error.got}"
        )
        return
    for block, means in before.items():
        correlation = rank_correlation(means, after[block])
        yield PropertyResult(
            "scale", "rank correlation, every weight doubled", correlation, None, f"{block}: reported only"
        )
