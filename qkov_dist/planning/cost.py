"""What a run costs one rank, in integers: bytes held, bytes moved, operations of matrix products.

How each is counted is said where it is counted, in ``planning.capture_cost`` and ``planning.scoring_cost``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """One rank.

    Attributes:
        weights: Bytes of its parameters and buffers.
        gathered: Bytes of weights that others hold and that are gathered for a pass, at most at a time.
        activations: Bytes that batches leave for their backward passes, at most at a time (an estimate).
        factors_gpu: Bytes of captured factors that stay on the GPU, in the pass that keeps most.
        factors_memory: Bytes of captured factors in the host's memory, in that pass.
        factors_disk: Bytes of captured factors on disk, in that pass.
        exchange: Bytes of factors that are held while those of one layer are sent and received, at most.
        buffers: Bytes of the tiles in work (gradients, their squares) and of the factors that they are made of, padded
            or packed; of scores that are tested on a GPU while others are formed, too.
        scores: Bytes of one layer's scores, at most.
        statistics: Bytes of labels and scores while heads are tested; on rank 0 also of the heatmap.
        sent_factors: Bytes of factors sent to other ranks.
        least_factors: Bytes of what these ranks cannot do without.
        sent_scores: Bytes of partial scores sent to other ranks.
        moved_weights: Bytes that come over this rank's link while weights are gathered for its passes.
        moved_sums: Bytes that pass its link while tensor-parallel parts are summed.
        moved_tokens: Bytes that pass its link where ranks share samples' tokens: keys, values, factors on their way.
        written: Bytes of its partial file, and on rank 0 of the heatmap.
        flops_forward: Operations of all forward passes.
        flops_backward: Operations of all backward passes, down to the lowest layer of each.
        flops_kept: Operations of gradients that are formed at capture, of samples kept as gradients.
        flops_scoring: Operations of gradients, Fisher and scores of all pairs.
        flops_narrow: Those of them that are products of factors in half a type, on a GPU.
        flops_norms: Operations of norms of gradients, which a relative ridge and ``sample_scale`` need.
        flops_statistics: Operations of permutations and intervals.
        heads: Heads that are added up, and tested for each pair of tasks.
        heads_early: Those of them that are tested as they are scored, on a GPU.
        elements: Elements of all per-sample gradients that are formed for scores.
        batches: Forward passes.
        at_once: How many of them run at a time.
    """

    weights: int
    gathered: int = 0
    activations: int = 0
    factors_gpu: int = 0
    factors_memory: int = 0
    factors_disk: int = 0
    exchange: int = 0
    buffers: int = 0
    scores: int = 0
    statistics: int = 0
    sent_factors: int = 0
    least_factors: int = 0
    sent_scores: int = 0
    moved_weights: int = 0
    moved_sums: int = 0
    moved_tokens: int = 0
    written: int = 0
    flops_forward: int = 0
    flops_backward: int = 0
    flops_kept: int = 0
    flops_scoring: int = 0
    flops_narrow: int = 0
    flops_norms: int = 0
    flops_statistics: int = 0
    heads: int = 0
    heads_early: int = 0
    elements: int = 0
    batches: int = 0
    at_once: int = 1

    def peaks(self, *, on_gpu: bool) -> tuple[int, int]:
        """The most bytes held at a time on the GPU (0 without one) and in the host's memory."""
        capturing = self.gathered + self.activations
        if on_gpu:
            scoring = self.buffers + self.exchange
            on_host = max(self.factors_memory + self.exchange + 2 * self.scores, self.statistics)
            return self.weights + self.factors_gpu + max(capturing, scoring), on_host
        scoring = 2 * self.scores + self.buffers + self.exchange
        return 0, self.weights + max(self.factors_memory + max(capturing, scoring), self.statistics)


def largest(costs: Sequence[Cost]) -> Cost:
    """The largest of every number over ranks, each from whichever rank has it."""
    return Cost(**{entry.name: max(getattr(cost, entry.name) for cost in costs) for entry in fields(Cost)})


def total(costs: Sequence[Cost]) -> Cost:
    """The sum of every number over ranks."""
    return Cost(**{entry.name: sum(getattr(cost, entry.name) for cost in costs) for entry in fields(Cost)})
