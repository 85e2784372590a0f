"""What a model's outputs depend on: tokens that come later, and how long a batch is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkov_dist.data.batches import Batch, Objective, Sequenced, make_batch
from qkov_dist.data.samples import IGNORED
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import text_config
from qkov_dist.modes import ModelError, evaluating, explained_pass, input_device, plain_outputs, without_graph

from .losses import labelled_logits, takes
from .numerics import moved_by_order
from .ropes import ropes_by_length
from .spans import Spans

NUM_LABELS = 16  # at which outputs are compared: each depends on all tokens before it


def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Raise where the last of a few tokens [1, T] changes what is predicted at earlier ones.

    Raises:
        QkovError: names the model.
    """
    other = ids.clone()
    other[0, -1] = next((token for token in ids[0].tolist() if token != ids[0, -1]), 0 if ids[0, -1] else 1)
    rows = torch.cat([ids, other])
    logits = _logits(model, batch_of_rows(rows, rows, "row")).view(2, ids.shape[1], -1)[:, :-1]
    if _differ(logits[0], logits[1], _dtype(model)):
        raise QkovError(
            type(model).__name__,
            expected="a causal decoder: the last token changes no earlier output",
            got="earlier outputs that change with it (bidirectional, or a prefix without a causal mask)",
            remedy="Its samples cannot be cut at their last label, nor their tokens be predicted from those before. "
            "Load it as a causal decoder (is_causal, use_bidirectional_attention), or use a masked LM's class.",
        )


def check_shared_tokens(
    model: nn.Module, ids: Tensor, spans: Spans, objective: Objective, attention: Sequence[nn.Module]
) -> None:
    """Raise where a few tokens [1, T] on several ranks are predicted otherwise than all of them on one.

    Few tokens do not show what begins beyond some length. Attention that counts tokens by itself (as Llama 4's scale of
    queries, by their number in the span) or chooses among keys by itself (an indexer's) is refused for it.

    Args:
        model: The model; all ranks of a group call this alike.
        ids: The tokens.
        spans: The ranks.
        objective: What is predicted.
        attention: The layers that projections are in.

    Raises:
        QkovError: names the model.
    """
    got = _cannot_share(model, ids, spans, objective, attention)
    if got is None:
        return
    raise QkovError(
        f"parallel.cp: model type {getattr(text_config(model), 'model_type', type(model).__name__)!r}",
        expected="a causal decoder whose tokens meet in attention alone, by transformers' attention interface",
        got=got,
        remedy="Use parallel.cp=1, with parallel.shard=fsdp and a small compute.batch_tokens.",
    )


def _cannot_share(
    model: nn.Module, ids: Tensor, spans: Spans, objective: Objective, attention: Sequence[nn.Module]
) -> str | None:
    """Why tokens cannot lie on several ranks; None where they can."""
    if objective == "masked":
        return "masked prediction"
    inside = {type(module).__name__ for layer in attention for module in layer.modules()}
    if choosing := sorted(name for name in inside if "Indexer" in name):
        return f"attention that chooses among a rank's own keys ({choosing[0]})"
    changed = "outputs that change where ranks share a sample's tokens"
    if not takes(model, "position_ids"):
        return changed
    batch = batch_of_rows(ids, ids, "row")
    whole = _logits(model, batch)
    coarse = torch.float32 if _dtype(model) == torch.float64 else _dtype(model)  # in which some attend all the same
    try:
        _span_logits(model, batch, spans, rehearsed=True)
        with _Counting.within(attention) as counting:
            shared = _logits(model, batch, spans)
    except ModelError:  # of a model that cannot take a part of the tokens: in a rehearsal, on all ranks
        return changed
    if counting.found:
        return "attention that counts its tokens from the first one of each rank (torch.arange)"
    return changed if _differ(whole, shared, coarse) else None


class _Counting(TorchFunctionMode):
    """Sees whether ``torch.arange`` is called inside some modules: of tokens on several ranks it begins at each."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self._depth = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= self._depth > 0 and func is torch.arange
        return func(*args, **(kwargs or {}))

    @classmethod
    @contextmanager
    def within(cls, modules: Sequence[nn.Module]) -> Iterator[_Counting]:
        """Look on for as long as the block lasts."""
        mode = cls()

        def enter(*_: Any) -> None:
            mode._depth += 1

        def leave(*_: Any) -> None:
            mode._depth -= 1

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield stack.enter_context(mode)


def depends_on_length(model: nn.Module, shortest: Sequenced, longest: int, spans: Spans | None = None) -> bool:
    """Whether a sample's outputs change when it is padded to the length of the longest, at some of its labels.

    Args:
        model: The model; all ranks of a pass call this alike.
        shortest: The sample of fewest tokens, cut where batches would cut it.
        longest: Tokens of the longest sample, uncut.
        spans: The ranks that share its tokens; None where one has them all.
    """
    if len(shortest.input_ids) == longest:
        return False
    if any(_threshold(rope) < longest for rope in ropes_by_length(model)):
        return True
    alone = _with_few_labels(make_batch([shortest], [0], [""]))
    padded = _with_few_labels(make_batch([shortest], [0], [""], length=longest))
    return _differ(_logits(model, alone, spans), _logits(model, padded, spans), _dtype(model))


def _with_few_labels(batch: Batch) -> Batch:
    """A batch of one sample with some of its labels, the first and the last among them."""
    labelled = (batch.targets[0] != IGNORED).nonzero()[:, 0]
    chosen = labelled[torch.linspace(0, len(labelled) - 1, min(len(labelled), NUM_LABELS)).round().long()]
    targets = torch.full_like(batch.targets, IGNORED)
    targets[0, chosen] = batch.targets[0, chosen]
    return replace(batch, targets=targets)


def _threshold(rope: nn.Module) -> int:
    """The longest input of a rope that is as the shortest's; 0 where it does not say."""
    config = getattr(rope, "config", None)
    stated = getattr(config, "rope_parameters", None) or {}
    layers = stated.values() if any(isinstance(value, dict) for value in stated.values()) else [stated]
    limits = [part.get("original_max_position_embeddings") for part in layers if isinstance(part, dict)]
    limits += [getattr(rope, "original_max_seq_len", None)]
    return min((limit for limit in limits if isinstance(limit, int)), default=0)


def batch_of_rows(ids: Tensor, targets: Tensor, name: str) -> Batch:
    """Rows of one length."""
    ones = torch.ones_like(ids)
    return Batch(tuple(range(len(ids))), (name,) * len(ids), ids, ones, targets, ones)


def _logits(model: nn.Module, batch: Batch, spans: Spans | None = None) -> Tensor:
    """Logits at the labelled positions, row after row [labelled, vocabulary], on the CPU."""
    if spans is None:
        return _evaluated(model, batch)
    mine = _span_logits(model, batch, spans)
    whole = mine.new_zeros(int(batch.num_targets.sum()), mine.shape[1]).double()
    whole[spans.places(batch, batch.targets != IGNORED)[spans.group.rank]] = mine.double()
    return spans.summed(whole)


def _span_logits(model: nn.Module, batch: Batch, spans: Spans, *, rehearsed: bool = False) -> Tensor:
    """Those of this rank's span."""
    with spans.attention(model, rehearsed=rehearsed):
        return _evaluated(model, spans.of(batch))


def _evaluated(model: nn.Module, batch: Batch) -> Tensor:
    with evaluating(model), plain_outputs(model), without_graph(), explained_pass(model):
        return labelled_logits(model, batch.to(input_device(model))).cpu()


def _differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two logits of the same positions are different functions, not different sums."""
    one, other = one.double(), other.double()
    size, deviation = (one - one.mean()).norm(), (one - other).norm()
    return bool(deviation > moved_by_order(dtype) * size)  # not so where either is not finite: that has a name


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest type that a pass computes in, as far as it can be told: of weights, or of autocast."""
    device_type = input_device(model).type
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device_type):
        types.add(torch.get_autocast_dtype(device_type))
    return min(types, key=lambda dtype: (dtype.itemsize, dtype != torch.bfloat16), default=torch.float32)
