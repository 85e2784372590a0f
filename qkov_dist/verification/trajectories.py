r"""Training attention alone, and what becomes of both tasks' held-out losses on the way.

Two trainings are compared at one gain on B: where a trajectory first reaches it, both losses are interpolated between
the two looks at them, sample by sample,

    t = (gain - G_k) / (G_{k+1} - G_k),    L_A = (1 - t) L_A,k + t L_A,{k+1},    G_k = mean L_B,0 - mean L_B,k.

So a choice of frozen heads that merely learns less is not taken for one that harms less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qkov_dist.capture.losses import sample_losses
from qkov_dist.data.batches import Batch
from qkov_dist.data.samples import Sample
from qkov_dist.modes import evaluating, frozen
from qkov_dist.results.influences import Floats

from .examined_model import ExaminedModel

WEIGHT_DECAY = 0.01  # AdamW's own


@dataclass(frozen=True)
class Training:
    """How attention is trained.

    Attributes:
        steps: Of AdamW.
        learning_rate: Constant.
        batch_size: Samples a step.
        looks: How often held-out losses are looked at after the start, evenly.
    """

    steps: int = 12
    learning_rate: float = 3e-4
    batch_size: int = 4
    looks: int = 4

    @property
    def step(self) -> float:
        """Learning rate times number of steps."""
        return self.steps * self.learning_rate

    @property
    def looked_at(self) -> tuple[int, ...]:
        """After how many steps losses are looked at, the last one among them."""
        return tuple(sorted({-(-self.steps * n // self.looks) for n in range(1, self.looks + 1)}))


@dataclass(frozen=True)
class Trajectory:
    """Held-out losses of one training: at the start, and at every look.

    Attributes:
        a: Of A's samples, [looks + 1, n].
        b: Of B's.
    """

    a: Floats
    b: Floats

    @property
    def gains(self) -> Floats:
        """What B's mean loss has fallen by since the start, [looks + 1]."""
        means = self.b.mean(axis=1)
        gains: Floats = means[0] - means
        return gains

    def change_at(self, gain: float) -> Floats:
        """Change of each of A's samples' losses where B has first gained so much, [n]; NaN where it never has."""
        gains = self.gains
        reached = np.flatnonzero(gains >= gain)
        if not len(reached):
            return np.full(self.a.shape[1], np.nan)
        after = int(reached[0])
        if after == 0:
            return np.zeros(self.a.shape[1])
        t = (gain - gains[after - 1]) / (gains[after] - gains[after - 1])
        change: Floats = (1 - t) * self.a[after - 1] + t * self.a[after] - self.a[0]
        return change


def trained(
    examined: ExaminedModel,
    samples: Sequence[Sample],
    training: Training,
    seed: int,
    *,
    freezing: Callable[[], AbstractContextManager[object]] = nullcontext,
    after_step: Callable[[int], object] = lambda n: None,
) -> None:
    """Train the attention weights of the layers examined, and leave them trained.

    Args:
        examined: The model and its layers.
        samples: What it is trained on.
        training: How.
        seed: Of the order of samples.
        freezing: Makes the context in which it is trained.
        after_step: Called with the number of steps done.
    """
    parameters = attention_weights(examined)
    steps = [examined.batches([samples[n] for n in chosen]) for chosen in _ordered(len(samples), training, seed)]
    with evaluating(examined.model), frozen(examined.model), _learning(parameters), freezing():
        optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
        for number, batches in enumerate(steps, start=1):
            optimizer.zero_grad()
            num_samples = sum(len(batch.samples) for batch in batches)
            for batch in batches:
                _backward(examined.model, batch, num_samples)
            optimizer.step()
            after_step(number)
        optimizer.zero_grad()


def _backward(model: nn.Module, batch: Batch, num_samples: int) -> None:
    (sample_losses(model, batch, "mean").sum() / num_samples).backward()  # type: ignore[no-untyped-call]


def _ordered(count: int, training: Training, seed: int) -> Iterator[list[int]]:
    """Samples of each step: all of them in a random order, again and again."""
    rng, left = np.random.default_rng((seed, count)), list[int]()
    size = min(training.batch_size, count)
    for _ in range(training.steps):
        if len(left) < size:
            left = rng.permutation(count).tolist()
        chosen, left = left[:size], left[size:]
        yield chosen


def attention_weights(examined: ExaminedModel) -> list[nn.Parameter]:
    """The weights of the projections of the layers examined, each once."""
    modules = (
        examined.model.get_submodule(projection.module)
        for layer in examined.attention_layers
        for projection in layer.projections
    )
    return list({id(weight): weight for weight in (module.get_parameter("weight") for module in modules)}.values())


@contextmanager
def kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put back what parameters were, bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters learn; their flags and gradients are put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
