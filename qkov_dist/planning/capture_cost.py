"""What it costs a rank to run its samples: weights held and gathered, activations kept, operations of both passes.

Weights are frozen, so that a backward pass forms gradients of inputs alone, from the loss down to the outputs of the
lowest layer's Q, K and V. Every sweep of layers runs all samples once.

    gathered    FSDP2: two layers (one in work, one on its way) and what is kept from the forward pass to the backward
                one, the largest weight outside of layers; or that alone where it is larger. ZeRO-3: all weights, but no
                more elements than DeepSpeed lets live, and the largest module.
    logits      two numbers for each labelled token and entry of the vocabulary: the logits and their gradient
    tokens      of a batch that ``cp`` ranks share each runs one part (labelled tokens are taken to lie evenly), beside
                keys and values of all
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qkov_dist.capture.forms import factor_bytes, shared_inputs
from qkov_dist.capture.side_by_side import batches_at_once
from qkov_dist.distributed.parallelism import Parallelism
from qkov_dist.distributed.plans import SHARDED_BY_HOOKS
from qkov_dist.layout.heads import Site

from .model_sizes import Matrix, Weight, attention_flops
from .simulated_ranks import local_shape
from .workload import Pass, Workload

LIVE_ELEMENTS = 10**9  # DeepSpeed's stage3_max_live_parameters
LOGIT_COPIES = 2  # of a labelled token's row: the logits and their gradient
SOFTMAX_BYTES = 4  # of an attention weight that an eager kernel keeps in float32, beside one in the model's dtype
SUMS_PER_LAYER = 2  # tensor-parallel sums of a layer in one direction: after attention, and after the feed-forward


@dataclass(frozen=True)
class Passes:
    """Operations and bytes of a rank's passes over its samples, and how many batches run at a time."""

    forward: int
    backward: int
    activations: int
    at_once: int
    moved_weights: int
    moved_sums: int
    moved_tokens: int


@dataclass(frozen=True)
class _Rates:
    """What passes cost, forward and backward, for each token, labelled token, and pair of tokens of a sample.

    ``kept`` is the bytes that a token leaves for the backward pass, ``moved_weights`` those of all weights that a batch
    needs, without the rank's own, times the number of shards.
    """

    token: int
    label: int
    square: int
    back_token: int
    back_label: int
    back_square: int
    kept: int
    moved_weights: int


@dataclass(frozen=True, eq=False)
class CaptureCost:
    """Counts for one way to cut a model; ranks differ in the weights they hold and the samples they run."""

    work: Workload
    parallelism: Parallelism

    def weights(self, rank: int) -> int:
        """Bytes of a rank's parameters and buffers."""
        parameters = sum(
            count * weight.itemsize * math.prod(local_shape(weight, self.parallelism, rank))
            for weight, count in self._kinds_of_weights.items()
        )
        return parameters + self.work.model_sizes.buffers

    @cached_property
    def _kinds_of_weights(self) -> Counter[Weight]:
        """Weights that are cut alike, and how many there are."""
        return Counter(replace(weight, name="", layer=None) for weight in self.work.model_sizes.weights)

    @cached_property
    def gathered(self) -> int:
        """Bytes of weights gathered at a time, with those that the rank holds itself."""
        if self.parallelism.shards == 1:
            return 0
        layers, outside = self._worked_with
        if self.parallelism.data == "zero3":
            weights = [weight.numel * weight.itemsize for weight in self.work.model_sizes.weights]
            itemsize = self.work.model_sizes.itemsize
            return min(sum(weights), max(LIVE_ELEMENTS * itemsize, *weights))
        largest = max(outside, default=0)
        return max(largest, 2 * max(layers.values(), default=0)) + largest

    @cached_property
    def _worked_with(self) -> tuple[Counter[int], list[int]]:
        """Bytes of what a rank works with in a pass: of each layer, and of each weight outside of them."""
        layers, outside = Counter[int](), []
        for weight in self.work.model_sizes.weights:
            size = weight.itemsize * math.prod(local_shape(weight, self.parallelism, 0, gathered=True))
            if weight.layer is None:
                outside.append(size)
            else:
                layers[weight.layer] += size
        return layers, outside

    def passes(self, batches: Sequence[Pass], lowest: int) -> Passes:
        """All batches of a rank once, with a backward pass down to layer ``lowest``."""
        tokens, labelled = sum(map(self._tokens, batches)), sum(map(self._labelled, batches))
        squares = sum(self._tokens(batch) * batch.length for batch in batches)
        rates, kept = self._rates(lowest), {*batches}
        again = 5 if self.work.model_sizes.recomputes else 4  # halves of the forward pass's operations
        forward = rates.token * tokens + rates.label * labelled + rates.square * squares
        backward = rates.back_token * tokens + rates.back_label * labelled + rates.back_square * squares * again // 2
        activations = max((self._activations(batch, lowest, rates.kept) for batch in kept), default=0)
        factors = max((batch.tokens for batch in kept), default=0) * self._factors_of_a_token(lowest)
        at_once = self._at_once(len(batches), forward + backward, activations + factors)
        if at_once > 1:  # each of these, and one that is done, has its factors with it until its turn comes
            activations = at_once * activations + (at_once + 1) * factors
        return Passes(
            forward=forward,
            backward=backward,
            activations=activations,
            at_once=at_once,
            moved_weights=len(batches) * rates.moved_weights // self.parallelism.shards,
            moved_sums=self._moved_sums(tokens, labelled, lowest),
            moved_tokens=self._moved_tokens(tokens, lowest),
        )

    def _at_once(self, num_batches: int, operations: int, of_a_batch: int) -> int:
        """How many batches run at a time: as many as half of the memory has room for beside the weights."""
        alone = self.parallelism.shards == self.parallelism.tp == self.parallelism.context == 1
        if self.work.on_gpu or not alone or self.parallelism.data == "device_map":
            return 1
        most = batches_at_once(num_batches, self.work.workers, operations)
        if self.work.memory is None or most == 1:
            return most
        return max(min(most, (self.work.memory // 2 - self.weights(0)) // of_a_batch), 1)

    def _factors_of_a_token(self, lowest: int) -> int:
        """Bytes of X and D of all projections of layers from ``lowest`` on."""
        layers = [layer for layer in self.work.layout.layers if layer.index >= lowest]
        sites = [Site(layer.index, projection.module) for layer in layers for projection in layer.projections]
        return sum(factor_bytes(layer, sites, [1], self.work.model_sizes.itemsize) for layer in layers)

    def _tokens(self, batch: Pass) -> int:
        """Tokens of a batch that this rank runs, padding included."""
        return batch.samples * -(-batch.length // self.parallelism.context)

    def _labelled(self, batch: Pass) -> int:
        return -(-batch.labelled // self.parallelism.context)

    def _rates(self, lowest: int) -> _Rates:
        """What passes cost, with a backward pass down to layer ``lowest``: the same for all ranks."""
        if lowest not in self._known_rates:
            tp = self.parallelism.tp
            kept = self.work.model_sizes.kept.items()
            self._known_rates[lowest] = _Rates(
                *self._per_token(None),
                self._attention(None),
                *self._per_token(lowest),
                self._attention(lowest),
                kept=sum(stream + inner // tp for layer, (stream, inner) in kept if layer >= lowest),
                moved_weights=self._moved_weights(lowest),
            )
        return self._known_rates[lowest]

    @cached_property
    def _known_rates(self) -> dict[int, _Rates]:
        return {}

    def _per_token(self, lowest: int | None) -> tuple[int, int]:
        """Operations for each token and for each labelled one: forward, or backward down to a layer."""
        matrices = self.work.model_sizes.matrices
        last = max((n for n, matrix in enumerate(matrices) if matrix.layer is not None), default=-1)
        counted = [m for n, m in enumerate(matrices) if lowest is None or self._has_gradient(m, lowest, n > last)]
        of_all = sum(2 * self._local(matrix) for matrix in counted if not matrix.labelled)
        return of_all, sum(2 * self._local(matrix) for matrix in counted if matrix.labelled)

    def _has_gradient(self, matrix: Matrix, lowest: int, behind_layers: bool) -> bool:
        """Whether the gradient of a matrix's input is formed."""
        if matrix.layer is None:
            return behind_layers or matrix.labelled
        return matrix.layer > lowest or (matrix.layer == lowest and self._is_behind_attention(matrix, lowest))

    def _is_behind_attention(self, matrix: Matrix, layer: int) -> bool:
        """Whether a matrix of a layer lies behind its Q, K and V."""
        beside = self.work.model_sizes.parallel and not matrix.module.startswith(
            f"{self.work.layout.layer(layer).module}."
        )
        return not beside and matrix.module not in self._inputs(layer)

    def _inputs(self, layer: int) -> set[str]:
        """The projections of a layer that the graph of gradients begins behind: Q, K and V."""
        return {p.module for p in self.work.layout.layer(layer).projections if "O" not in p.blocks}

    def _local(self, matrix: Matrix) -> int:
        cut = matrix.style is not None and ("colwise" in matrix.style or "rowwise" in matrix.style)
        if self.parallelism.experts > 1 or self.parallelism.whole:
            cut = matrix.expert or (cut and not self.parallelism.whole)
        return -(-matrix.size // self.parallelism.tp) if cut else matrix.size

    @cached_property
    def _heads_are_cut(self) -> bool:
        """Whether a rank runs its own heads alone."""
        output = self.work.layout.layers[0].output.module
        cut = self.parallelism.tp > 1 and not self.parallelism.whole
        return cut and self.work.model_sizes.styles.get(output) in SHARDED_BY_HOOKS

    def _attention(self, lowest: int | None) -> int:
        """Operations of all layers' attention for each pair of tokens, forward; of layers from ``lowest`` on."""
        layers = [layer for layer in self.work.layout.layers if lowest is None or layer.index >= lowest]
        return sum(map(attention_flops, layers)) // (self.parallelism.tp if self._heads_are_cut else 1)

    def _activations(self, batch: Pass, lowest: int, kept: int) -> int:
        model_sizes, tp = self.work.model_sizes, self.parallelism.tp
        logits = LOGIT_COPIES * model_sizes.itemsize * model_sizes.vocabulary
        context, eager = self.parallelism.context, 0
        others = batch.tokens * self._keys_and_values(lowest) if context > 1 else 0
        if not model_sizes.recomputes:
            heads = sum(layer.num_heads for layer in self.work.layout.layers if layer.index >= lowest)
            own = heads // (tp if self._heads_are_cut else 1)
            eager = (
                own
                * batch.length
                * (SOFTMAX_BYTES + (model_sizes.itemsize if model_sizes.itemsize < SOFTMAX_BYTES else 0))
            )
        return self._tokens(batch) * (kept + eager) + self._labelled(batch) * logits + others

    def _keys_and_values(self, lowest: int) -> int:
        """Bytes of a token's keys and values in layers from ``lowest`` on."""
        layers = [layer for layer in self.work.layout.layers if layer.index >= lowest]
        return self.work.model_sizes.itemsize * sum(n.num_kv_heads * (n.head_dim + n.v_head_dim) for n in layers)

    def _moved_tokens(self, tokens: int, lowest: int) -> int:
        """Bytes of the other ranks' keys and values, forward and as gradients backward, and of factors on their way to
        the rank whose sample they are of.
        """
        context, layers = self.parallelism.context, self.work.layout.layers
        inputs = (group for layer in layers if layer.index >= lowest for group in shared_inputs(layer))
        factors = sum(group[0][1].shape[1] + sum(rect.shape[0] for _, rect in group) for group in inputs)
        gathered = self._keys_and_values(0) + self._keys_and_values(lowest)
        return (context - 1) * tokens * (gathered + factors * self.work.model_sizes.itemsize // context)

    def _moved_weights(self, lowest: int) -> int:
        """Bytes of weights that come from other ranks, times the number of shards: all of them forward, and layers
        once more backward.
        """
        layers, outside = self._worked_with
        if not self.gathered:
            return 0
        again = sum(size for layer, size in layers.items() if layer >= lowest)
        return (sum(layers.values()) + sum(outside) + again) * (self.parallelism.shards - 1)

    def _moved_sums(self, tokens: int, labelled: int, lowest: int) -> int:
        """Bytes of tensor-parallel sums of the residual stream, forward and backward, and of gathered logits."""
        model_sizes, tp = self.work.model_sizes, self.parallelism.tp
        sums = SUMS_PER_LAYER * (2 * self.work.layout.num_layers - lowest)
        moved = 2 * sums * tokens * model_sizes.hidden + labelled * model_sizes.vocabulary
        return (tp - 1) * moved * model_sizes.itemsize // tp
