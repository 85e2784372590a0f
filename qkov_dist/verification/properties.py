"""Six properties that right scores have, measured on a user's own model.

    additivity         sum over native heads = the block scored without slicing; = the sum over simulated ranks
    scale              c x loss: c x M;  V <- cV with O <- O/c: M^V / c, c M^O, and nothing else
    ablation           a head whose output is cut off, or whose values are zero, scores exactly 0 where it must
    symmetry           signed and symmetric: M_AB^T = M_BA under one Fisher
    layout             every slice answers to its own perturbation, and no other
    batch invariance   a sample in a batch has the gradient that it has alone

Scores use no ridge and no floor where a property needs it. Deviations are shares of the block's largest score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from qkov_dist.distributed.ownership import Owned
from qkov_dist.errors import QkovError
from qkov_dist.layout.families import NORM_NOTE
from qkov_dist.layout.heads import BLOCKS, AttentionLayer, Projection, Site
from qkov_dist.layout.proof import prove
from qkov_dist.layout.rects import Rect, rects_of_flat_interval
from qkov_dist.scoring.score import diagonal_fisher, pair_scores, sample_gradients
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import Roles, ScoreSettings

from .examined_model import Captured, ExaminedModel, Scores

PLAIN = ScoreSettings()
EXACT = ScoreSettings(epsilon=1e-300, ridge_relative=0.0, dtype=torch.float64)
ADDITIVE, CLOSE, TRANSPOSED = 1e-4, 1e-4, 1e-6
# A batch changes the order of sums in the model's own kernels: float32 eps times depth, or the type's own precision.
BATCHED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
LOSS_FACTOR, WEIGHT_FACTOR = 3.0, 2.0  # a power of two changes weights without rounding
NUM_RANKS = 3
TOP = 10


@dataclass(frozen=True)
class PropertyResult:
    """One measured property.

    Attributes:
        check: Which of the six.
        what: What was compared.
        deviation: What was measured.
        bound: What it may be at most; None where the number is reported, not judged.
        note: Where it was measured, or why it was not.
    """

    check: str
    what: str
    deviation: float | None
    bound: float | None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the property holds; None where it is only reported or does not apply."""
        if self.deviation is None or self.bound is None:
            return None
        return self.deviation <= self.bound


def run_checks(examined: ExaminedModel) -> Iterator[PropertyResult]:
    """Measure all six properties, one after the other.

    Raises:
        QkovError: where the model cannot be run at all.
    """
    yield from check_layout(examined)
    with examined.captured() as captured:
        yield from check_additivity(captured)
        yield from check_symmetry(captured)
        yield from check_batch_invariance(captured)
        yield from check_scale(captured)
        yield from check_ablation(captured)


def check_layout(examined: ExaminedModel) -> Iterator[PropertyResult]:
    """Every slice of every layer, perturbed."""
    try:
        rows = prove(examined.model, examined.layout)
    except QkovError as error:
        yield PropertyResult("layout", "slices that answer wrongly", 1, 0, str(error))
        return
    yield PropertyResult("layout", "slices that answer wrongly", 0, 0, f"{len(rows)} slices perturbed")


def check_additivity(captured: Captured) -> Iterator[PropertyResult]:
    """Heads against the whole block, and ranks against one process."""
    scores = captured.scores(PLAIN)
    whole = {layer.index: _unsliced(captured, layer) for layer in captured.examined.attention_layers}
    summed = {layer: {block: part.sum(dim=0) for block, part in blocks.items()} for layer, blocks in scores.items()}
    yield PropertyResult("additivity", "sum over heads - unsliced block", _farthest(summed, whole), ADDITIVE)
    partials = [captured.scores(PLAIN, owned=_simulated_rank(rank)) for rank in range(NUM_RANKS)]
    by_ranks = {
        layer: {block: torch.stack([partial[layer][block] for partial in partials]).sum(dim=0) for block in blocks}
        for layer, blocks in scores.items()
    }
    yield PropertyResult(
        "additivity", f"sum over {NUM_RANKS} ranks - one process", _farthest(by_ranks, scores), ADDITIVE
    )


def check_symmetry(captured: Captured) -> Iterator[PropertyResult]:
    """Both directions under one Fisher."""
    for score in (name for name, kind in KINDS.items() if kind.is_symmetric):
        settings = replace(PLAIN, score=score)
        there, back = captured.scores(settings), captured.scores(settings, swapped=True)
        turned = {layer: {b: part.transpose(1, 2) for b, part in blocks.items()} for layer, blocks in back.items()}
        yield PropertyResult("symmetry", f"{score}: M_AB^T - M_BA", _farthest(turned, there), TRANSPOSED)
    there, back = captured.scores(PLAIN), captured.scores(PLAIN, swapped=True)
    means = [_head_means(scores) for scores in (there, back)]
    for block in means[0]:
        one, other = means[0][block], means[1][block]
        top = min(TOP, len(one))
        common = len({*np.argsort(one)[-top:]} & {*np.argsort(other)[-top:]})
        note = f"interference {block}: reported only; {common} of the top {top} heads in common"
        yield PropertyResult("symmetry", "rank correlation of A->B and B->A", _rank_correlation(one, other), None, note)


def check_batch_invariance(captured: Captured) -> Iterator[PropertyResult]:
    """Each sample's gradients, in the run's batches and alone."""
    examined = captured.examined
    dtype = next(p.dtype for p in examined.model.parameters() if p.is_floating_point())
    worst = 0.0
    with examined.captured(one_by_one=True) as alone:
        for layer in examined.attention_layers:
            for projection in layer.projections:
                in_batch, single = (_whole_gradients(c, layer, projection) for c in (captured, alone))
                difference = (in_batch - single).flatten(1).abs().amax(dim=1)
                worst = max(worst, float((difference / single.flatten(1).abs().amax(dim=1).clamp_min(1e-300)).max()))
    yield PropertyResult(
        "batch invariance", "gradient in a batch - alone", worst, BATCHED[dtype], "share of its largest element"
    )


def check_scale(captured: Captured) -> Iterator[PropertyResult]:
    """The loss scaled; one kv group's V and O rescaled against each other; every weight doubled."""
    examined, base = captured.examined, captured.scores(EXACT)
    scaled = examined.scores(EXACT, loss_factor=LOSS_FACTOR)
    expected = {layer: {b: part * LOSS_FACTOR for b, part in blocks.items()} for layer, blocks in base.items()}
    yield PropertyResult("scale", f"M({LOSS_FACTOR:g} L) - {LOSS_FACTOR:g} M(L)", _farthest(scaled, expected), CLOSE)
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
    group = {layer.index: layer.group for layer in examined.attention_layers}
    coupled = any(NORM_NOTE in layer.notes for layer in examined.attention_layers)
    shares_kv = any("K" not in layer.blocks for layer in examined.layout.layers)
    base = captured.scores(PLAIN)
    if any(float(part.abs().max()) == 0 for blocks in base.values() for part in blocks.values()):
        yield PropertyResult(
            "ablation", "heads that score without ablation", 1, 0, "a block scores 0 before anything is zeroed"
        )
    last = min(layer.num_heads for layer in examined.attention_layers) - 1
    with examined.heads_multiplied([("O", lambda head: head == last, 0.0)]):
        cut = examined.scores(PLAIN)
    if not coupled:
        yield _zero("M^Q of a head whose O columns are zero", cut, "Q", lambda layer: [last])
    largest = max(group.values())
    with examined.heads_multiplied([("O", lambda head: head < largest, 0.0)]):
        cut = examined.scores(PLAIN)
    blocks = ("V",) if coupled else ("K", "V")
    for block in () if shares_kv else blocks:
        yield _zero(f"M^{block} of a kv head whose group's O columns are zero", cut, block, lambda layer: [0])
    if all("V" in layer.blocks for layer in examined.attention_layers):
        with examined.heads_multiplied([("V", lambda head: head == 0, 0.0)]):
            cut = examined.scores(PLAIN)
        yield _zero("M^O of a group whose V rows are zero", cut, "O", lambda layer: range(group[layer]))
        if not coupled:
            yield _zero("M^Q of a group whose V rows are zero", cut, "Q", lambda layer: range(group[layer]))
            yield _zero("M^K of a kv head whose V rows are zero", cut, "K", lambda layer: [0])
    if coupled:
        yield PropertyResult("ablation", "M^Q and M^K", None, 0, f"not applicable: {NORM_NOTE}")
    if shares_kv:
        yield PropertyResult(
            "ablation", "M^K and M^V of a group", None, 0, "not applicable: layers share keys and values"
        )


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
    return _farthest(found, expected)


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
    before = _head_means(captured.scores(PLAIN))
    try:
        with examined.all_weights_doubled():
            after = _head_means(examined.scores(PLAIN))
    except QkovError as error:
        yield PropertyResult(
            "scale", "rank correlation, every weight doubled", None, None, f"reported only: {error.got}"
        )
        return
    for block, means in before.items():
        correlation = _rank_correlation(means, after[block])
        yield PropertyResult(
            "scale", "rank correlation, every weight doubled", correlation, None, f"{block}: reported only"
        )


def _unsliced(captured: Captured, layer: AttentionLayer) -> dict[str, Tensor]:
    """Each block scored as one set of elements: no slice is looped over, none can be counted twice."""
    roles = captured.examined.roles()
    weights = torch.as_tensor(roles.weights.sum(0))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for projection in layer.projections:
        gradients = _whole_gradients(captured, layer, projection)
        for block in projection.blocks:
            mask = torch.zeros(projection.shape, dtype=torch.bool)
            for piece in projection.slices:
                if piece.block == block:
                    mask[piece.rect.rows, piece.rect.cols] = True
            of_block = gradients[:, mask]
            found.setdefault(block, []).append((of_block, diagonal_fisher(of_block, weights)))
    return {block: _whole_scores(parts, roles) for block, parts in found.items()}


def _whole_scores(parts: Sequence[tuple[Tensor, Tensor]], roles: Roles) -> Tensor:
    """The score of a block from its gradients and I in each projection."""
    mean = torch.cat([fisher for _, fisher in parts]).mean()
    ridge = PLAIN.ridge_absolute + PLAIN.ridge_relative * float(mean)
    of_parts = [
        pair_scores(
            gradients,
            fisher,
            left=roles.left,
            right=roles.right,
            score=PLAIN.score,
            epsilon=PLAIN.epsilon,
            ridge=ridge,
        )
        for gradients, fisher in parts
    ]
    return torch.stack(of_parts).sum(0)


def _whole_gradients(captured: Captured, layer: AttentionLayer, projection: Projection) -> Tensor:
    """Per-sample gradients of a whole weight, float64 [N, out, in]."""
    site, whole = Site(layer.index, projection.module), Rect.of_shape(*projection.shape)
    x, d = captured.store.x(site).features(whole.cols).double(), captured.store.d(site).features(whole.rows).double()
    spans = [captured.store.spans[n] for n in range(captured.examined.num_samples)]
    return sample_gradients(x, d, spans).view(-1, *projection.shape)


def _simulated_rank(rank: int) -> Owned:
    """A flat partition of each weight, which cuts across rows, heads and blocks."""

    def owned(projection: Projection, bias: bool) -> tuple[Rect, ...]:
        num_cols = 1 if bias else projection.shape[1]
        size = projection.shape[0] * num_cols
        return rects_of_flat_interval(size * rank // NUM_RANKS, size * (rank + 1) // NUM_RANKS, num_cols)

    return owned


def _farthest(got: dict[int, dict[str, Tensor]], expected: dict[int, dict[str, Tensor]]) -> float:
    """Largest deviation of any pair, as a share of the block's largest score in that layer."""
    return max(
        float(
            (got[layer][block].double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-300)
        )
        for layer, blocks in expected.items()
        for block, wanted in blocks.items()
    )


def _head_means(scores: Scores) -> dict[str, np.ndarray]:
    """Block -> mean score of every head of every layer."""
    means: dict[str, list[np.ndarray]] = {}
    for blocks in scores.values():
        for block in BLOCKS:
            if block in blocks:
                means.setdefault(block, []).append(blocks[block].double().mean(dim=(1, 2)).cpu().numpy())
    return {block: np.concatenate(parts) for block, parts in means.items()}


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    return float(spearmanr(one, other).statistic) if len(one) > 2 else None
