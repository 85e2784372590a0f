r"""Whether what a pass leaves is what scores are made of, asked of the model itself before its first batch.

    weights     each projection has a weight of its own, which nothing else uses or changes (``own_weights``)
    causal      changing the last token changes no earlier output (``outputs``): samples are cut at their last label
    linear      each projection is Y = X W^T + b (``layout.linear_map``)
    gradient    D^T X equals autograd's dL/dW, where weights lie dense and whole in this process (``gradient_proof``)
    tokens      where ranks share a sample's tokens, outputs are those of one rank that has them all (``outputs``)
    length      the outputs of a sample do not depend on how long its batch is; where they do, samples run alone

The first tokens of a sample are enough for all but the last, which takes two forward passes of one sample: whole on
each rank, as a few tokens are no burden, but for the last, whose tokens ranks share as they do in a run. Where ranks
are known to have one model whole, one asks for the last and another for all before, on behalf of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qkov_dist.data.batches import Batch, Objective, sequence
from qkov_dist.data.samples import IGNORED, Sample
from qkov_dist.distributed.world import World
from qkov_dist.layout.heads import Site

from .gradient_proof import check_gradients
from .outputs import batch_of_rows, check_causal, check_shared_tokens, depends_on_length
from .own_weights import check_weights
from .spans import Spans

NUM_TOKENS = 16  # of a sample, which are enough for all but lengths
PROVES, SEES = 0, 1  # the ranks that ask what is asked of the one model of all
LEAST_TOKENS = 4  # of these a labelled one has earlier ones to attend to


@dataclass
class Soundness:
    """What has been found out about the passes of one model, so that it is asked once.

    Attributes:
        proved: Sites whose D^T X is known to be the gradient of their weight.
        lengths: The shortest and the longest input that is known to make no difference.
        alone: Whether samples have to run uncut, beside samples of their own length only.
    """

    proved: set[Site] = field(default_factory=set)
    lengths: tuple[int, int] | None = None
    alone: bool = False

    def prove(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        objective: Objective,
        sample: Sample,
        name: str,
        spans: Spans | None = None,
    ) -> None:
        """Check the sites that were not checked before, on the first tokens of a sample that messages call ``name``.

        Raises:
            QkovError: names the projection, or the model, whose passes do not give gradients.
        """
        new = [site for site in sites if site not in self.proved]
        if not new:
            return
        check_weights(model, new)
        ids = torch.from_numpy(_first_tokens(sample)).unsqueeze(0)
        if not self.proved and objective == "causal":
            check_causal(model, ids)
        if not self.proved and spans is not None:
            check_shared_tokens(model, ids, spans, objective, _attention(model, new))
        check_gradients(model, new, _labelled(ids, objective, f"{name} (its first tokens)"))
        self.proved.update(new)

    def see(
        self, model: nn.Module, samples: Sequence[Sample], objective: Objective, spans: Spans | None = None
    ) -> None:
        """Find out whether samples of these lengths have to run alone; once they do, they always do."""
        cut = [sequence(sample, objective) for sample in samples]
        longest = max(sample.num_tokens for sample in samples)
        shortest = min(cut, key=lambda s: len(s.input_ids))
        known = self.lengths or (longest + 1, 0)
        if self.alone or (known[0] <= len(shortest.input_ids) and longest <= known[1]):
            return
        self.alone = depends_on_length(model, shortest, longest, spans)
        self.lengths = min(known[0], len(shortest.input_ids)), max(known[1], longest)

    def share(self, world: World, sites: Sequence[Site]) -> None:
        """Know what single ranks have found out of the one model of all ranks; every rank calls this alike."""
        self.proved.update(sites)
        self.alone, lengths = world.all_gather([self.alone, self.lengths])[SEES]
        self.lengths = lengths and (lengths[0], lengths[1])


def richest(samples: Sequence[Sample]) -> Sample:
    """The sample to check a model on: where all tokens are alike, no gradient reaches a query or a key."""
    return max(samples, key=lambda sample: len({*sample.input_ids[:NUM_TOKENS].tolist()}))


def _attention(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """All modules of the kinds that these projections are in, of layers that are captured at another time too."""
    kinds = {type(model.get_submodule(site.module.rpartition(".")[0])) for site in sites}
    return [module for module in model.modules() if type(module) in kinds]


def _first_tokens(sample: Sample) -> npt.NDArray[np.int64]:
    """The first tokens of a sample; those of a shorter one again and again, as a first token attends to itself only."""
    return np.resize(sample.input_ids[:NUM_TOKENS], min(max(sample.num_tokens, LEAST_TOKENS), NUM_TOKENS))


def _labelled(ids: Tensor, objective: Objective, name: str) -> Batch:
    """A few tokens [1, T], each of them predicted."""
    targets = ids if objective == "masked" else nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    return batch_of_rows(ids, targets, name)
